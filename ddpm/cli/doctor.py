"""`ddpm doctor`: what is wrong with this machine, by `ddpm.doctor`; with a run's samples, by `ddpm.runs.diagnose`.

The machine is not looked at by way of `ddpm.runs`, which cannot be imported where torch is what is broken.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ddpm.cli import flags
from ddpm.errors import ConfigError

EXAMPLES = (
    ("ddpm doctor", "this machine: one line a finding; exit code 2 if something is broken"),
    ("ddpm doctor runs/digits", "why are the samples bad? one line a finding, doctor.png and doctor.json"),
    ("ddpm doctor runs/digits --sampler ddim:steps=10 --thresholding none", "would they be, drawn so?"),
    ("ddpm doctor runs/birds --reference photos/", "against the images that it should have learnt"),
)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The arguments of `runs.diagnose`."""

    source: str
    reference: str | None = None
    num_images: int = 64
    seed: int = 0
    sampler: str | None = None
    guidance: float | str | None = None
    thresholding: str | None = None
    ema: str | None = None
    chunk: int | None = None
    out: Path | None = None
    device: str = "auto"
    precision: str = "auto"


def run(argv: Sequence[str]) -> int:
    """Print the findings. Those about a run are the work asked for, and no failure: the code is 0."""
    options = parse_doctor(argv)
    if options is None:
        return _machine()
    from ddpm import runs
    from ddpm.runs.loading import trusting

    with trusting() if parser().parse(argv).trust_code else nullcontext():
        runs.diagnose(**vars(options))
    return 0


def _machine() -> int:
    from ddpm import doctor
    from ddpm.console import Console

    findings = doctor.check_environment()
    for finding in findings:
        Console().info(f"{finding.level:8} {finding}")
    return ConfigError.exit_code if any(finding.level == "error" for finding in findings) else 0


def parse_doctor(argv: Sequence[str]) -> DoctorOptions | None:
    """The words after `ddpm doctor`; None for the machine. Raises ConfigError."""
    given = parser().parse(argv)
    if given.source is None:
        if words := [word for word in argv if word != "--debug"]:
            raise ConfigError(f"{words[0]} is about a run, so name one: ddpm doctor runs/NAME {words[0]} ...")
        return None
    settings = flags.build([], given.typed)
    typed = given.typed.values
    return DoctorOptions(
        source=given.source,
        reference=given.reference,
        num_images=given.num_images,
        seed=settings.seed,
        sampler=settings.sample.sampler if "sample.sampler" in typed else None,
        guidance=settings.sample.guidance if "sample.guidance" in typed else None,
        thresholding=settings.diffusion.thresholding if "diffusion.thresholding" in typed else None,
        ema=given.ema,
        chunk=settings.sample.chunk if "sample.chunk" in typed else None,
        out=given.out,
        device=settings.runtime.device,
        precision=settings.runtime.precision,
    )


def parser() -> flags.Parser:
    """Flags of the verb."""
    about = (
        "Without a run, check this machine and installation: versions, devices, optional packages, free space. With one, find out why its "
        "samples are bad: the network is tried on real images and on images that it draws, and each finding is one sentence with "
        "what to do. What is found about a run is no failure of the command."
    )
    made = flags.Parser("doctor", "[RUN|CHECKPOINT [flags]]", about, EXAMPLES)
    made.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a run or a checkpoint; without one, this machine is checked"
    )
    own, kept = made.own, "as the run has it"
    own.add_argument(
        "--reference",
        metavar="DATASET|FOLDER|NPZ",
        help="the images that the model should have learnt (default: those it was trained on)",
    )
    own.add_argument(
        "--num-images", type=flags.whole(16), default=64, metavar="N", help="images that are drawn (default: 64)"
    )
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
    own.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for doctor.json and doctor.png (default: the run's; doctor)"
    )
    own.add_argument(
        "--trust-code", action="store_true", help="run the code from outside ddpm (module:Class) that the run names"
    )
    flags.add_field(made, "runtime.device", "--device")
    flags.add_field(made, "runtime.precision", "--precision")
    return made
