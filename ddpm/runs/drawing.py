"""`ddpm sample`, and `ddpm.sample` in Python."""

import csv
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm import console, distributed, files, images, rundir, runtime, sampling
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.models import GaussianDiffusion
from ddpm.runs.loading import Model, load
from ddpm.samplers import Sampler, Thresholding

Pixels = NDArray[np.uint8]
SHOWN = 100
"""Images in grid.png, at most."""


@dataclass(frozen=True)
class SampleResult:
    """Where images went, how many, by which recipe, and the seconds it took."""

    out: Path
    num_images: int
    recipe: dict[str, Any]
    seconds: float


def sample(
    source: str | Path,
    *,
    num_images: int = 64,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    thresholding: str | None = None,
    ema: str | None = None,
    out: Path | None = None,
    png: bool = True,
    npz: bool = False,
    gif: bool = True,
    chunk: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = False,
) -> SampleResult:
    """Draw the images of seeds `seed` to `seed + num_images - 1` into a folder.

    Writes {seed:06d}.png (png), images.csv (labels), grid.png, trajectory.gif (gif), samples.npz with arr_0 (N, H, W, C)
    uint8 and arr_1 labels (npz), and recipe.json. What is not given is as the run recommends. A folder
    that holds images of another recipe is refused.

    Raises ConfigError, DataError, CheckpointError.
    """
    with distributed.join() as world:
        say = console.Console(quiet=quiet or not world.is_main)
        model = load(source, ema, say.warn if world.is_main else lambda text: None)
        machine = runtime.resolve(device, precision, processes=world.size, local_rank=world.local_rank)
        recipe = Recipe.of(model, machine, sampler, guidance, thresholding, chunk, labels)
        sampling.check_request(model.diffusion, recipe.labels, recipe.guidance)
        recipe.sampler.path(model.diffusion.schedule)
        seeds = range(seed, seed + num_images)
        if seeds.stop > 2**63 - recipe.chunk:
            raise ConfigError(f"--seed={seed}: seeds end at 2^63, so {num_images} images need a lower one.")
        written = recipe.written(model)
        target = out or _default_folder(model, written)
        if world.is_main:
            _claim(target, written)
        world.barrier()
        start = time.perf_counter()
        say.info(f"{model.source} ({model.weights}): {num_images} images by {recipe.sampler.spec}.")
        machine.place(model.diffusion)
        _draw_all(model, recipe, machine, seeds, target, world, say, png=png, npz=npz, gif=gif)
        seconds = time.perf_counter() - start
        say.info(f"{target}: {num_images} images in {console.human_duration(seconds)}; look at {target / 'grid.png'}.")
        return SampleResult(target, num_images, written, seconds)


@dataclass(frozen=True)
class Recipe:
    """All that decides an image beside its seed."""

    sampler: Sampler
    guidance: float
    labels: tuple[int, ...]
    chunk: int
    thresholding: Thresholding
    precision: str
    device: str

    @classmethod
    def of(
        cls,
        model: Model,
        machine: runtime.Runtime,
        sampler: str | Sampler | None,
        guidance: float | None,
        thresholding: str | None,
        chunk: int | None,
        labels: Sequence[str | int] | None,
    ) -> "Recipe":
        """What was asked, filled up with what the model's run recommends; raises ConfigError."""
        advice = model.config.sample
        return cls(
            Sampler.parse(sampler or advice.sampler),
            advice.guidance if guidance is None else guidance,
            tuple(class_index(str(label), model.classes) for label in labels or ()),
            chunk or advice.chunk,
            Thresholding.parse(model.diffusion.thresholding if thresholding in (None, "model") else thresholding),
            machine.precision,
            machine.device.type,
        )

    def written(self, model: Model) -> dict[str, Any]:
        """As it stands in recipe.json."""
        return {
            "weights_sha256": files.sha256(model.source / f"{model.weights}.safetensors"),
            "weights": model.weights,
            "step": model.step,
            "sampler": self.sampler.spec,
            "thresholding": self.thresholding.spec,
            "guidance": self.guidance,
            "labels": list(self.labels),
            "chunk": self.chunk,
            "precision": self.precision,
            "device": self.device,
        }


