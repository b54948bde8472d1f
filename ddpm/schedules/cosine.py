"""The squared-cosine table."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import Beta, DiscreteSchedule, Timesteps


@register("cosine")
class Cosine(DiscreteSchedule):
    """alphas_cumprod = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2) (Nichol & Dhariwal 2021, equation 17)."""

    timesteps: Timesteps = 1000
    s: Annotated[float, Field(ge=0)] = 0.008
    max_beta: Beta = 0.999

    def make_betas(self) -> Tensor:
        t = torch.arange(self.timesteps + 1, dtype=torch.float64) / self.timesteps
        f = torch.cos((t + self.s) / (1 + self.s) * math.pi / 2) ** 2
        return (1.0 - f[1:] / f[:-1]).clamp(max=self.max_beta)
