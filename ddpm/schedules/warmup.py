"""Betas that rise at first, then stay."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import Beta, DiscreteSchedule, Timesteps


@register("warmup")
class Warmup(DiscreteSchedule):
    """beta_end, after a linear rise over a fraction of the steps: 0.1 and 0.5 are warmup10 and warmup50 of Ho et al. (2020), code."""

    timesteps: Timesteps = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.1

    def make_betas(self) -> Tensor:
        rise = int(self.timesteps * self.fraction)
        betas = torch.full((self.timesteps,), self.beta_end, dtype=torch.float64)
        betas[:rise] = torch.linspace(self.beta_start, self.beta_end, rise, dtype=torch.float64)
        return betas
