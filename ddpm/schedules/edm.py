"""The noise levels of EDM."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.continuous import LAST_TIME, Sigma, VarianceExploding


@register("edm")
class EDM(VarianceExploding):
    """alpha = 1 and sigma(t) = (sigma_min^(1/rho) + t/999 (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho.

    Evenly spaced times are the steps of Karras et al. (2022), equation 5, and the ends are those of its table 1.
    """

    sigma_min: Sigma = 0.002
    sigma_max: Sigma = 80.0
    rho: Annotated[float, Field(ge=1)] = 7.0

    @property
    def _roots(self) -> tuple[float, float]:
        return math.pow(self.sigma_min, 1 / self.rho), math.pow(self.sigma_max, 1 / self.rho)

    def log_snr_at(self, t: Tensor) -> Tensor:
        low, high = self._roots
        return -2.0 * self.rho * torch.log(low + t / LAST_TIME * (high - low))

    def inverse(self, log_snr: Tensor) -> Tensor:
        low, high = self._roots
        root = torch.exp(log_snr / (-2.0 * self.rho))
        return (root - low) / (high - low) * LAST_TIME
