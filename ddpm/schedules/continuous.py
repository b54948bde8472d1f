"""Schedules given by a formula in real t, not by a table."""

import math
from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.schedules.base import SMALLEST_ALPHA, Level, Schedule

Sigma = Annotated[float, Field(gt=0)]

LAST_TIME = 999.0
"""Times run from 0 to 999, those of a table of 1000 steps, so that networks see noise labels of one range."""

FARTHEST = 2000.0
"""No sigma or alpha of float64 has a log-SNR as far from 0."""


class ContinuousSchedule(Schedule):
    """A schedule given by log-SNR as a function of real t in [0, 999]; alpha^2 + sigma^2 = 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        noisiest, cleanest = self.noisiest, self.at(torch.tensor(self.last, dtype=torch.float64, device="cpu"))
        if not noisiest.log_snr < cleanest.log_snr or noisiest.alpha < SMALLEST_ALPHA:
            raise ConfigError(
                f"schedule {self.spec!r}: from t=0 to t=999 its noise must rise and leave some signal; choose other options."
            )

    @abstractmethod
    def log_snr_at(self, t: Tensor) -> Tensor:
        """ln(alpha^2 / sigma^2) at t in [0, 999], float64, falling."""

    @abstractmethod
    def inverse(self, log_snr: Tensor) -> Tensor:
        """The t of a finite log-SNR, float64; one beyond the schedule's range gives any t beyond its ends."""

    @property
    def first(self) -> float:
        return LAST_TIME

    @property
    def last(self) -> float:
        return 0.0

    def alpha_sigma(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of a log-SNR."""
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def at(self, t: Tensor) -> Level:
        """Levels at real t, a tensor of any shape, beyond 999 that of 999; a negative t is the clean image."""
        t = t.to(torch.float64)
        log_snr = self.log_snr_at(t.clamp(0.0, LAST_TIME))
        log_snr = torch.where(t < 0, torch.full_like(log_snr, math.inf), log_snr)
        return Level(t, *self.alpha_sigma(log_snr), log_snr)

    def t_of(self, log_snr: Tensor) -> Tensor:
        """Real t in [0, 999] whose log-SNR this is (clamped to the schedule's range), or -1 for +inf."""
        t = self.inverse(log_snr.to(torch.float64).clamp(-FARTHEST, FARTHEST)).clamp(0.0, LAST_TIME)
        return torch.where(torch.isposinf(log_snr), torch.full_like(t, -1.0), t)

    def draw(self, u: Tensor) -> Tensor:
        """Uniform over [0, 999]."""
        return u.to(torch.float64) * LAST_TIME


class VarianceExploding(ContinuousSchedule):
    """alpha = 1: noise is added to an image that does not fade (Song et al. 2021b, section 3.4)."""

    def alpha_sigma(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), torch.exp(-0.5 * log_snr)

    def start_std(self, level: Level) -> Tensor:
        return level.sigma
