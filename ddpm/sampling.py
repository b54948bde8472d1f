"""Drawing images: image k is a function of the model, the sampler and seed k."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.distributed import World
from ddpm.errors import ConfigError
from ddpm.guidance import Drawable
from ddpm.images import to_pixels, to_uint8
from ddpm.models.diffusion import NO_LABEL, GaussianDiffusion, Predictor
from ddpm.randomness import Stream, seed_array
from ddpm.runtime import Runtime
from ddpm.samplers import Sampler, Thresholding


@dataclass(frozen=True)
class Drawn:
    """Some images with what made them: seeds and labels (n,) int64 (labels None without classes), images (n, C, H, W) uint8,
    and, where they were asked for, the pixels before rounding, float32 in 0..255."""

    seeds: np.ndarray
    labels: np.ndarray | None
    images: np.ndarray
    pixels: np.ndarray | None = None


OnChunk = Callable[[int, Tensor, Tensor], None]
Wrap = Callable[[GaussianDiffusion], Drawable]


def generate(
    model: GaussianDiffusion,
    sampler: Sampler,
    runtime: Runtime,
    *,
    seeds: Sequence[int],
    labels: Sequence[int] = (),
    guidance: Wrap = lambda model: model,
    chunk: int = 16,
    thresholding: Thresholding | None = None,
    world: World = World(),  # noqa: B008 - frozen
    on_step: OnChunk | None = None,
    pixels: bool = False,
) -> Iterator[Drawn]:
    """Images of the seeds asked for, a chunk at a time and rising; memory does not grow with their number.

    Seeds are drawn in chunks [0, chunk), [chunk, 2 chunk), ...; a chunk that is asked for in part is drawn whole, so an
    image does not depend on which others are asked for. Chunks are what processes share.

    Args:
        model: on the runtime's device, in eval mode.
        sampler: how to walk from noise to image.
        runtime: the machine.
        seeds: which images; non-negative.
        labels: of a conditional model, or one that a classifier guides, by seed: image k has labels[k mod len]; empty:
            every class in turn. -1 is no label.
        guidance: makes the guided model, as `Guidance.wrap` does; default: the model as it is.
        chunk: images drawn together.
        thresholding: of the predicted x0, where the sampler names none; None: the model's own.
        world: the processes; each yields its own chunks.
        on_step: sampler progress of every chunk, (index, x, x0).
        pixels: give the pixels before rounding too.

    Raises ConfigError: a seed that is no whole number from 0 to 2^62 - 1, a chunk below 1, a label out of range, labels or
    guidance that the model cannot take.
    """
    guided = guidance(model)
    classes = guided.num_classes
    check_labels(model, labels, classes)
    check_chunk(chunk)
    sampler.path(model.schedule)
    rule = thresholding or Thresholding.parse(model.thresholding)
    cycle = torch.tensor(list(labels) or list(range(classes)) or [NO_LABEL])
    wanted = np.unique(seed_array(seeds))
    starts = [int(start) for start in np.unique(wanted // chunk) * chunk if start // chunk % world.size == world.rank]

    def parts() -> Iterator[Drawn]:
        for start in starts:
            whole = torch.arange(start, start + chunk)
            of_seed = cycle[whole % len(cycle)]
            x = draw(model, guided, sampler, runtime, whole, of_seed if classes else None, rule, on_step)
            kept = np.isin(
                whole.numpy(), wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + chunk)]
            )
            drawn_labels = of_seed.numpy()[kept] if classes else None
            unrounded = to_pixels(x).cpu().numpy()[kept] if pixels else None
            yield Drawn(whole.numpy()[kept], drawn_labels, to_uint8(x).cpu().numpy()[kept], unrounded)

    return parts()


def draw(
    model: GaussianDiffusion,
    predictor: Predictor,
    sampler: Sampler,
    runtime: Runtime,
    seeds: Tensor,
    labels: Tensor | None,
    rule: Thresholding,
    on_step: OnChunk | None = None,
) -> Tensor:
    """One chunk: (B,) seeds and labels -> (B, C, H, W), about [-1, 1], on the device."""
    stream = Stream(0, seeds.to(runtime.device), "sample")
    condition = None if labels is None else labels.to(runtime.device)
    start = runtime.images(stream.normal(*model.shape))
    with runtime.autocast():
        return sampler.sample(
            predictor,
            start,
            condition,
            lambda i: runtime.images(stream.at(step=i + 1).normal(*model.shape)),
            rule,
            on_step,
        )


def check_chunk(chunk: Any) -> None:
    """Raise ConfigError for a chunk that is no whole number of at least 1."""
    if not isinstance(chunk, int | np.integer) or isinstance(chunk, bool) or chunk < 1:
        raise ConfigError(f"--chunk={chunk} is wrong: it must be a whole number of at least 1.")


def check_labels(model: GaussianDiffusion, labels: Sequence[int], num_classes: int) -> None:
    """Raise ConfigError for labels that the model, guided to draw so many classes, cannot take."""
    if labels and not num_classes:
        raise ConfigError("--labels: this model was trained without classes; leave --labels out.")
    if wrong := [label for label in labels if not NO_LABEL <= label < num_classes]:
        raise ConfigError(f"--labels: {wrong[0]} is no class of this model; its classes are 0 to {num_classes - 1}.")
    if model.num_classes and not model.label_drop and NO_LABEL in labels:
        raise ConfigError(
            "--labels: this model was trained with --diffusion.label-drop=0, so it cannot draw without a label."
        )
