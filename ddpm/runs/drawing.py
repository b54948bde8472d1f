"""`ddpm sample`, and `ddpm.sample` in Python."""

import csv
import io
import math
import operator
import os
import re
import time
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm import config, console, distributed, files, images, randomness, runtime, sampling
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.guidance import Guidance
from ddpm.models import NO_LABEL, GaussianDiffusion
from ddpm.runs import folders
from ddpm.runs.guiding import Guide
from ddpm.runs.loading import Model, load
from ddpm.runs.trajectory import Trajectory
from ddpm.samplers import Sampler, Thresholding

Pixels = NDArray[np.uint8]
Labels = Sequence[str | int] | NDArray[Any] | torch.Tensor
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
    labels: Labels | None = None,
    guidance: float | str | Guidance | None = None,
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

    Writes {seed:06d}.png (png), images.csv (labels), grid.png, trajectory.gif and trajectory.png (gif), samples.npz with
    arr_0 (N, H, W, C) uint8, arr_1 labels and seeds (N,) int64 (npz), and recipe.json. What is not given is as the run
    recommends. A folder that holds images of another recipe is refused; in one that was begun with other seeds, grid,
    trajectory and samples are named by their seeds, such as grid-000064-000127.png. Several calls may write into one
    folder.

    Raises ConfigError, DataError, CheckpointError.
    """
    with distributed.join() as world:
        say = console.Console(quiet=quiet or not world.is_main)
        model = load(source, ema, say.warn if world.is_main else lambda text: None)
        machine = machine_of(device, precision, world)
        recipe = Recipe.of(model, machine, sampler, guidance, thresholding, chunk, labels)
        recipe.sampler.path(model.diffusion.schedule)
        seeds = seeds_from(seed, num_images)
        written = recipe.written(model)
        target = Path(out or folders.default(model, "samples", recipe.sampler.name, written))
        suffix = str(world.broadcast(folders.claim(target, "sample", written, seeds) if world.is_main else None))
        start = time.perf_counter()
        say.info(f"{model.source} ({model.weights}): {num_images} images by {recipe.sampler.spec}.")
        if sampler is None and model.recommended is not None:
            say.info(_why(model.recommended))
        machine.place(model.diffusion)
        _draw_all(model, recipe, machine, seeds, target, suffix, world, say, png=png, npz=npz, gif=gif)
        seconds = time.perf_counter() - start
        shown = target / f"grid{suffix}.png"
        say.info(f"{target}: {num_images} images in {console.human_duration(seconds)}; look at {shown}.")
        return SampleResult(target, num_images, written, seconds)


def _why(recommended: Mapping[str, Any]) -> str:
    """What sampling.json says for its sampler."""
    value, metric, evaluations = (recommended.get(name) for name in ("value", "metric", "evaluations"))
    measured = f" ({metric} {value:.4g} with {evaluations:g} network evaluations)" if value and evaluations else ""
    return f"this sampler is recommended by the run's sampling.json{measured}; another one by --sampler."


@dataclass(frozen=True)
class Recipe:
    """All that decides an image beside its seed."""

    sampler: Sampler
    guidance: Guide
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
        guidance: float | str | Guidance | None,
        thresholding: str | None,
        chunk: int | None,
        labels: Labels | None,
    ) -> "Recipe":
        """What was asked, filled up with what the model's run recommends; raises ConfigError.

        What a sweep found belongs to its sampler, so it counts where no sampler is asked for.
        """
        advice, held = model.config.sample, {} if sampler else model.recommended or {}
        chunk = advice.chunk if chunk is None else chunk
        sampling.check_chunk(chunk)
        if guidance is None:
            guidance = held.get("guidance", advice.guidance)
        if thresholding is None:
            thresholding = held.get("thresholding")
        guide = Guide.open(guidance, model.diffusion, model.classes, machine)
        numbers = class_indices(labels, guide.classes or model.classes)
        sampling.check_labels(model.diffusion, numbers, len(guide.classes))
        return cls(
            Sampler.parse(sampler or held.get("sampler") or advice.sampler),
            guide,
            numbers,
            int(chunk),
            Thresholding.parse(model.diffusion.thresholding if thresholding in (None, "model") else thresholding),
            machine.precision,
            machine.device.type,
        )

    def written(self, model: Model) -> dict[str, Any]:
        """As it stands in recipe.json."""
        return {
            "weights_sha256": model.weights_sha256,
            "weights": model.weights,
            "step": model.step,
            "sampler": self.sampler.spec,
            "thresholding": self.thresholding.spec,
            **self.guidance.written,
            "labels": list(self.labels),
            "chunk": self.chunk,
            "precision": self.precision,
            "device": self.device,
        }


def class_indices(labels: Labels | None, classes: Sequence[str]) -> tuple[int, ...]:
    """Classes by name or number, from any list of them; raises ConfigError."""
    given = labels.tolist() if isinstance(labels, np.ndarray | torch.Tensor) else () if labels is None else labels
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"labels={given!r} is wrong: give a list of classes, such as labels=[{given!r}].")
    return tuple(class_index(label, classes) for label in given)


def class_index(label: str | int, classes: Sequence[str]) -> int:
    """One class: an integer is its number; a text its name, "#" and its number, or its number alone; raises ConfigError.

    A number alone that is the name of another class is refused.
    """
    if isinstance(label, str):
        return _index_of_text(label, list(classes))
    try:
        if isinstance(label, bool):
            raise TypeError
        return operator.index(label)
    except TypeError:
        raise ConfigError(f"labels: {label!r} is no class; give numbers or names.") from None


def _index_of_text(label: str, classes: list[str]) -> int:
    number = re.fullmatch(r"(#?)(-?[0-9]{1,9})", label)
    if number and number[1]:
        return int(number[2])
    if label not in classes:
        if number:
            return int(number[2])
        raise ConfigError(
            f"--labels: {label!r} is no class of this model; its classes: {', '.join(classes) or 'none'}."
        )
    named = classes.index(label)
    if number and named != int(number[2]) and NO_LABEL <= int(number[2]) < len(classes):
        raise ConfigError(
            f"--labels: {label} is the name of class {named} and the number of another; "
            f"write '#{named}' for the class of that name, '#{number[2]}' for the other."
        )
    return named


def seeds_from(first: int, num_images: int) -> range:
    """Seeds of so many images; raises ConfigError."""
    if num_images < 1:
        raise ConfigError(f"--num-images={num_images} is wrong: it must be at least 1.")
    if first < 0:
        raise ConfigError(f"--seed={first} is wrong: it must be at least 0.")
    if first + num_images > randomness.SEEDS_END:
        raise ConfigError(f"--seed={first}: seeds end at 2^62, so {num_images} images need a lower one.")
    return range(first, first + num_images)


def machine_of(device: str, precision: str, world: World) -> runtime.Runtime:
    """The machine of this process; raises ConfigError."""
    wanted = config.build({"runtime": {"device": device, "precision": precision}}, "sample").runtime
    return runtime.resolve(wanted.device, wanted.precision, processes=world.size, local_rank=world.local_rank)


def _draw_all(
    model: Model,
    recipe: Recipe,
    machine: runtime.Runtime,
    seeds: range,
    target: Path,
    suffix: str,
    world: World,
    say: console.Console,
    *,
    png: bool,
    npz: bool,
    gif: bool,
) -> None:
    kept = len(seeds) if npz else min(len(seeds), SHOWN)
    with _Pool(target, (kept, *model.diffusion.shape), world) as pool:
        steps = recipe.sampler.count(model.diffusion.schedule)
        recorder = Trajectory(seeds[0] // recipe.chunk % world.size == world.rank, steps) if gif else None
        with say.progress("sampling", len(seeds), "images") as bar:
            for part in _parts(model.diffusion, recipe, machine, seeds, world, recorder):
                for seed, image in zip(part.seeds, part.images, strict=True):
                    if png:
                        images.save_png(target / f"{seed:06d}.png", image)
                    if seed - seeds[0] < kept:
                        pool.array[seed - seeds[0]] = image
                if recorder is not None:
                    recorder.close(target, suffix)
                bar.advance(len(part.seeds) * world.size)
        classes = recipe.guidance.classes
        cycle = np.array(recipe.labels or range(len(classes)) or [0])
        labels = cycle[np.asarray(seeds) % len(cycle)]
        pool.sync()
        if world.is_main:
            columns = len(cycle) if 1 < len(cycle) <= 20 else None
            with files.Lock(target / folders.LOCK, wait=True):
                if classes:
                    _write_table(target, seeds, labels, classes)
                images.save_png(target / f"grid{suffix}.png", images.grid(np.asarray(pool.array[:SHOWN]), columns))
                if npz:
                    of_image = {"arr_1": labels} if classes else {}
                    _write_npz(target / f"samples{suffix}.npz", pool.array, {**of_image, "seeds": np.asarray(seeds)})


def _parts(
    model: GaussianDiffusion,
    recipe: Recipe,
    machine: runtime.Runtime,
    seeds: Sequence[int],
    world: World,
    recorder: Trajectory | None = None,
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
    """Images that processes on one file system put together, memory-mapped so that their number costs no memory.

    The file has a name of its own in every call, and its space is reserved before it is mapped: a write into a map for
    which the disk has no room would end the process.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], world: World) -> None:
        self.path = folder / str(world.broadcast(f".pool-{uuid.uuid4().hex}.npy"))
        self.world = world
        try:
            if world.is_main:
                _reserve(self.path, shape)
            world.barrier()
            self.array: Pixels = np.lib.format.open_memmap(self.path, "r+")
        except OSError as error:
            self.__exit__()
            raise DataError(f"cannot write {self.path}: {files.reason(error)}; choose another --out.") from None
        except BaseException:
            self.__exit__()
            raise

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


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """An array file of zeros, uint8, whose space on the disk is taken."""
    with files.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), file.tell(), math.prod(shape))
        else:
            for _ in range(shape[0]):
                file.write(bytes(math.prod(shape[1:])))


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


