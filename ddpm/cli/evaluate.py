"""`ddpm evaluate`: how good a model or a set of images is, by `runs.evaluate` or `runs.likelihood`."""

from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ddpm.cli import flags
from ddpm.cli.sample import GUIDANCE
from ddpm.cli.stats import add_extractor
from ddpm.config import RunConfig
from ddpm.errors import ConfigError

EXAMPLES = (
    ("ddpm evaluate runs/digits", "draw images and compare them with those trained on"),
    ("ddpm evaluate runs/cifar10 --num-images 50000 --metrics fd,is --processes 4", "FID as papers have it"),
    ("ddpm evaluate samples/ --reference photos/", "two folders of images"),
    ("ddpm evaluate samples.npz --reference cifar10.npz", "images against statistics of `ddpm stats`"),
    ("ddpm evaluate runs/digits --likelihood", "bits per dimension of held-out images, by the variational bound"),
    ("ddpm evaluate runs/digits --likelihood --estimator ode:repeats=4", "the same by the probability-flow ODE"),
)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The arguments of `runs.evaluate`."""

    source: str
    reference: str | None = None
    num_images: int | None = None
    metrics: list[str] | None = None
    extractor: str | None = None
    weights: Path | None = None
    seed: int = 0
    sampler: str | None = None
    guidance: float | str | None = None
    thresholding: str | None = None
    ema: str | None = None
    splits: int = 10
    quantise: bool = True
    chunk: int | None = None
    out: Path | None = None
    device: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions:
    """The arguments of `runs.likelihood`."""

    source: str
    estimators: tuple[str, ...] = ("vlb",)
    num_images: int | None = None
    split: str | None = None
    reference: str | None = None
    seed: int = 0
    thresholding: str | None = None
    ema: str | None = None
    chunk: int | None = None
    out: Path | None = None
    device: str = "auto"
    precision: str = "auto"


def run(argv: Sequence[str]) -> int:
    """Evaluate; the numbers do not depend on how many processes there are."""
    options, processes = parse_evaluate(argv)
    if processes > 1 and not flags.in_a_group(f"--processes={processes}"):
        from ddpm.distributed import launch_processes

        return launch_processes(["evaluate", *flags.without(argv, "--processes")], processes)
    from ddpm import runs
    from ddpm.runs.loading import trusting

    with trusting() if parser().parse(argv).trust_code else nullcontext():
        verb = runs.likelihood if isinstance(options, LikelihoodOptions) else runs.evaluate
        verb(**vars(options))
    return 0


def parse_evaluate(argv: Sequence[str]) -> tuple[EvaluateOptions | LikelihoodOptions, int]:
    """The words after `ddpm evaluate` as options and a number of processes; raises ConfigError."""
    given = parser().parse(argv)
    settings = flags.build([], given.typed)
    if given.likelihood:
        return _likelihood(given, settings), given.processes
    for flag in ("estimator", "split"):
        if getattr(given, flag) is not None:
            raise ConfigError(f"--{flag} is for --likelihood; add that, or leave it out.")
    return _evaluate(given, settings), given.processes


def _likelihood(given: Namespace, settings: RunConfig) -> LikelihoodOptions:
    typed = given.typed.values
    unused = [f"--{name}" for name in ("metrics", "extractor", "weights", "splits") if getattr(given, name) is not None]
    unused += [flag for field, flag in given.typed.spelling.items() if field in ("sample.sampler", "sample.guidance")]
    if unused or not given.quantise:
        raise ConfigError(f"{(unused or ['--no-quantise'])[0]} is not used by --likelihood; leave it out.")
    return LikelihoodOptions(
        source=given.source,
        estimators=tuple(given.estimator or ("vlb",)),
        num_images=given.num_images,
        split=given.split,
        reference=given.reference,
        seed=settings.seed,
        thresholding=settings.diffusion.thresholding if "diffusion.thresholding" in typed else None,
        ema=given.ema,
        chunk=settings.sample.chunk if "sample.chunk" in typed else None,
        out=given.out,
        device=settings.runtime.device,
        precision=settings.runtime.precision,
    )


def _evaluate(given: Namespace, settings: RunConfig) -> EvaluateOptions:
    typed = given.typed.values
    return EvaluateOptions(
        source=given.source,
        reference=given.reference,
        num_images=given.num_images,
        metrics=_metrics(given.metrics),
        extractor=given.extractor,
        weights=given.weights,
        seed=settings.seed,
        sampler=settings.sample.sampler if "sample.sampler" in typed else None,
        guidance=settings.sample.guidance if "sample.guidance" in typed else None,
        thresholding=settings.diffusion.thresholding if "diffusion.thresholding" in typed else None,
        ema=given.ema,
        splits=10 if given.splits is None else given.splits,
        quantise=given.quantise,
        chunk=settings.sample.chunk if "sample.chunk" in typed else None,
        out=given.out,
        device=settings.runtime.device,
        precision=settings.runtime.precision,
    )


def parser() -> flags.Parser:
    """Flags of the verb."""
    about = (
        "Judge a model, or images, against a reference: Frechet and kernel distance, Inception Score, precision and recall, by class, "
        "and whether training images were memorised; or the likelihood of real images under a model. Each number comes with its interval "
        "and its protocol."
    )
    made = flags.Parser("evaluate", "RUN|CHECKPOINT|FOLDER|NPZ [flags]", about, EXAMPLES, GUIDANCE)
    made.add_argument(
        "source",
        metavar="SOURCE",
        help="a run or a checkpoint, a folder of images, an .npz file of images or of statistics",
    )
    own, kept = made.own, "as the checkpoint has it"
    own.add_argument(
        "--reference",
        metavar="DATASET|FOLDER|NPZ",
        help="what to compare with, or to measure the likelihood of (default: the data of the run)",
    )
    own.add_argument(
        "--num-images",
        type=flags.whole(1),
        metavar="N",
        help="how many (default: --evaluate.num-images of the run; all of a folder)",
    )
    own.add_argument(
        "--metrics", metavar="A,B,...", help="of fd,kid,is,pr,classes,memorisation (default: all that can be had)"
    )
    own.add_argument(
        "--likelihood",
        action="store_true",
        help="bits per dimension of real images under the model instead, with the terms they are made of",
    )
    own.add_argument(
        "--estimator",
        action="append",
        metavar="SPEC",
        help="of likelihood: vlb (variational bound; vlb:timesteps=none takes every timestep), ode (probability-flow ODE; "
        "ode:repeats=4 averages four noises); give the flag once for each (default: vlb)",
    )
    own.add_argument(
        "--split",
        choices=("train", "test", "all"),
        metavar="train|test|all",
        help="of likelihood: the part of the run's data (default: the part that was not trained on)",
    )
    add_extractor(made)
    flags.add_field(made, "seed", "--seed")
    flags.add_field(made, "sample.sampler", "--sampler", kept)
    flags.add_field(made, "sample.guidance", "--guidance", kept)
    flags.add_field(made, "diffusion.thresholding", "--thresholding", kept)
    flags.add_field(made, "sample.chunk", "--chunk", kept)
    own.add_argument(
        "--ema",
        metavar="NAME|none",
        help="which average of the weights; none: the weights themselves (default: the first)",
    )
    own.add_argument("--splits", type=flags.whole(1), metavar="N", help="splits of the Inception Score (default: 10)")
    own.add_argument(
        "--no-quantise",
        dest="quantise",
        action="store_false",
        help="score floats instead of 8-bit images, where the extractor takes them",
    )
    own.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for evaluations.jsonl (default: the run's; evaluations)"
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
        help="processes on this machine, one for each GPU",
    )
    return made


def _metrics(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--metrics={text!r} is wrong: write names with commas between, such as fd,kid.")
    return names
