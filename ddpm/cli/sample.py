"""`ddpm sample`: images from a run or a checkpoint, by `runs.sample`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ddpm.cli import flags
from ddpm.errors import ConfigError

EXAMPLES = (
    ("ddpm sample runs/digits", "64 images, a grid and a GIF, into the run's folder"),
    ("ddpm sample runs/digits --labels 3,7 --guidance 2", "threes and sevens in turn"),
    ("ddpm sample runs/cifar10 --num-images 50000 --npz --no-png --processes 4", "one file for evaluation"),
)
GUIDANCE = flags.table(
    "guidance",
    (
        ("2", "classifier-free, of weight 2; 1 is none, 0 leaves out the label"),
        ("cfg:weight=2,rescale=0.7", "the same, with the contrast of the unguided image"),
        ("cfg:weight=2,low=0.2,high=5", "only where the noise level sigma / alpha is above low, at most high"),
        ("autoguidance:model=RUN", "away from a worse model, such as an earlier checkpoint; weight=2"),
        ("classifier:model=FILE", "towards a class of `ddpm features train DATASET --noisy`; weight=1"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The arguments of `runs.sample`; None leaves the choice to what the checkpoint remembers."""

    source: str
    num_images: int = 64
    seed: int = 0
    labels: list[str] | None = None
    guidance: float | str | None = None
    sampler: str | None = None
    thresholding: str | None = None
    ema: str | None = None
    out: Path | None = None
    png: bool = True
    npz: bool = False
    gif: bool = True
    chunk: int | None = None
    device: str = "auto"
    precision: str = "auto"


def run(argv: Sequence[str]) -> int:
    """Sample; the images depend on seeds alone, not on the number of processes."""
    options, processes = parse_sample(argv)
    if processes > 1 and not flags.in_a_group(f"--processes={processes}"):
        from ddpm.distributed import launch_processes

        return launch_processes(["sample", *flags.without(argv, "--processes")], processes)
    from ddpm import runs
    from ddpm.runs.loading import trusting

    with trusting() if parser().parse(argv).trust_code else nullcontext():
        runs.sample(**vars(options))
    return 0


def parse_sample(argv: Sequence[str]) -> tuple[SampleOptions, int]:
    """The words after `ddpm sample` as options and a number of processes; raises ConfigError."""
    given = parser().parse(argv)
    settings = flags.build([], given.typed)
    typed = given.typed.values
    options = SampleOptions(
        source=given.source,
        num_images=given.num_images,
        seed=settings.seed,
        labels=parse_labels(given.labels),
        guidance=settings.sample.guidance if "sample.guidance" in typed else None,
        sampler=settings.sample.sampler if "sample.sampler" in typed else None,
        thresholding=settings.diffusion.thresholding if "diffusion.thresholding" in typed else None,
        ema=given.ema,
        out=given.out,
        png=given.png,
        npz=given.npz,
        gif=given.gif,
        chunk=settings.sample.chunk if "sample.chunk" in typed else None,
        device=settings.runtime.device,
        precision=settings.runtime.precision,
    )
    return options, given.processes


def parser() -> flags.Parser:
    """Flags of the verb."""
    made = flags.Parser(
        "sample",
        "SOURCE [flags]",
        "Draw images. Image k depends on the model, the sampler and seed k alone.",
        EXAMPLES,
        GUIDANCE,
    )
    made.add_argument("source", metavar="SOURCE", help="a run folder or a checkpoint")
    own, kept = made.own, "as the checkpoint has it"
    own.add_argument("--num-images", type=flags.whole(1), default=64, metavar="N", help="how many (default: 64)")
    flags.add_field(made, "seed", "--seed")
    own.add_argument(
        "--labels", metavar="A,B,...", help="classes by number or name, taken in turn (default: every class in turn)"
    )
    flags.add_field(made, "sample.guidance", "--guidance", kept)
    flags.add_field(made, "sample.sampler", "--sampler", kept)
    flags.add_field(made, "diffusion.thresholding", "--thresholding", kept)
    own.add_argument(
        "--ema",
        metavar="NAME|none",
        help="which average of the weights; none: the weights themselves (default: the first)",
    )
    own.add_argument("--out", type=Path, metavar="DIR", help="folder for the images (default: in the run's folder)")
    own.add_argument("--npz", action="store_true", help="also write all images as one samples.npz")
    own.add_argument("--no-png", dest="png", action="store_false", help="no PNG for each image")
    own.add_argument("--no-gif", dest="gif", action="store_false", help="no pictures of the way from noise to image")
    own.add_argument(
        "--trust-code", action="store_true", help="run the code from outside ddpm (module:Class) that the run names"
    )
    flags.add_field(made, "sample.chunk", "--chunk", kept)
    flags.add_field(made, "runtime.device", "--device")
    flags.add_field(made, "runtime.precision", "--precision")
    own.add_argument(
        "--processes",
        type=flags.whole(1, 4096),
        default=1,
        metavar="N",
        help="processes on this machine, one for each GPU",
    )
    return made


def parse_labels(text: str | None) -> list[str] | None:
    """Classes with commas between; raises ConfigError."""
    if text is None:
        return None
    labels = [label.strip() for label in text.split(",")]
    if not all(labels):
        raise ConfigError(f"--labels={text!r} is wrong: write numbers or names with commas between, such as 0,1,2.")
    return labels
