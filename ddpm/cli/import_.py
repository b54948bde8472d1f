"""`ddpm import`: a run from another program's checkpoint, by `runs.import_checkpoint`."""

from collections.abc import Sequence
from pathlib import Path

from ddpm import config
from ddpm.cli import flags
from ddpm.cli.train import run_name

EXAMPLES = (
    ("ddpm import logs/DDPM_CIFAR10_EPS/ckpt.pt --name cifar10", "pytorch-ddpm's file, found by its contents"),
    ("ddpm train --run-dir runs/cifar10", "training goes on from it"),
    ("ddpm import ckpt.pt --format pytorch-ddpm:beta_T=0.01", "what the file does not say"),
    ("ddpm import model.pth --data.dataset folder --data.path photos", "what it was trained on"),
)


def run(argv: Sequence[str]) -> int:
    """Import."""
    given = parser().parse(argv)
    from ddpm import runs

    place = Path(given.run_dir) if given.run_dir is not None else Path("runs") / run_name(_name(given.name, given.file))
    runs.import_checkpoint(given.file, place, spec=given.format, changes=config.nest(given.typed.values))
    return 0


def _name(name: str | None, file: str) -> str:
    return Path(file).stem if name is None else name


def parser() -> flags.Parser:
    """Options of the verb, then a flag for every config field."""
    about = (
        "Make a run of another program's checkpoint: weights, moving averages, optimizer and step, with the schedule, variance and "
        "sampler that give that program's samples. Nothing in the file is executed. docs/compatibility.md lists the programs."
    )
    made = flags.Parser("import", "FILE [flags]", about, EXAMPLES)
    made.add_argument("file", metavar="FILE", help="the checkpoint: a file, or a folder")
    place = made.own.add_mutually_exclusive_group()
    place.add_argument("--name", help="the run's folder is runs/NAME (default: the file's name)")
    place.add_argument("--run-dir", metavar="DIR", help="the run's folder itself")
    made.own.add_argument(
        "--format", metavar="SPEC", help="its format, with what the file does not say (default: found by its contents)"
    )
    flags.add_fields(made)
    made.epilog = "Fields of the config are those of the file unless they are given."
    return made
