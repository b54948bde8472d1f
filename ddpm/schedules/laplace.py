"""Noise levels that crowd around one log-SNR."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.continuous import LAST_TIME, ContinuousSchedule


@register("laplace")
class Laplace(ContinuousSchedule):
    """Over uniform t, log-SNR has a Laplace distribution, here cut off at both ends (Hang et al. 2024).

    log_snr(t) = mu - b sgn(1/2 - p) ln(1 - 2 |1/2 - p|), where p rises evenly with t and would be t/999 without the cut.
    Most training goes to levels around `mu`; sampling is better spread by a grid of levels, log-snr or karras.
    """

    mu: float = 0.0
    b: Annotated[float, Field(gt=0)] = 0.5
    log_snr_min: float = -10.0
    log_snr_max: float = 10.0

    def log_snr_at(self, t: Tensor) -> Tensor:
        clean, noisy = self._ends(t)
        above = torch.lerp(clean[0], noisy[0], t / LAST_TIME)
        below = torch.lerp(noisy[1], clean[1], (LAST_TIME - t) / LAST_TIME)
        return self.mu + self.b * torch.where(above < 0.5, -torch.log(2.0 * above), torch.log(2.0 * below))

    def inverse(self, log_snr: Tensor) -> Tensor:
        clean, noisy = self._ends(log_snr)
        above, below = self._shares(log_snr)
        from_clean = (above - clean[0]) / (noisy[0] - clean[0])
        from_noisy = (below - noisy[1]) / (clean[1] - noisy[1])
        return LAST_TIME * torch.where(above < 0.5, from_clean, 1.0 - from_noisy)

    def _ends(self, like: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What `_shares` gives at log_snr_max and at log_snr_min."""
        high, low = (self._shares(like.new_tensor(value)) for value in (self.log_snr_max, self.log_snr_min))
        return high, low

    def _shares(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities above and below a log-SNR, the smaller one without rounding from 1."""
        tail = 0.5 * torch.exp(-(log_snr - self.mu).abs() / self.b)
        high = log_snr > self.mu
        return torch.where(high, tail, 1.0 - tail), torch.where(high, 1.0 - tail, tail)
