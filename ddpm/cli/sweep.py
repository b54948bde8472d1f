"""`ddpm sweep`: samplers x steps on a checkpoint, by `runs.sweep`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.cli import flags
from ddpm.cli.stats import add_extractor
from ddpm.errors import ConfigError

EXAMPLES = (
    ("ddpm sweep runs/digits", "six samplers at 5 to 50 evaluations, beside 1000-step ancestral sampling"),
    ("ddpm sweep runs/digits --samplers 'ddim heun ddpm:steps=99' --evaluations 19", "your own"),
    ("ddpm sweep runs/digits --baseline none --num-images 200", "quick: no 1000-step baseline"),
)


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The arguments of `runs.sweep`; None leaves the choice to the library or to what the checkpoint remembers."""

    source: str
    samplers: tuple[str, ...]
    evaluations: tuple[int, ...]
    baseline: str | None
    num_images: int
    reference: str | None
    extractor: str | None
    weights: Path | None
    seed: int
    guidance: Any
    thresholding: str | None
    ema: str | None
    chunk: int | None
    rounds: int
    out: Path | None
    device: str
    precision: str


SAMPLERS = "ddim ddpm dpm++2m dpm++3m unipc heun"


def run(argv: Sequence[str]) -> int:
    """Sweep; images and distances do not depend on the number of processes."""
    options, processes = parse_sweep(argv)
    if processes > 1 and not flags.in_a_group(f"--processes={processes}"):
        from ddpm.distributed import launch_processes

        return launch_processes(["sweep", *flags.without(argv, "--processes")], processes)
    from ddpm import runs
    from ddpm.runs.loading import trusting

    with trusting() if parser().parse(argv).trust_code else nullcontext():
        runs.sweep(**vars(options))
    return 0


def parse_sweep(argv: Sequence[str]) -> tuple[SweepOptions, int]:
    """The words after `ddpm sweep` as options and a number of processes; raises ConfigError."""
    given = parser().parse(argv)
    settings = flags.build([], given.typed)
    typed = given.typed.values
    options = SweepOptions(
        source=given.source,
        samplers=_words(given.samplers, "--samplers"),
        evaluations=_numbers(given.evaluations),
        baseline=None if given.baseline == "none" else given.baseline,
        num_images=given.num_images,
        reference=given.reference,
        extractor=given.extractor,
        weights=given.weights,
        seed=settings.seed,
        guidance=settings.sample.guidance if "sample.guidance" in typed else None,
        thresholding=settings.diffusion.thresholding if "diffusion.thresholding" in typed else None,
        ema=given.ema,
        chunk=settings.sample.chunk if "sample.chunk" in typed else None,
        rounds=given.rounds,
        out=given.out,
        device=settings.runtime.device,
        precision=settings.runtime.precision,
    )
    return options, given.processes


def parser() -> flags.Parser:
    """Flags of the verb."""
    about = (
        "Try samplers at several costs: the same seeds by each, judged by the Frechet distance to the reference and timed side by side. "
        "The quickest setting that is as good as the best goes into the run's sampling.json, and `ddpm sample` uses it from then on."
    )
    made = flags.Parser("sweep", "RUN|CHECKPOINT [flags]", about, EXAMPLES)
    made.add_argument("source", metavar="SOURCE", help="a run folder or a checkpoint")
    own, kept = made.own, "as the checkpoint has it"
    own.add_argument(
        "--samplers",
        default=SAMPLERS,
        metavar="'A B ...'",
        help=f"sampler specs with spaces between; one that names its steps= is tried as it is (default: {SAMPLERS})",
    )
    own.add_argument(
        "--evaluations",
        default="5,10,20,50",
        metavar="N,N,...",
        help="network evaluations an image that the others may take, not counting those that guidance adds (default: 5,10,20,50)",
    )
    own.add_argument(
        "--baseline",
        default="ddpm",
        metavar="SPEC|none",
        help="what they are compared with; without steps=, at every timestep (default: ddpm)",
    )
    own.add_argument(
        "--num-images",
        type=flags.whole(2),
        default=1000,
        metavar="N",
        help="images judged in each cell (default: 1000)",
    )
    own.add_argument("--rounds", type=flags.whole(1), default=3, metavar="N", help="rounds of timing (default: 3)")
    own.add_argument(
        "--reference", metavar="DATASET|FOLDER|NPZ", help="what to compare with (default: the data of the run)"
    )
    add_extractor(made)
    flags.add_field(made, "seed", "--seed")
    flags.add_field(made, "sample.guidance", "--guidance", kept)
    flags.add_field(made, "diffusion.thresholding", "--thresholding", kept)
    flags.add_field(made, "sample.chunk", "--chunk", kept)
    own.add_argument(
        "--ema",
        metavar="NAME|none",
        help="which average of the weights; none: the weights themselves (default: the first)",
    )
    own.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: sweep in the run's folder)"
    )
    own.add_argument(
        "--trust-code", action="store_true", help="run the code from outside ddpm (module:Class) that the run names"
    )
    flags.add_field(made, "runtime.device", "--device")
    flags.add_field(made, "runtime.precision", "--precision")
    own.add_argument(
        "--processes",
        type=flags.whole(1, 4096),
        default=1,
        metavar="N",
        help="processes on this machine that share the drawing, one for each GPU (timing is by one)",
    )
    return made


def _words(text: str, flag: str) -> tuple[str, ...]:
    words = tuple(text.split())
    if not words:
        raise ConfigError(f"{flag} is empty; write sampler specs with spaces between, such as {flag} 'ddim dpm++2m'.")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--evaluations={text!r} is wrong: write whole numbers with commas between, such as 5,10,20,50."
        ) from None