def _write_npz(path: Path, pool: Pixels, others: dict[str, NDArray[np.int64]]) -> None:
    """arr_0 (N, H, W, C) uint8, streamed a block at a time, and other arrays of N numbers."""
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
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)


def draw_images(
    model: Model | str | Path,
    seeds: Sequence[int] | NDArray[Any] | torch.Tensor = range(16),
    *,
    labels: Labels = (),
    sampler: str | Sampler | None = None,
    guidance: float | str | Guidance | None = None,
    chunk: int | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Pixels:
    """`ddpm.sample`: images of these seeds, uint8 (len(seeds), C, H, W), in the order of the seeds.

    Args:
        model: from `ddpm.load`, or a path that it takes.
        seeds: which images; whole numbers from 0 to 2^62 - 1, at least one.
        labels: classes, in turn by seed (image k has labels[k mod len]), integers by number and texts as `class_index`
            reads them; -1 is no label; empty: every class in turn.
        sampler, guidance, chunk: what is not given is as the model's run recommends. Guidance is the weight of
            classifier-free guidance, a spec, or a component of `ddpm.guidance`.
        device, precision: the machine.

    Raises ConfigError, CheckpointError, DataError.
    """
    wanted = randomness.seed_array(seeds).tolist()
    if not wanted:
        raise ConfigError("seeds: is empty; give at least one seed, such as seeds=[0].")
    machine = machine_of(device, precision, World())
    held = model if isinstance(model, Model) else load(model)
    recipe = Recipe.of(held, machine, sampler, guidance, None, chunk, labels)
    machine.place(held.diffusion)
    parts = _parts(held.diffusion, recipe, machine, wanted, World())
    by_seed = {int(seed): image for part in parts for seed, image in zip(part.seeds, part.images, strict=True)}
    return np.stack([by_seed[seed] for seed in wanted])
