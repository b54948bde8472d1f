"""Checkpoints of other programs, read and made into models."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm import checkpoint, config, files
from ddpm.config import RunConfig
from ddpm.errors import CheckpointError, DDPMError
from ddpm.formats import Format, Snapshot, Source, identify
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.training.trainer import load_weights

NETWORK = "network."
"""What our checkpoints put before the names of a network's tensors."""


def is_foreign(source: Path) -> bool:
    """Whether it is a file, or a folder of another program; raises CheckpointError where its kind cannot be told."""
    if not source.is_dir():
        return source.is_file()
    ours = (source / checkpoint.MANIFEST, source / "checkpoints", source / "config.yaml")
    if any(place.exists() for place in ours) or checkpoint.listing(source):
        return False
    return any(found().matches(Source(source)) for found in Format.registered.values())  # type: ignore[attr-defined]


def read(path: Path, spec: str | None = None) -> tuple[Format, Snapshot]:
    """A foreign checkpoint and its format, found by its contents unless a spec names it.

    Raises CheckpointError (damaged, not of tensors and plain values, another architecture), ConfigError (the spec).
    """
    source = Source(path)
    form = None if spec is None else Format.parse(spec)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; give a file of another program.")
    try:
        form = identify(source) if form is None else form
        return form, form.load(source)
    except DDPMError:
        raise
    except Exception as error:  # what a file holds is anybody's guess
        title = "a known program" if form is None else form.title
        raise CheckpointError(
            f"{path}: its contents are not those of {title} ({type(error).__name__}: {files.reason(error)})."
        ) from None


def settings_of(snapshot: Snapshot, source: Path, changes: Mapping[str, Any] = {}) -> RunConfig:
    """The config of a run that would have made it; raises ConfigError."""
    return config.build(config.merge(snapshot.fields(), changes), str(source))


def model_of(snapshot: Snapshot, settings: RunConfig, weights: Mapping[str, Tensor], source: Path) -> GaussianDiffusion:
    """The model with the given weights, in eval mode; raises CheckpointError that names the first misfit."""
    model = build_diffusion(settings.model, settings.diffusion, snapshot.shape, len(snapshot.classes))
    try:
        load_weights(model, with_prefix(weights))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return model.eval().requires_grad_(False)


def with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors by their names in our checkpoints."""
    return {NETWORK + name: tensor for name, tensor in tensors.items()}


def fingerprint(source: Path) -> str:
    """SHA-256 of a file; of a folder, that of the list of its files and theirs. Raises DataError."""
    if source.is_file():
        return files.sha256(source)
    inside = sorted(path for path in source.rglob("*") if path.is_file())
    listed = "".join(f"{files.sha256(path)}  {path.relative_to(source)}\n" for path in inside)
    return hashlib.sha256(listed.encode()).hexdigest()