def class_index(label: str, classes: Sequence[str]) -> int:
    """A class by name or number; raises ConfigError."""
    if label in classes:
        return list(classes).index(label)
    try:
        return int(label)
    except ValueError:
        raise ConfigError(
            f"--labels: {label!r} is no class of this model; its classes: {', '.join(classes) or 'none'}."
        ) from None


def _default_folder(model: Model, recipe: dict[str, Any]) -> Path:
    """runs/NAME/samples/<sampler>-<step>-<digest of the recipe>: a folder for every recipe."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:6]
    home = model.source.parent.parent if model.source.parent.name == "checkpoints" else Path()
    return home / "samples" / f"{recipe['sampler'].partition(':')[0]}-{model.step:08d}-{digest}"


def _claim(target: Path, recipe: dict[str, Any]) -> None:
    """Make the folder ours: new, or holding images of this very recipe."""
    path = target / "recipe.json"
    try:
        held = rundir.read_json(path) if path.exists() else None
        if held is None and target.is_dir() and any(target.iterdir()):
            raise DataError(
                f"--out {target}: is not empty and was not written by `ddpm sample`; choose another folder."
            )
    except OSError as error:
        raise DataError(f"--out {target}: cannot be used ({files.reason(error)}); choose another place.") from None
    if held is not None and held != recipe:
        differs = next((key for key in recipe if not isinstance(held, dict) or held.get(key) != recipe[key]), "it")
        raise DataError(f"--out {target}: holds images of another recipe ({differs} differs); choose another folder.")
    rundir.write_json(path, recipe)


def _draw_all(
    model: Model,
    recipe: Recipe,
    machine: runtime.Runtime,
    seeds: range,
    target: Path,
    world: World,
    say: console.Console,
    *,
    png: bool,
    npz: bool,
    gif: bool,
) -> None:
    kept = len(seeds) if npz else min(len(seeds), SHOWN)
    with _Pool(target / ".pool.npy", (kept, *model.diffusion.shape), world) as pool:
        steps = recipe.sampler.count(model.diffusion.schedule)
        recorder = _Trajectory(seeds[0] // recipe.chunk % world.size == world.rank, steps) if gif else None
        with say.progress("sampling", len(seeds), "images") as bar:
            for part in _parts(model.diffusion, recipe, machine, seeds, world, recorder):
                for seed, image in zip(part.seeds, part.images, strict=True):
                    if png:
                        images.save_png(target / f"{seed:06d}.png", image)
                    if seed - seeds[0] < kept:
                        pool.array[seed - seeds[0]] = image
                if recorder is not None:
                    recorder.close(target / "trajectory.gif")
                bar.advance(len(part.seeds) * world.size)
        cycle = np.array(recipe.labels or range(model.diffusion.num_classes) or [0])
        labels = cycle[np.asarray(seeds) % len(cycle)]
        pool.sync()
        if world.is_main:
            if model.diffusion.num_classes:
                _write_table(target, seeds, labels, model.classes)
            columns = len(cycle) if 1 < len(cycle) <= 20 else None
            images.save_png(target / "grid.png", images.grid(np.asarray(pool.array[:SHOWN]), columns))
            if npz:
                _write_npz(target / "samples.npz", pool.array, labels if model.diffusion.num_classes else None)


def _parts(
    model: GaussianDiffusion,
    recipe: Recipe,
    machine: runtime.Runtime,
    seeds: Sequence[int],
    world: World,
    recorder: "_Trajectory | None" = None,
) -> Any:
    return sampling.generate(
        model,
        recipe.sampler,
        machine,
        seeds=seeds,
        labels=recipe.labels,
        guidance=recipe.guidance,
        chunk=recipe.chunk,
        thresholding=recipe.thresholding,
        world=world,
        on_step=recorder,
    )


class _Pool:
    """Images that processes on one file system put together, memory-mapped so that their number costs no memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], world: World) -> None:
        self.path, self.world = path, world
        try:
            if world.is_main:
                np.lib.format.open_memmap(path, "w+", np.uint8, shape).flush()
            world.barrier()
            self.array: Pixels = np.lib.format.open_memmap(path, "r+")
        except OSError as error:
            path.unlink(missing_ok=True)
            raise DataError(f"cannot write {path}: {files.reason(error)}; choose another --out.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The file is a means, not a result."""
        if self.world.is_main:
            self.path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Wait until every process has written its part."""
        self.array.flush()  # type: ignore[attr-defined]
        self.world.barrier()


class _Trajectory:
    """Frames of the first chunk on its way from noise to images, beside the x0 predicted at each step."""

    def __init__(self, active: bool, steps: int, frames: int = 40) -> None:
        self.active, self.last, self.stride = active, steps - 1, -(-steps // frames)
        self.taken: list[Pixels] = []

    def __call__(self, index: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        """Keep a frame of at most 16 images, at some of the steps and the last."""
        if self.active and (self.last - index) % self.stride == 0:
            pair = [images.grid(images.to_uint8(part[:16]).cpu().numpy()) for part in (x, x0)]
            gap = np.full((*pair[0].shape[:2], 8), 255, np.uint8)
            self.taken.append(np.concatenate([pair[0], gap, pair[1]], axis=2))

    def close(self, path: Path) -> None:
        """Write the GIF once, after the first chunk."""
        if self.active and self.taken:
            images.save_gif(path, self.taken, fps=12)
        self.active, self.taken = False, []


def _write_table(target: Path, seeds: range, labels: NDArray[np.int64], classes: Sequence[str]) -> None:
    """images.csv: a row a seed, those of earlier calls kept."""
    path, header = target / "images.csv", ["file", "seed", "label", "class"]
    rows: dict[int, list[Any]] = {}
    if path.exists():
        rows = {int(row[1]): row for row in list(csv.reader(path.read_text(encoding="utf-8").splitlines()))[1:]}
    for seed, label in zip(seeds, labels.tolist(), strict=True):
        rows[seed] = [f"{seed:06d}.png", seed, label, classes[label] if label >= 0 else ""]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *(rows[seed] for seed in sorted(rows))])
    files.write_text(path, table.getvalue())


def _write_npz(path: Path, pool: Pixels, labels: NDArray[np.int64] | None) -> None:
    """arr_0 (N, H, W, C) uint8 and arr_1 labels, streamed a block at a time."""
    n, channels, height, width = pool.shape
    with (
        files.atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, channels)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, n, 1000):
                file.write(np.ascontiguousarray(pool[start : start + 1000].transpose(0, 2, 3, 1)).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels)


def draw_images(
    model: Model | str | Path,
    seeds: Sequence[int] = range(16),
    *,
    labels: Sequence[int | str] = (),
    sampler: str | Sampler | None = None,
    guidance: float | None = None,
    chunk: int | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Pixels:
    """`ddpm.sample`: images of these seeds, uint8 (len(seeds), C, H, W), in the order of the seeds.

    Args:
        model: from `ddpm.load`, or a path that it takes.
        seeds: which images; non-negative.
        labels: classes by number or name, in turn by seed (image k has labels[k mod len]); empty: every class in turn.
        sampler, guidance, chunk: what is not given is as the model's run recommends.
        device, precision: the machine.

    Raises ConfigError, CheckpointError.
    """
    held = model if isinstance(model, Model) else load(model)
    machine = runtime.resolve(device, precision)
    machine.place(held.diffusion)
    recipe = Recipe.of(held, machine, sampler, guidance, None, chunk, labels)
    parts = _parts(held.diffusion, recipe, machine, seeds, World())
    by_seed = {int(seed): image for part in parts for seed, image in zip(part.seeds, part.images, strict=True)}
    return np.stack([by_seed[int(seed)] for seed in seeds])
