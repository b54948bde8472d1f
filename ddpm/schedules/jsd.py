"""The table of Sohl-Dickstein et al."""

import torch
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import DiscreteSchedule, Timesteps


@register("jsd")
class JSD(DiscreteSchedule):
    """beta_t = 1 / (T - t + 1): an equal share of the signal goes at each step (Sohl-Dickstein et al. 2015, section 2.4.1).

    The last beta is 1: zero terminal SNR, which eps cannot be learnt on.
    """

    timesteps: Timesteps = 1000

    def make_betas(self) -> Tensor:
        return 1.0 / torch.arange(self.timesteps, 0, -1, dtype=torch.float64)
