"""One beta for every step."""

import torch
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import Beta, DiscreteSchedule, Timesteps


@register("constant")
class Constant(DiscreteSchedule):
    """The same beta at every step (Ho et al. 2020, appendix B)."""

    timesteps: Timesteps = 1000
    beta: Beta = 0.02

    def make_betas(self) -> Tensor:
        return torch.full((self.timesteps,), self.beta, dtype=torch.float64)
