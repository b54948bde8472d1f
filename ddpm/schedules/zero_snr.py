"""Any table, rescaled so that it ends in noise alone."""

import torch
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import DiscreteSchedule, Schedule, need_table
from ddpm.schedules.linear import Linear


@register("zero-snr")
class ZeroSNR(DiscreteSchedule):
    """Another table with zero terminal SNR: its alphas are shifted and scaled, the first stays and the last becomes 0.

    Lin et al. (2024), algorithm 1. Objectives that divide by alpha cannot be learnt on it; v and x0 can.
    """

    table: Schedule = Linear()

    def make_betas(self) -> Tensor:
        alpha = need_table(self.table, "schedule 'zero-snr'").alphas_cumprod.sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        kept = torch.cat([torch.ones(1, dtype=torch.float64), alpha**2])
        return 1.0 - kept[1:] / kept[:-1]

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        return len(self.betas)
