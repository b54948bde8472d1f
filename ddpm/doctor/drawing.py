"""Images of a run, drawn twice from the same noise, by its own steps and by finer ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.doctor.exam import Pixels
from ddpm.errors import ConfigError
from ddpm.images import to_uint8
from ddpm.models import GaussianDiffusion
from ddpm.randomness import Stream
from ddpm.runtime import Runtime
from ddpm.samplers import OfModel, Sampler, Thresholding
from ddpm.sampling import Wrap, draw
from ddpm.schedules import DiscreteSchedule, Schedule


@dataclass(frozen=True)
class Recipe:
    """How images are drawn: as `ddpm sample` would; guidance makes the guided model."""

    sampler: Sampler
    thresholding: Thresholding
    guidance: Wrap
    chunk: int

    @property
    def rule(self) -> Thresholding:
        """The thresholding that holds: the sampler's own, unless it leaves that to the model."""
        own = self.sampler.thresholding
        return self.thresholding if isinstance(own, OfModel) else own


@dataclass(frozen=True, eq=False)
class Twice:
    """Images uint8 (n, C, H, W) and labels (n,) asked for (None without), the images of finer steps (None without any), root
    mean square and maximum of what x was out of range."""

    images: Pixels
    labels: NDArray[np.int64] | None
    finer: Pixels | None
    out_of_range: tuple[float, float]


def finer(sampler: Sampler, schedule: Schedule) -> Sampler | None:
    """The sampler with twice its steps, or as many as the schedule has if those are half as many again; None: no such."""
    count = sampler.count(schedule)
    most = schedule.timesteps if isinstance(schedule, DiscreteSchedule) else 2 * count
    if 2 * min(2 * count, most) < 3 * count:
        return None
    found = replace(sampler, steps=min(2 * count, most))
    try:
        found.path(schedule)
    except ConfigError:  # a grid that has no such number of steps
        return None
    return found


def draw_twice(
    model: GaussianDiffusion,
    recipe: Recipe,
    machine: Runtime,
    seeds: range,
    told: Callable[[int], None] = lambda count: None,
) -> Twice:
    """Draw the images that `ddpm sample` draws from these seeds, every class in turn, and the same by finer steps.

    Noise z of a step is, of its two half steps, (z + b) / sqrt(2) and (z - b) / sqrt(2) with b as new: so both halves are
    independent and standard normal, and a random sampler, too, gives nearly the same image where its steps are many enough.
    """
    guided, twin = recipe.guidance(model), finer(recipe.sampler, model.schedule)
    labels = np.arange(seeds.start, seeds.stop) % guided.num_classes if guided.num_classes else None
    coarse, fine, beyond = [], [], []
    for start in range(seeds.start, seeds.stop, recipe.chunk):
        ids = torch.arange(start, min(start + recipe.chunk, seeds.stop))
        asked = None if labels is None else torch.from_numpy(labels[ids - seeds.start])
        x = draw(model, guided, recipe.sampler, machine, ids, asked, recipe.thresholding)
        coarse.append(to_uint8(x).cpu())
        beyond.append((x.double().abs() - 1.0).clamp(min=0.0).cpu())
        if twin is not None:
            first, noise = _halved(ids.to(machine.device), model.shape, machine)
            condition = None if asked is None else asked.to(machine.device)
            with machine.autocast():
                fine.append(to_uint8(twin.sample(guided, first, condition, noise, recipe.thresholding)).cpu())
        told(len(ids))
    out = torch.cat(beyond)
    out_of_range = float(out.square().mean().sqrt()), float(out.max())
    return Twice(torch.cat(coarse).numpy(), labels, torch.cat(fine).numpy() if fine else None, out_of_range)


def _halved(ids: Tensor, shape: tuple[int, int, int], machine: Runtime) -> tuple[Tensor, Callable[[int], Tensor]]:
    """What `draw` starts from with these seeds, and the noise of half steps."""
    stream, bridge = Stream(0, ids, "sample"), Stream(0, ids, "doctor-bridge")

    def noise(step: int) -> Tensor:
        whole, other = (of.at(step=step // 2 + 1).normal(*shape) for of in (stream, bridge))
        return machine.images((whole + other if step % 2 == 0 else whole - other) / 2**0.5)

    return machine.images(stream.normal(*shape)), noise
