"""`ddpm stats`: mean and covariance of a data set's features as a file, by `runs.stats`."""

from collections.abc import Sequence
from pathlib import Path

from ddpm import config
from ddpm.cli import flags

EXAMPLES = (
    ("ddpm stats cifar10 --out cifar10.npz", "a reference that needs no images any more"),
    ("ddpm stats photos/ --out photos.npz --extractor inception-tf", "of a folder of images"),
)


def run(argv: Sequence[str]) -> int:
    """Take features, write the file."""
    given = parser().parse(argv)
    named = config.flatten({"data": _where(given.data)})
    settings = flags.build([("DATASET", config.nest(named))], given.typed)
    from ddpm import runs

    runs.stats(
        settings.data,
        given.out,
        extractor=given.extractor,
        weights=given.weights,
        device=settings.runtime.device,
    )
    return 0


def _where(given: str) -> dict[str, str]:
    """A folder or an .npz file is a data set with a path; everything else is a data set's name."""
    path = Path(given).expanduser()
    if path.suffix == ".npz":
        return {"dataset": "npz", "path": str(path)}
    return {"dataset": "folder", "path": str(path)} if "/" in given or path.is_dir() else {"dataset": given}


def parser() -> flags.Parser:
    """Flags of the verb."""
    about = (
        "Write mean and covariance of the features of images, with the protocol, for `ddpm evaluate --reference FILE`."
    )
    made = flags.Parser("stats", "DATASET|FOLDER|NPZ --out FILE.npz [flags]", about, EXAMPLES)
    made.add_argument(
        "data", metavar="DATASET", help="a data set's name, a folder of images, or an .npz file of images"
    )
    made.own.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="the file to write")
    add_extractor(made)
    flags.add_field(made, "runtime.device", "--device")
    flags.add_fields(made, ["data"])
    return made


def add_extractor(made: flags.Parser) -> None:
    """--extractor and --weights."""
    made.own.add_argument(
        "--extractor",
        metavar="SPEC",
        help="what images are compared by, see `ddpm features list` (default: tiny-cnn where it is shipped for the data, else inception-tf)",
    )
    made.own.add_argument("--weights", type=Path, metavar="FILE", help="the extractor's weights")
