"""The variance-preserving noise levels in continuous time."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.continuous import ContinuousSchedule


@register("vp")
class VP(ContinuousSchedule):
    """alpha^2 = exp(-u^2 (beta_max - beta_min) / 2 - u beta_min), u = (t + 1) / 1000 (Song et al. 2021b, equation 33).

    It is the limit of the linear table, and t means the same: u runs from 0.001, where their sampling ends, to 1.
    """

    beta_min: Annotated[float, Field(gt=0)] = 0.1
    beta_max: Annotated[float, Field(gt=0)] = 20.0

    def log_snr_at(self, t: Tensor) -> Tensor:
        u = (t + 1.0) / 1000.0
        lost = 0.5 * u**2 * (self.beta_max - self.beta_min) + u * self.beta_min  # -ln alpha^2
        return -lost - torch.log(-torch.expm1(-lost))

    def inverse(self, log_snr: Tensor) -> Tensor:
        lost = -F.logsigmoid(log_snr)
        root = (self.beta_min**2 + 2.0 * lost * (self.beta_max - self.beta_min)).clamp(min=0.0).sqrt()
        return 2.0 * lost / (self.beta_min + root) * 1000.0 - 1.0
