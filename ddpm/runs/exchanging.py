"""`ddpm import` and `ddpm export`: another program's checkpoint as a run that training goes on from, and the way back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm import checkpoint, config
from ddpm.checkpoint import Checkpoint
from ddpm.config import RunConfig
from ddpm.console import Console
from ddpm.errors import ConfigError, DataError
from ddpm.formats import Format, Snapshot
from ddpm.rundir import RunDir
from ddpm.runs.foreign import NETWORK, fingerprint, model_of, read, settings_of, with_prefix
from ddpm.runs.loading import find_checkpoint


def import_checkpoint(
    source: str | Path, run_dir: str | Path, *, spec: str | None = None, changes: Mapping[str, Any] = {}
) -> Path:
    """Make a run of a foreign checkpoint: `ddpm train --run-dir` goes on from it, with its optimizer where it has one.

    Args:
        source: the file, or the folder.
        run_dir: a new folder.
        spec: the format with its options, such as "pytorch-ddpm:beta_T=0.01"; None: found by the contents.
        changes: nested fields of the config that are to be others than the file says.

    Returns:
        The folder of the checkpoint.

    Raises CheckpointError, ConfigError, DataError (the folder holds something).
    """
    say, path, run = Console(), Path(source), RunDir(Path(run_dir))
    form, snapshot = read(path, spec)
    settings = settings_of(snapshot, path, changes)
    model_of(snapshot, settings, snapshot.weights, path)
    facts = {"format": form.spec, "file": path.name, "sha256": fingerprint(path)}
    run.create()
    with run.lock():
        if run.config.exists() or checkpoint.listing(run.checkpoints):
            raise DataError(f"--run-dir {run.path}: holds a run already; choose another --name.")
        tensors = _tensors(snapshot)
        saved = checkpoint.save(
            run.checkpoints, snapshot.step, tensors, {**_state(snapshot, settings), "imported": facts}, settings
        )
        run.write_config(settings)
        run.event("imported", step=snapshot.step, **facts)
    for note in snapshot.notes:
        say.info(f"{path}: {note}")
    say.info(
        f"{saved}: step {snapshot.step} of {form.title}'s {path.name}; draw with ddpm sample {run.path}, go on with "
        f"ddpm train --run-dir {run.path}."
    )
    return saved


def _tensors(snapshot: Snapshot) -> dict[str, dict[str, Tensor]]:
    return {
        "model": with_prefix(snapshot.weights),
        **{f"ema-{name}": with_prefix(weights) for name, weights in snapshot.emas.items()},
        "optimizer": with_prefix(snapshot.optimizer),
        "state": {"metrics.sums": torch.zeros(3, dtype=torch.float64)},
    }


def _state(snapshot: Snapshot, settings: RunConfig) -> dict[str, Any]:
    """What a run would have written beside the tensors; the images it saw are not known, nor the machine."""
    return {
        "images": snapshot.step * settings.train.batch_size,
        "skipped": 0,
        "micro_batch": settings.train.batch_size,
        "emas": list(snapshot.emas),
        "ema_updates": [snapshot.step] * len(snapshot.emas),
        "processes": 1,
        "shape": list(snapshot.shape),
        "classes": list(snapshot.classes),
        "data": {"name": settings.data.dataset, "images": 0, "fingerprint": None},
    }


def snapshot_of(found: Checkpoint, ema: str | None = None) -> Snapshot:
    """A checkpoint of ours in the terms of formats; `ema`: the average that goes first, "none" for the raw weights alone.

    Raises ConfigError: no such average.
    """
    settings, shape = found.config(), found.state["shape"]
    names = [name for name in found.emas if ema is None or name == ema.removeprefix("ema-")]
    if ema not in (None, "none") and not names:
        raise ConfigError(
            f"--ema {ema}: {found.path} holds no such average; choose from {', '.join(found.emas)}, none."
        )
    train = settings.train
    return Snapshot(
        model=settings.model,
        diffusion=settings.diffusion,
        shape=(shape[0], shape[1], shape[2]),
        classes=tuple(found.state["classes"]),
        weights=_network(found.tensors("model")),
        emas={name: _network(found.tensors(f"ema-{name}")) for name in names},
        optimizer=_network(found.tensors("optimizer")),
        step=found.step,
        sampler=settings.sample.sampler,
        data={"dataset": settings.data.dataset, "flip": settings.data.flip},
        train={name: getattr(train, name) for name in ("lr", "betas", "adam_eps", "weight_decay", "steps")},
    )


def _network(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(NETWORK): value for name, value in tensors.items() if name.startswith(NETWORK)}


def export_checkpoint(source: str | Path, out: str | Path, *, spec: str, ema: str | None = None) -> Path:
    """Write a checkpoint of ours in a foreign format.

    Args:
        source: a run folder, or a checkpoint in it.
        out: the file, or the folder.
        spec: the format with its options.
        ema: the average that goes first; None: the run's own order; "none": the raw weights.

    Raises ConfigError (the format cannot hold it), CheckpointError, DataError (it stands already, or cannot be written).
    """
    say, form, path = Console(), Format.parse(spec), Path(out)
    if path.exists():
        raise DataError(f"--out {path}: is there already; choose another name.")
    found = find_checkpoint(Path(source), say.warn)
    form.save(snapshot_of(found, ema), path)
    say.info(f"{path}: step {found.step} of {found.path.parent.parent}, as {form.title} reads it.")
    return path


def describe(source: Path) -> None:
    """Print what a foreign checkpoint is; raises CheckpointError."""
    say = Console()
    form, snapshot = read(source)
    settings = settings_of(snapshot, source)
    rows = [
        ("program", form.title),
        ("sha256", fingerprint(source)),
        ("step", f"{snapshot.step:,}" if snapshot.step else "not known"),
        ("image", " x ".join(map(str, snapshot.shape))),
        ("classes", ", ".join(snapshot.classes) or "none"),
        ("parameters", f"{sum(tensor.numel() for tensor in snapshot.weights.values()):,}"),
        ("moving averages", ", ".join(snapshot.emas) or "none"),
        ("optimizer", "with its state" if snapshot.optimizer else "none"),
    ]
    say.table(str(source), ("what", "value"), rows)
    fields = config.flatten(settings.model_dump(mode="json"))
    say.table("config", ("field", "value"), [(name, str(value)) for name, value in fields.items()])
    for note in snapshot.notes:
        say.info(note)
