"""`ddpm edit`: image files in, image files out, by `ddpm.editing`; and `ddpm.editor` in Python."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from ddpm import files, images, plots
from ddpm.console import Console, human_duration
from ddpm.distributed import World
from ddpm.editing import Blend, Editor, estimate_sigma, level_of_noise, psnr, resampled, usual_jump
from ddpm.errors import ConfigError
from ddpm.guidance import Guidance, shown
from ddpm.models import NO_LABEL
from ddpm.runs import folders
from ddpm.runs.drawing import Labels, Recipe, machine_of, seeds_from
from ddpm.runs.loading import Model, load
from ddpm.runs.pictures import Picture, Pixels, Resize, read_mask, read_pictures
from ddpm.runs.trajectory import Trajectory
from ddpm.samplers import Sampler

Edit = Callable[[Editor, Pixels, Sequence[int]], Pixels]
"""edit(editor, images, seeds) -> results, uint8 (N, C, H, W) both."""
SHOWN = 10
"""Images, and results of each, in grid.png at most."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every edit is told; None leaves the choice to the checkpoint, or to the edit."""

    source: str | Path
    labels: Labels | None = None
    guidance: float | str | Guidance | None = None
    sampler: str | None = None
    thresholding: str | None = None
    ema: str | None = None
    seed: int = 0
    out: Path | None = None
    resize: Resize = "crop"
    chunk: int | None = None
    gif: bool = True
    device: str = "auto"
    precision: str = "auto"
    quiet: bool = False


@dataclass(frozen=True)
class EditResult:
    """Where images went, how many, by which recipe, the seconds it took, and what was found on the way."""

    out: Path
    num_images: int
    recipe: dict[str, Any]
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)


