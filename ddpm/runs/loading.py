"""Trained models from run folders and checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ddpm import checkpoint, files, rundir
from ddpm.config import RunConfig
from ddpm.console import Console
from ddpm.errors import CheckpointError, ConfigError
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.registry import outside_code
from ddpm.rundir import RunDir
from ddpm.runs import foreign
from ddpm.training.trainer import load_weights

_TRUSTING = ContextVar("trusting", default=False)


@dataclass(frozen=True)
class Model:
    """A trained model and what it needs to draw.

    diffusion: in eval mode, on the CPU until it is placed; config: of its run; classes: their names;
    step: optimizer steps behind it; weights: which ones ("ema-0.999" or "model"); source: where it was read;
    recommended: what `ddpm sweep` wrote into the run's sampling.json, None where it has not been run.
    """

    diffusion: GaussianDiffusion
    config: RunConfig
    classes: tuple[str, ...]
    step: int
    weights: str
    source: Path
    recommended: Mapping[str, Any] | None = None

    @cached_property
    def weights_sha256(self) -> str:
        """Checksum of the file that the weights were read from."""
        own = self.source / f"{self.weights}.safetensors"
        return files.sha256(own) if own.is_file() else foreign.fingerprint(self.source)


@contextmanager
def trusting() -> Iterator[None]:
    """Within it, `load` imports what checkpoints name, as with trust_code=True."""
    token = _TRUSTING.set(True)
    try:
        yield
    finally:
        _TRUSTING.reset(token)


def load(
    source: str | Path,
    ema: str | None = None,
    warn: Callable[[str], None] | None = None,
    trust_code: bool = False,
) -> Model:
    """A trained model from a run folder, a checkpoint folder, or a checkpoint of another program.

    Args:
        source: runs/NAME, or runs/NAME/checkpoints/step-N; or a foreign file or folder (docs/compatibility.md).
        ema: which moving average's weights, by name ("0.999"); None: the run's first; "none": the raw weights.
        warn: told of damaged checkpoints that were passed over; default: a line on standard error.
        trust_code: import the classes from outside the package (`module:Class`) that the run's config names; importing
            runs their code.

    Raises CheckpointError (missing, damaged), ConfigError (no such average; outside code that is not trusted).
    """
    if is_foreign(Path(source)):
        return _load_foreign(Path(source), ema, warn or Console().warn)
    found = find_checkpoint(Path(source), warn or Console().warn)
    weights = _weights_name(found.path, found.emas, ema)
    settings = found.config()
    trusted = trust_code or _TRUSTING.get()
    if not trusted:
        _refuse_outside_code(settings, found.path)
    recommended = _recommendation(found.path, trusted)
    shape = found.state["shape"]
    model = build_diffusion(
        settings.model,
        settings.diffusion,
        (shape[0], shape[1], shape[2]),
        len(found.state["classes"]),
        augment=settings.data.augment,
    )
    load_weights(model, found.tensors(weights))
    model.eval().requires_grad_(False)
    return Model(model, settings, tuple(found.state["classes"]), found.step, weights, found.path, recommended)


def is_foreign(source: Path) -> bool:
    """Whether it is a file or a folder of another program, and neither a run nor a checkpoint of ours."""
    try:
        return foreign.is_foreign(source)
    except (OSError, ValueError):  # no name of a file
        return False


def _load_foreign(source: Path, ema: str | None, warn: Callable[[str], None]) -> Model:
    _, snapshot = foreign.read(source)
    weights = _weights_name(source, [*snapshot.emas], ema)
    settings = foreign.settings_of(snapshot, source)
    tensors = snapshot.weights if weights == "model" else snapshot.emas[weights.removeprefix("ema-")]
    for note in snapshot.notes:
        warn(f"{source}: {note}")
    diffusion = foreign.model_of(snapshot, settings, tensors, source)
    return Model(diffusion, settings, snapshot.classes, snapshot.step, weights, source)


def _recommendation(path: Path, trusted: bool) -> dict[str, Any] | None:
    """The sampling.json of a checkpoint's run; raises CheckpointError where it cannot be used, ConfigError as above."""
    place = RunDir(path.parent.parent).sampling
    if path.parent.name != "checkpoints" or not place.exists():
        return None
    held = rundir.read_json(place)
    if not isinstance(held, dict):
        raise CheckpointError(f"{place}: cannot be read as a JSON object; remove it, or write it anew by `ddpm sweep`.")
    if not isinstance(held.get("sampler"), str):
        raise CheckpointError(f"{place}: has no 'sampler'; remove it, or write it anew by `ddpm sweep`.")
    specs = [str(held.get(option, "")) for option in ("sampler", "guidance", "thresholding")]
    if not trusted and (named := [name for spec in specs for name in outside_code(spec)]):
        raise ConfigError(f"{place} names code from outside ddpm, {named[0]}; if you trust it, pass --trust-code.")
    return held


def _refuse_outside_code(settings: RunConfig, path: Path) -> None:
    """Raise ConfigError where building from the config would import code that does not belong to the package."""
    network, diffusion = settings.model.network, settings.diffusion
    specs = [value for value in diffusion.model_dump().values() if isinstance(value, str)] + [settings.sample.sampler]
    specs += [str(settings.sample.guidance), settings.data.dataset, settings.data.augment, *settings.train.ema]
    named = [network] if ":" in network else []
    named += [name for spec in specs for name in outside_code(spec)]
    if named:
        raise ConfigError(
            f"{path}: its config names code from outside ddpm, {named[0]}, and loading it would run that code; "
            f"if you trust it, pass --trust-code (from Python trust_code=True)."
        )


def _weights_name(source: Path, emas: list[str], ema: str | None) -> str:
    if ema == "none" or (ema is None and not emas):
        return "model"
    name = emas[0] if ema is None else ema.removeprefix("ema-")
    if name not in emas:
        known = ", ".join([*emas, "none"])
        raise ConfigError(f"--ema {ema}: {source} holds no such moving average; choose from {known}.")
    return f"ema-{name}"


def find_checkpoint(source: Path, warn: Callable[[str], None]) -> checkpoint.Checkpoint:
    """The checkpoint that a run folder or a checkpoint folder stands for; raises CheckpointError."""
    try:
        return _find_checkpoint(source, warn)
    except OSError as error:
        raise CheckpointError(
            f"{source}: cannot be read ({error.strerror}); give a run folder or a checkpoint in it."
        ) from None


def _find_checkpoint(source: Path, warn: Callable[[str], None]) -> checkpoint.Checkpoint:
    if (source / checkpoint.MANIFEST).exists():
        return checkpoint.load(source)
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = checkpoint.latest(folder, warn)
    if found is not None:
        return found
    if checkpoint.listing(folder):
        raise CheckpointError(f"{source}: none of its checkpoints is whole.")
    if not source.exists():
        raise CheckpointError(
            f"{source}: does not exist; give a run folder, such as runs/digits, or a checkpoint in it."
        )
    raise CheckpointError(
        f"{source}: holds no checkpoint; give a run folder, such as runs/digits, or a checkpoint in it."
    )
