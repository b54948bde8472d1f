"""The variance-exploding noise levels of score matching."""

import math

from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.continuous import LAST_TIME, Sigma, VarianceExploding


@register("ve")
class VE(VarianceExploding):
    """alpha = 1 and sigma(t) = sigma_min (sigma_max / sigma_min)^(t/999) (Song et al. 2021b, appendix C).

    Their 0.01 to 50 for images in [0, 1] are 0.02 to 100 for [-1, 1] (Karras et al. 2022, table 1).
    """

    sigma_min: Sigma = 0.02
    sigma_max: Sigma = 100.0

    def log_snr_at(self, t: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return -2.0 * (low + t / LAST_TIME * (high - low))

    def inverse(self, log_snr: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (log_snr / -2.0 - low) / (high - low) * LAST_TIME
