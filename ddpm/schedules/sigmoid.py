"""Tables in the shape of a sigmoid: of the signal that is left, or of the betas."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.schedules.base import Beta, DiscreteSchedule, Timesteps


@register("sigmoid")
class Sigmoid(DiscreteSchedule):
    """alphas_cumprod falls from 1 to 0 as -sigmoid((start + (end - start) t / T) / tau) does (Chen 2023).

    `max_beta` keeps the last beta, which would be 1, below it, as for the cosine table.
    """

    timesteps: Timesteps = 1000
    start: float = -3.0
    end: float = 3.0
    tau: Annotated[float, Field(gt=0)] = 1.0
    max_beta: Beta = 0.999

    def make_betas(self) -> Tensor:
        x = torch.linspace(self.start, self.end, self.timesteps + 1, dtype=torch.float64) / self.tau
        left = torch.sigmoid(x[-1]) - torch.sigmoid(x)
        return (1.0 - left[1:] / left[:-1]).clamp(max=self.max_beta)


@register("sigmoid-beta")
class SigmoidBeta(DiscreteSchedule):
    """Betas that rise from beta_start to beta_end as a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff, code)."""

    timesteps: Timesteps = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02

    def make_betas(self) -> Tensor:
        share = torch.sigmoid(torch.linspace(-6.0, 6.0, self.timesteps, dtype=torch.float64))
        return self.beta_start + share * (self.beta_end - self.beta_start)
