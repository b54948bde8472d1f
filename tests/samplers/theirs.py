"""diffusers' schedulers driven with our levels in float64 and our network."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddpm.samplers import Sampler
from ddpm.schedules import Level
from tests.samplers.known import Wave, wave_model

SHAPE = (2, 1, 2, 3)


def network(x: Tensor, level: Level) -> Tensor:
    """What wave_model's network says, with its float32 noise label."""
    return Wave()(x, level.t.float().expand(len(x)))


def rho(level: Level) -> Tensor:
    return level.sigma / level.alpha


def made(name: str, **options: Any) -> Any:
    """A scheduler of diffusers."""
    import diffusers

    return getattr(diffusers, name)(1000, **options)


def prepared(scheduler: Any, path: Sequence[Level]) -> Any:
    """The scheduler with our levels in float64: sigma / alpha, and times that name them."""
    scheduler.set_timesteps(len(path) - 1)
    scheduler.sigmas = torch.stack([rho(level) for level in path])
    scheduler.timesteps = torch.stack([level.t for level in path[:-1]])
    scheduler.set_begin_index(0)
    return scheduler


def theirs(scheduler: Any, path: Sequence[Level], x: Tensor, **options: Any) -> list[Tensor]:
    """diffusers' own loop: x after every step."""
    seen = []
    for level in path[:-1]:
        x = scheduler.step(network(x, level), level.t, x, **options).prev_sample
        seen.append(x)
    return seen


def theirs_in_rho(scheduler: Any, path: Sequence[Level], x: Tensor, **options: Any) -> list[Tensor]:
    """The loop of a scheduler that works on x / alpha."""
    scheduler.is_scale_input_called = True
    seen, y = [], x / path[0].alpha
    for level, following in pairwise(path):
        y = scheduler.step(network(level.alpha * y, level), level.t, y, **options).prev_sample
        seen.append(following.alpha * y)
    return seen


def largest(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of two trajectories, where x is large (without clipping the wave lets it grow) relative to it."""
    assert len(ours) == len(expected)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in zip(ours, expected, strict=True))


def paths(steps: int, clean: bool, grid: str = "trailing") -> list[Level]:
    """From the noisiest level to the clean image, or to a noisy one."""
    path = Sampler.parse(f"ddim:steps={steps},grid={grid}").path(wave_model().schedule)
    return path if clean else path[:-1]


def float64_tables(scheduler: Any) -> Any:
    schedule = wave_model().schedule
    scheduler.betas, scheduler.alphas = schedule.betas, 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler
