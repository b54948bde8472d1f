"""Noise levels that crowd around one log-SNR in training."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.continuous import LAST_TIME, ContinuousSchedule


@register("laplace")
class Laplace(ContinuousSchedule):
    """Training draws log-SNR from a Laplace distribution around `mu`, cut off at both ends (Hang et al. 2024).

    Their log_snr(u) = mu - b sgn(1/2 - u) ln(1 - 2 |1/2 - u|) of uniform u is `draw`. Times themselves are even in
    log-SNR, so that the rare levels of the tails have labels that a network can tell apart, and samplers visit them.
    """

    mu: float = 0.0
    b: Annotated[float, Field(gt=0)] = 0.5
    log_snr_min: float = -10.0
    log_snr_max: float = 10.0

    def log_snr_at(self, t: Tensor) -> Tensor:
        return self.log_snr_max + t / LAST_TIME * (self.log_snr_min - self.log_snr_max)

    def inverse(self, log_snr: Tensor) -> Tensor:
        return (log_snr - self.log_snr_max) / (self.log_snr_min - self.log_snr_max) * LAST_TIME

    def draw(self, u: Tensor) -> Tensor:
        """The times of log-SNRs above which a share u of the distribution between the ends lies."""
        u, high, low = u.to(torch.float64), self.log_snr_max - self.mu, self.log_snr_min - self.mu
        if (
            high + low < 0
        ):  # most of the range is below mu: mirrored, so that shares are not differences of numbers near 1
            log_snr = self.mu - self._quantile(1.0 - u, -low, -high)
        else:
            log_snr = self.mu + self._quantile(u, high, low)
        return self.inverse(log_snr).clamp(0.0, LAST_TIME)

    def _quantile(self, u: Tensor, high: float, low: float) -> Tensor:
        """The number between high and low, counted from mu, above which a share u of what is between them lies."""
        end = self._share_above(high)
        above = end + u * (self._share_above(low) - end)
        distance = -self.b * torch.log(2.0 * torch.minimum(above, 1.0 - above))
        return torch.where(above < 0.5, distance, -distance)

    def _share_above(self, distance: float) -> float:
        tail = 0.5 * math.exp(-abs(distance) / self.b)
        return tail if distance > 0 else 1.0 - tail
