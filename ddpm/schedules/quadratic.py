"""Betas whose square roots rise linearly."""

import torch
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import Beta, DiscreteSchedule, Timesteps


@register("quadratic")
class Quadratic(DiscreteSchedule):
    """Betas that are squares of evenly spaced numbers (Ho et al. 2020, appendix B)."""

    timesteps: Timesteps = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02

    def make_betas(self) -> Tensor:
        ends = self.beta_start**0.5, self.beta_end**0.5
        return torch.linspace(*ends, self.timesteps, dtype=torch.float64) ** 2


@register("scaled-linear")
class ScaledLinear(Quadratic):
    """The quadratic table under the name and with the ends of latent diffusion (Rombach et al. 2022, code)."""

    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
