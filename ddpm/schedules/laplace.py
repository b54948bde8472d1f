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
        cleanest, noisiest = self._share_above(self.log_snr_max), self._share_above(self.log_snr_min)
        above = cleanest + u.to(torch.float64) * (noisiest - cleanest)
        distance = -self.b * torch.log(2.0 * torch.minimum(above, 1.0 - above))
        log_snr = self.mu + torch.where(above < 0.5, distance, -distance)
        return self.inverse(log_snr).clamp(0.0, LAST_TIME)

    def _share_above(self, log_snr: float) -> float:
        tail = 0.5 * math.exp(-abs(log_snr - self.mu) / self.b)
        return tail if log_snr > self.mu else 1.0 - tail