def editor(
    model: Model | str | Path,
    *,
    labels: Labels | None = None,
    guidance: float | str | Guidance | None = None,
    sampler: str | Sampler | None = None,
    thresholding: str | None = None,
    chunk: int | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Editor:
    """`ddpm.editor`: an `Editor` for a model from `ddpm.load`, or for a path that it takes.

    Args:
        labels: classes, in turn by seed, as `ddpm.sample` takes them; None: no label.
        guidance: None: as the model's run recommends where there are labels, else none.
        sampler, thresholding: None: as the model's run recommends.
        chunk: images in a batch; None: 1 on a CPU, which takes one after another anyway, else 16.
        device, precision: the machine.

    Raises ConfigError, CheckpointError.
    """
    held = model if isinstance(model, Model) else load(model)
    common = Common(
        source="",
        labels=labels,
        guidance=guidance,
        thresholding=thresholding,
        chunk=chunk,
        device=device,
        precision=precision,
    )
    return _open(held, common, sampler)[0]


def inpaint(
    common: Common, image: Path, mask: Path, *, num_images: int = 1, jump: int | None = None, resamplings: int = 10
) -> EditResult:
    """Fill in the white part of the mask, `num_images` times for each image; the rest stays as it was, bit for bit."""
    work = _Work("inpaint", common)
    pictures = work.read(image)
    fill = read_mask(mask, pictures, common.resize)
    jump = usual_jump(work.editor.path) if jump is None else jump
    work.recipe |= {"mask": files.sha256(mask), "jump": jump, "resamplings": resamplings}
    resampled(work.editor.path, jump, resamplings)

    def edit(editor: Editor, x: Pixels, seeds: Sequence[int]) -> Pixels:
        return editor.inpaint(x, fill, seeds, jump=jump, resamplings=resamplings)

    shown = [np.where(fill, np.uint8(128), picture.pixels) for picture in pictures]
    return work.variations(pictures, num_images, edit, shown)


def img2img(common: Common, image: Path, *, num_images: int = 1, strength: float = 0.5) -> EditResult:
    """Variations of images: noised as far as `strength`, the share of the sampler's steps, and walked down again."""
    work = _Work("img2img", common)
    pictures = work.read(image)
    work.recipe["strength"] = strength
    return work.variations(pictures, num_images, lambda editor, x, seeds: editor.img2img(x, strength, seeds))


def denoise(
    common: Common, image: Path, *, num_images: int = 1, sigma: float | None = None, one_step: bool = False
) -> EditResult:
    """Take the noise of images away; sigma in grey levels of 255, None: estimated from each image."""
    work = _Work("denoise", common)
    if num_images > 1 and (one_step or work.editor.sampler.rises):
        what = "one step" if one_step else f"sampler {work.editor.sampler.name!r}"
        raise ConfigError(
            f"--num-images={num_images}: {what} draws no noise, so every result would be the same; "
            "leave it out, or choose a sampler that does, such as --sampler ddpm:steps=50."
        )
    pictures = work.read(image)
    work.recipe |= {"sigma": sigma, "one_step": one_step}
    found = {p.path.name: estimate_sigma(p.pixels) if sigma is None else sigma for p in pictures}
    for name, noise in found.items():
        level_of_noise(work.editor.predictor.schedule, noise)
        work.say.info(
            f"{name}: noise of {noise:.1f} grey levels of 255, {'estimated' if sigma is None else 'as told'}."
        )

    def edit(editor: Editor, x: Pixels, seeds: Sequence[int]) -> Pixels:
        if sigma is not None:
            return editor.denoise(x, sigma, seeds, one_step=one_step)
        pairs = zip(x, seeds, strict=True)
        return np.concatenate(
            [editor.denoise(image, estimate_sigma(image), [k], one_step=one_step) for image, k in pairs]
        )

    return work.variations(pictures, num_images, edit, found={"sigma": found})


def interpolate(
    common: Common,
    ends: Sequence[Path] = (),
    *,
    between_seeds: tuple[int, int] | None = None,
    frames: int = 9,
    level: float = 0.5,
    blend: Blend = "lerp",
) -> EditResult:
    """Frames from one image to another, or from the image of one seed to that of another, with a grid and a GIF."""
    if len(ends) != (2 if between_seeds is None else 0):
        raise ConfigError("interpolate: give two image files, or --between-seeds A,B.")
    work = _Work("interpolate", common, None if between_seeds is None else "ddim:steps=50")
    pictures = [picture for end in ends for picture in work.read(end)]
    if len(pictures) not in (0, 2):
        raise ConfigError("interpolate: give two image files, not folders.")
    if between_seeds is None:
        work.recipe |= {"seed": common.seed, "frames": frames, "level": level, "blend": blend}
    else:
        work.recipe |= {"between_seeds": list(between_seeds), "frames": frames}
    work.claim()
    with work.watched(min(frames, work.editor.chunk)) as watched:
        if between_seeds is None:
            first, second = (picture.pixels for picture in pictures)
            made = watched.interpolate(first, second, frames, level=level, seed=common.seed, blend=blend)
        else:
            made = watched.interpolate_seeds(*between_seeds, frames)
    for k, frame in enumerate(made):
        images.save_png(work.out / f"frame-{k:03d}.png", frame)
    row = np.stack([*(p.pixels for p in pictures[:1]), *made, *(p.pixels for p in pictures[1:])])
    images.save_png(work.out / "grid.png", images.grid(row, columns=len(row)))
    there_and_back = [images.grid(frame[None]) for frame in [*made, *made[-2:0:-1]]]
    images.save_gif(work.out / "interpolation.gif", there_and_back, fps=8, last_frame_s=0)
    return work.done(frames)


def invert(common: Common, image: Path, *, steps: Sequence[int] = ()) -> EditResult:
    """Images to the noise that the sampler makes them from, and back; how near that comes, by number of steps.

    steps: numbers of steps to try, the last of them for the files; none: the sampler's own.
    """
    guidance = 1.0 if common.guidance is None else common.guidance
    common = replace(common, thresholding=common.thresholding or "none", guidance=guidance)
    work = _Work("invert", common, "ddim:steps=50")
    pictures = work.read(image)
    schedule, own = work.editor.predictor.schedule, work.editor.sampler
    samplers = [replace(own, steps=n) for n in steps] or [own]
    for sampler in samplers:
        sampler.check(sampler.path(schedule)[::-1], schedule)
    counts = [sampler.count(schedule) for sampler in samplers]
    work.recipe |= {"sampler": samplers[-1].spec, "steps": counts}
    work.claim()
    x, decibels = np.stack([picture.pixels for picture in pictures]), []
    for count, sampler in zip(counts, samplers, strict=True):
        with work.watched(min(len(x), work.editor.chunk)) as watched:
            latents = replace(watched, sampler=sampler, watch=None).invert(x)
            again = replace(watched, sampler=sampler).reconstruct(latents)
        decibels.append(psnr(x, again))
        work.say.info(f"{count} steps there and {count} back: PSNR {decibels[-1]:.2f} dB.")
    _write_latents(work.out / "latents.safetensors", latents, work.recipe, pictures)
    _write_decibels(work.out, counts, decibels)
    for picture, result in zip(pictures, again, strict=True):
        images.save_png(work.out / f"{picture.path.stem}.png", result)
    noise = images.to_uint8(torch.from_numpy(latents) / 3).numpy()
    columns = np.stack([x, noise, again], axis=1)[:SHOWN]
    images.save_png(work.out / "grid.png", images.grid(columns.reshape(-1, *x.shape[1:]), columns=3))
    return work.done(len(x), {"psnr_db": dict(zip(counts, decibels, strict=True))})


class _Work:
    """One edit: its model, recipe and folder."""

    def __init__(self, action: str, common: Common, sampler: str | None = None) -> None:
        """`sampler` is taken where none is asked for."""
        self.action, self.common, self.start = action, common, time.perf_counter()
        self.say = Console(quiet=common.quiet)
        self.model = load(common.source, common.ema, self.say.warn)
        self.editor, recipe = _open(self.model, common, common.sampler or sampler)
        self.recipe = {"edit": action, **recipe.written(self.model)}
        self.out, self.suffix = Path(), ""

    def read(self, path: Path) -> list[Picture]:
        """Image files, which the recipe then names."""
        pictures = read_pictures(path, self.editor.shape, self.common.resize)
        named = [[picture.path.name, files.sha256(picture.path)] for picture in pictures]
        self.recipe |= {"resize": self.common.resize, "images": [*self.recipe.get("images", ()), *named]}
        return pictures

    def claim(self, seeds: range | None = None) -> None:
        """Make the folder ours, once the recipe is whole."""
        self.out = Path(self.common.out or folders.default(self.model, "edits", self.action, self.recipe))
        self.suffix = folders.claim(self.out, f"edit {self.action}", self.recipe, seeds)
        self.say.info(f"{self.model.source} ({self.model.weights}): {self.action} by {self.recipe['sampler']}.")

    @contextmanager
    def watched(self, count: int) -> Iterator[Editor]:
        """The editor; where pictures of its way are wanted, those of the next walk's first `count` images are written."""
        kept: list[Trajectory] = []

        def watch(steps: int) -> Trajectory:
            kept.append(Trajectory(True, steps, count))
            return kept[-1]

        yield replace(self.editor, watch=watch) if self.common.gif else self.editor
        for trajectory in kept:
            trajectory.close(self.out, self.suffix)

    def variations(
        self,
        pictures: Sequence[Picture],
        num_images: int,
        edit: Edit,
        shown: Sequence[Pixels] = (),
        found: dict[str, Any] | None = None,
    ) -> EditResult:
        """Edit every picture with every seed, and write {picture}-{seed:06d}.png, grid and trajectory.

        shown: what stands before each picture's results in the grid; empty: the pictures.
        """
        seeds = seeds_from(self.common.seed, num_images)
        self.claim(seeds)
        rows = [(picture, seed) for picture in pictures for seed in seeds]
        before = shown or [picture.pixels for picture in pictures]
        cells: dict[tuple[Path, int | None], Pixels] = {}
        cells |= {(picture.path, None): pixels for picture, pixels in zip(pictures, before, strict=True)}
        wanted = {(picture.path, seed) for picture in pictures[:SHOWN] for seed in seeds[:SHOWN]}
        with self.say.progress(self.action, len(rows), "images") as bar:
            for begin in range(0, len(rows), self.editor.chunk):
                part = rows[begin : begin + self.editor.chunk]
                with self.watched(len(part)) if begin == 0 else nullcontext(self.editor) as editor:
                    made = edit(editor, np.stack([p.pixels for p, _ in part]), [seed for _, seed in part])
                for (picture, seed), image in zip(part, made, strict=True):
                    images.save_png(self.out / f"{picture.path.stem}-{seed:06d}.png", image)
                    if (picture.path, seed) in wanted:
                        cells[picture.path, seed] = image
                bar.advance(len(part))
        ordered = [cells[p.path, seed] for p in pictures[:SHOWN] for seed in (None, *seeds[:SHOWN])]
        sheet = images.grid(np.stack(ordered), columns=1 + min(num_images, SHOWN))
        images.save_png(self.out / f"grid{self.suffix}.png", sheet)
        return self.done(len(rows), found)

    def done(self, num_images: int, found: dict[str, Any] | None = None) -> EditResult:
        """Say where everything is."""
        seconds = time.perf_counter() - self.start
        shown = self.out / f"grid{self.suffix}.png"
        self.say.info(f"{self.out}: {num_images} images in {human_duration(seconds)}; look at {shown}.")
        return EditResult(self.out, num_images, self.recipe, seconds, found or {})


def _open(model: Model, common: Common, sampler: str | Sampler | None) -> tuple[Editor, Recipe]:
    """The editor of a model, placed on the machine, and its recipe; raises ConfigError."""
    machine = machine_of(common.device, common.precision, World())
    labels = ([NO_LABEL] if model.diffusion.num_classes else []) if common.labels is None else common.labels
    guidance = common.guidance
    if common.labels is None:
        guidance = Guidance.parse(1.0 if guidance is None else guidance)
        if guidance.by_label:
            raise ConfigError(
                f"--guidance={shown(guidance.written)} needs --labels: without a class there is nothing to guide to."
            )
    chunk = (1 if machine.device.type == "cpu" else 16) if common.chunk is None else common.chunk
    recipe = Recipe.of(model, machine, sampler, guidance, common.thresholding, chunk, labels)
    diffusion = model.diffusion
    recipe.sampler.path(diffusion.schedule)
    machine.place(diffusion)
    made = Editor(
        predictor=recipe.guidance(diffusion),
        sampler=recipe.sampler,
        shape=diffusion.shape,
        machine=machine,
        thresholding=recipe.thresholding,
        labels=recipe.labels,
        chunk=recipe.chunk,
    )
    return made, recipe


def _write_latents(
    path: Path, latents: NDArray[np.float32], recipe: dict[str, Any], pictures: Sequence[Picture]
) -> None:
    """float32 (N, C, H, W) as "latents"; the recipe and the images' names are the file's metadata, as JSON."""
    metadata = {"recipe": json.dumps(recipe), "images": json.dumps([picture.path.name for picture in pictures])}
    with files.atomic_path(path) as temporary:
        safetensors.numpy.save_file({"latents": np.ascontiguousarray(latents)}, temporary, metadata)


def _write_decibels(out: Path, counts: Sequence[int], decibels: Sequence[float]) -> None:
    """psnr.csv, and a plot of it where there are several."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("steps", "psnr_db"), *zip(counts, decibels, strict=True)])
    files.write_text(out / "psnr.csv", table.getvalue())
    if len(counts) > 1:
        title = "Inversion and reconstruction"
        plots.curves(out / "psnr.png", {"": (counts, decibels)}, "steps there, and back", "PSNR (dB)", title)
