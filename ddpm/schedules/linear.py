"""Betas rising linearly."""

import torch
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import Beta, DiscreteSchedule, Timesteps


@register("linear")
class Linear(DiscreteSchedule):
    """Betas rising linearly (Ho et al. 2020, section 4).

    `scaled=true` multiplies both ends by 1000 / timesteps, so that fewer steps reach the same final noise (Nichol &
    Dhariwal 2021, code; the ddpm package does the same).
    """

    timesteps: Timesteps = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    scaled: bool = False

    def make_betas(self) -> Tensor:
        scale = 1000.0 / self.timesteps if self.scaled else 1.0
        return torch.linspace(self.beta_start * scale, self.beta_end * scale, self.timesteps, dtype=torch.float64)
