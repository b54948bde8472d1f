"""`ddpm data` and `ddpm info`: what is there."""

from pathlib import Path

import numpy as np

from ddpm import checkpoint, files, images, rundir
from ddpm.config import DataConfig, flatten
from ddpm.console import Console, human_count
from ddpm.data import ImageSet, load_dataset
from ddpm.data.places import cache_root
from ddpm.models import build_diffusion
from ddpm.rundir import RunDir
from ddpm.runs import exchanging, loading
from ddpm.runs.loading import find_checkpoint
from ddpm.runs.recording import show as show_evaluation

PER_CLASS = 10


def data_info(settings: DataConfig, sheet: Path | None = None) -> ImageSet:
    """Print what a data set holds; draw some of each class to `sheet` (default: into the cache folder). Raises ConfigError, DataError."""
    say = Console()
    with say.counting("reading", "files") as progress:
        data = load_dataset(settings, progress)
    channels, height, width = data.shape
    rows = [
        ("images", f"{len(data):,}"),
        ("size", f"{height} x {width}"),
        ("colours", "grey" if channels == 1 else "RGB"),
    ]
    rows += [("classes", str(data.num_classes) if data.num_classes else "none"), ("left out", str(len(data.skipped)))]
    say.table(data.name, ("what", "value"), rows)
    if data.labels is not None:
        counts = np.bincount(data.labels, minlength=data.num_classes)
        say.table(
            "classes", ("label", "class", "images"), [(k, name, int(counts[k])) for k, name in enumerate(data.classes)]
        )
    for note in data.notes:
        say.info(note)
    if data.skipped:
        say.table("left out", ("file", "reason"), [(s.path, s.reason) for s in data.skipped[:50]])
    sheet = sheet or cache_root() / "sheets" / f"{data.name.replace('/', '-')}.png"
    images.save_png(sheet, contact_sheet(data))
    say.info(f"a sheet of some images: {sheet}")
    return data


def data_prepare(settings: DataConfig, sheet: Path | None = None) -> ImageSet:
    """Fetch, check and decode a data set, so that training starts at once; then say what it holds."""
    return data_info(settings, sheet)


def contact_sheet(data: ImageSet) -> images.Pixels:
    """A grid of the first images, a row a class where there are classes (at most 20 of them): uint8 (C, H, W)."""
    if data.labels is None:
        return images.grid(np.asarray(data.images[: PER_CLASS**2]), PER_CLASS)
    blank = np.full(data.shape, 255, np.uint8)
    rows = []
    for label in range(min(data.num_classes, 20)):
        members = np.flatnonzero(data.labels == label)[:PER_CLASS]
        rows += [*data.images[members], *[blank] * (PER_CLASS - len(members))]
    return images.grid(np.stack(rows), PER_CLASS)


def info(source: str | Path, trust_code: bool = False) -> None:
    """Print what a run folder, a checkpoint or another program's file is; builds and imports nothing unless `trust_code` is given.

    trust_code: count the parameters on the network itself, importing what the config names, and not in the file.

    Raises CheckpointError; ConfigError with `trust_code`, where the outside code cannot be imported.
    """
    say = Console()
    if loading.is_foreign(Path(source)):
        exchanging.describe(Path(source))
        return
    found = find_checkpoint(Path(source), say.warn)
    settings = found.config()
    shape = tuple(found.state["shape"])
    parameters = _count_built(found) if trust_code else found.parameters()
    run = RunDir(found.path.parent.parent)
    rows = [
        ("checkpoint", str(found.path)),
        ("step", f"{found.step:,} of {settings.train.steps:,}"),
        ("images seen", human_count(found.state["images"])),
        ("image", " x ".join(map(str, shape))),
        ("classes", ", ".join(found.state["classes"]) or "none"),
        ("parameters", f"{parameters:,}"),
        ("moving averages", ", ".join(found.emas) or "none"),
        ("data", f"{found.state['data']['name']}, {found.state['data']['images']:,} images"),
        ("checkpoints", ", ".join(path.name for path in reversed(checkpoint.listing(run.checkpoints))) or "this one"),
    ]
    if metrics := rundir.read_jsonl(run.metrics):
        rows.append(("last loss", f"{metrics[-1].get('loss', float('nan')):.4f} at step {metrics[-1]['step']}"))
    if imported := found.state.get("imported"):
        rows.append(("imported from", f"{imported['file']}, {imported['format']}, sha256 {imported['sha256']}"))
    rows.append(("evaluations", str(len(rundir.read_jsonl(run.evaluations)) or "none")))
    weights = ["model", *(f"ema-{name}" for name in found.emas)]
    rows += [(f"sha256 of {name}", files.sha256(found.path / f"{name}.safetensors")) for name in weights]
    say.table(str(source), ("what", "value"), rows)
    for record in rundir.read_jsonl(run.evaluations):
        show_evaluation(record, say)
    say.table(
        "config",
        ("field", "value"),
        [(name, str(value)) for name, value in flatten(settings.model_dump(mode="json")).items()],
    )


def _count_built(found: checkpoint.Checkpoint) -> int:
    settings, shape = found.config(), tuple(found.state["shape"])
    model = build_diffusion(
        settings.model, settings.diffusion, shape, len(found.state["classes"]), augment=settings.data.augment
    )
    return sum(p.numel() for p in model.parameters())
