"""Weights of the noise levels in the loss, as functions of the signal-to-noise ratio.

All but `uniform` are defined as the weight of the squared error of x0, and turned into that of the squared error of
whatever the objective predicts. So they mean the same for every objective: models of eps, x0 and v that say the same of an
image have the same weighted loss. For other errors (l1, huber) the same factor is taken.
"""

from abc import abstractmethod
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ddpm.objectives import Objective
from ddpm.registry import Component, register
from ddpm.schedules import Level, Schedule

Positive = Annotated[float, Field(gt=0)]


class Weighting(Component, kind="weighting"):
    """How much the error counts at each noise level."""

    @abstractmethod
    def of(self, objective: Objective, level: Level, schedule: Schedule) -> Tensor | None:
        """Weight of the squared error of the objective's own target, float64 like the level's; None: 1 everywhere."""


class OfSNR(Weighting):
    """A weight of the squared error of x0 that is a function of SNR = alpha^2 / sigma^2."""

    @abstractmethod
    def of_x0(self, snr: Tensor) -> Tensor:
        """Weight of the squared error of x0, float64 like the SNR."""

    def of(self, objective: Objective, level: Level, schedule: Schedule) -> Tensor:
        return self.of_x0(level.log_snr.exp()) * objective.x0_factor(level, schedule)


@register("uniform")
class Uniform(Weighting):
    """The same at every level, in the objective's own target: L_simple for eps (Ho et al. 2020, equation 14)."""

    def of(self, objective: Objective, level: Level, schedule: Schedule) -> None:
        return None


@register("snr")
class SNR(OfSNR):
    """SNR: uniform for eps, whatever is predicted (Salimans & Ho 2022, section 4)."""

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr


@register("truncated-snr")
class TruncatedSNR(OfSNR):
    """max(SNR, 1): the larger of the errors of x0 and eps (Salimans & Ho 2022, section 4)."""

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr.clamp(min=1.0)


@register("min-snr")
class MinSNR(OfSNR):
    """min(SNR, gamma) (Hang et al. 2023, Min-SNR-gamma)."""

    gamma: Positive = 5.0

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma)


@register("soft-min-snr")
class SoftMinSNR(OfSNR):
    """SNR gamma / (SNR + gamma), min-snr without its kink (Crowson et al. 2024, soft-min-SNR)."""

    gamma: Positive = 4.0

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr * self.gamma / (snr + self.gamma)


@register("p2")
class P2(OfSNR):
    """The error of eps weighted by 1 / (k + SNR)^gamma (Choi et al. 2022, P2 weighting)."""

    k: Positive = 1.0
    gamma: Annotated[float, Field(ge=0)] = 1.0

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr / (self.k + snr) ** self.gamma


@register("edm")
class EDMWeighting(OfSNR):
    """SNR + 1 / sigma_data^2: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with their sigma, sigma / alpha (Karras et
    al. 2022, table 1); for sigma_data = 1 and alpha^2 + sigma^2 = 1 it is uniform for v."""

    sigma_data: Positive = 0.5

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr + 1.0 / self.sigma_data**2
