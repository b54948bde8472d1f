"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, and what follows from two noise levels.

A schedule gives `Level`s for real t. The tables of Ho et al. (2020) are one kind (`DiscreteSchedule`): t counts from 0
(their t = 1) to T - 1, and t = -1 is the clean image. Everything is float64.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.registry import Component


@dataclass(frozen=True)
class Level:
    """Noise levels of a batch, or one for all: float64 tensors of shape (B,) or ().

    log_snr is ln(alpha^2 / sigma^2); it is +inf for the clean image (t = -1) and -inf for pure noise.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor

    def like(self, x: Tensor) -> "Level":
        """The same levels shaped to broadcast over images x (B, C, H, W), on its device, in its dtype."""
        return Level(*(broadcast(v, x) for v in (self.t, self.alpha, self.sigma, self.log_snr)))

    def expand(self, n: int) -> "Level":
        """One level for n images: tensors of shape (n,)."""
        return Level(*(v.expand(n) for v in (self.t, self.alpha, self.sigma, self.log_snr)))

    @property
    def is_clean(self) -> bool:
        """Whether a single level is the clean image."""
        return bool(self.sigma == 0)


class Schedule(Component, kind="schedule"):
    """Noise levels as a function of t."""

    @property
    @abstractmethod
    def first(self) -> float:
        """The t of the noisiest level, where sampling starts."""

    @property
    @abstractmethod
    def last(self) -> float:
        """The t of the least noisy level; the clean image stands below it."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from, at the noisiest level."""
        return float(self.start_std(self.noisiest))

    def start_std(self, level: Level) -> Tensor:
        """Standard deviation of the noise that takes the place of x at a level, where sampling starts there."""
        return torch.ones_like(level.sigma)

    @property
    def noisiest(self) -> Level:
        """The level at `first`, on the CPU."""
        return self.at(torch.tensor(self.first, dtype=torch.float64, device="cpu"))

    @property
    def clean(self) -> Level:
        """The level without noise, where sampling ends."""
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return Level(-one, one, zero, torch.full_like(one, math.inf))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the noisiest level holds no signal: alpha = 0, log-SNR -inf (Lin et al. 2024)."""
        return not self.noisiest.alpha

    @abstractmethod
    def at(self, t: Tensor) -> Level:
        """Levels at real times t, a tensor of any shape; a negative t is the clean image."""

    @abstractmethod
    def t_of(self, log_snr: Tensor) -> Tensor:
        """The time at which ln(alpha^2 / sigma^2) has this value: the inverse of `at`."""

    @abstractmethod
    def draw(self, u: Tensor) -> Tensor:
        """Training times from uniform numbers in (0, 1)."""


class DiscreteSchedule(Schedule):
    """A schedule given by a table of betas (Ho et al. 2020, section 2); between its entries log-SNR is interpolated.

    The last beta may be 1: then the last entry is noise alone, and alpha falls to it in a straight line.
    """

    timesteps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = self.alphas_cumprod.sqrt()
        faint = alpha[-2] < SMALLEST_ALPHA or 0 < alpha[-1] < SMALLEST_ALPHA
        if not (self.log_snr.diff() < 0).all() or self.log_snr[0].isinf() or faint:
            raise ConfigError(
                f"schedule {self.spec!r}: its signal does not fall step by step from 1 to above 0; choose other betas or timesteps."
            )

    @abstractmethod
    def make_betas(self) -> Tensor:
        """(T,) float64: the variances beta_1 ... beta_T."""

    @cached_property
    def betas(self) -> Tensor:
        """(T,) float64: variance added by each step."""
        with torch.device("cpu"):  # whatever device a model is being built on
            return self.make_betas()

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64: the product of (1 - beta) up to each step (Ho et al. 2020, below equation 4)."""
        return torch.cumprod(1.0 - self.betas, dim=0)

    @cached_property
    def log_snr(self) -> Tensor:
        """(T,) float64: ln(alphas_cumprod / (1 - alphas_cumprod)), falling."""
        return torch.log(self.alphas_cumprod) - torch.log1p(-self.alphas_cumprod)

    @cached_property
    def floor_variance(self) -> Tensor:
        """float64 (): beta-tilde of the second step, which stands for the zero of the first (Ho et al. 2020, code)."""
        t = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
        return posterior_variance(self.at(t[0]), self.at(t[1]))

    @property
    def first(self) -> float:
        return float(self.timesteps - 1)

    @property
    def last(self) -> float:
        return 0.0

    def at(self, t: Tensor) -> Level:
        """Levels at real t in [0, T - 1]; an integer t gives the table's own entry, a negative t the clean image."""
        t = t.to(torch.float64)
        alpha2, log_snr = _tables(self, t.device)
        low = t.floor().clamp(0, self.timesteps - 1).long()
        high = t.ceil().clamp(0, self.timesteps - 1).long()
        along = (t - low).clamp(0, 1)
        between = torch.lerp(log_snr[low], log_snr[high], along)
        fading = torch.logit(alpha2[low] * (1.0 - along) ** 2)
        between = torch.where(alpha2[high] == 0, fading, between)
        exact = low == high
        value = torch.where(exact, log_snr[low], between)
        alpha = torch.where(exact, alpha2[low].sqrt(), torch.sigmoid(value).sqrt())
        sigma = torch.where(exact, (1.0 - alpha2[low]).sqrt(), torch.sigmoid(-value).sqrt())
        clean = t < 0
        return Level(
            t,
            torch.where(clean, torch.ones_like(alpha), alpha),
            torch.where(clean, torch.zeros_like(sigma), sigma),
            torch.where(clean, torch.full_like(value, math.inf), value),
        )

    def t_of(self, log_snr: Tensor) -> Tensor:
        """Real t in [0, T - 1] whose log-SNR this is (clamped to the table's range), or -1 for +inf."""
        alpha2, table = _tables(self, log_snr.device)
        rising = -table
        index = torch.searchsorted(rising, -log_snr.to(torch.float64)).clamp(1, self.timesteps - 1)
        above, below = table[index - 1], table[index]
        along = (above - log_snr) / (above - below)
        fading = 1.0 - (torch.sigmoid(log_snr) / alpha2[index - 1]).sqrt()
        along = torch.where(alpha2[index] == 0, fading, along)
        t = (index - 1) + along.clamp(0, 1)
        return torch.where(torch.isposinf(log_snr), torch.full_like(t, -1.0), t)

    def draw(self, u: Tensor) -> Tensor:
        """Uniform over {0, ..., T - 1}, as Ho et al. (2020), algorithm 1."""
        return (u * self.timesteps).floor().clamp(max=self.timesteps - 1)


@cache
def _tables(schedule: DiscreteSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """alphas_cumprod and log_snr on a device, moved there once."""
    return schedule.alphas_cumprod.to(device), schedule.log_snr.to(device)


SMALLEST_ALPHA = torch.finfo(torch.float32).tiny
"""Below it float32 images hold no signal, and x0 = (x_t - sigma eps) / alpha has no meaning."""

Timesteps = Annotated[int, Field(ge=2, le=100_000)]
Beta = Annotated[float, Field(gt=0, lt=1)]


def need_table(schedule: Schedule, what: str) -> DiscreteSchedule:
    """The schedule as a table of steps; raises ConfigError, for `what`, where it is none."""
    if not isinstance(schedule, DiscreteSchedule):
        raise ConfigError(
            f"{what} needs a schedule of numbered steps, such as linear or cosine; {schedule.name!r} is continuous."
        )
    return schedule


def step_variance(level: Level, previous: Level) -> Tensor:
    """Variance of q(x_t | x_s) for s < t: sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2; beta_t for neighbouring steps.

    Written as -sigma_t^2 expm1(log_snr_t - log_snr_s), which does not cancel (Kingma et al. 2021, equation 20).
    """
    return -(level.sigma**2) * torch.expm1(level.log_snr - previous.log_snr)


def posterior(x0: Tensor, x_t: Tensor, level: Level, previous: Level) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x0) for s < t (Ho et al. 2020, equations 6 and 7, for any two levels).

    Args:
        x0, x_t: (B, C, H, W).
        level, previous: levels t and s; s may be the clean image, then the mean is x0 and the variance 0.

    Returns:
        The mean, like x0, and the variance (float64, of the levels' shape).
    """
    at_x0, at_x_t = posterior_coefficients(level, previous)
    mean = broadcast(at_x0, x0) * x0 + broadcast(at_x_t, x0) * x_t
    return mean, posterior_variance(level, previous)


def posterior_coefficients(level: Level, previous: Level) -> tuple[Tensor, Tensor]:
    """Weights of x0 and of x_t in the mean of q(x_s | x_t, x0); float64, of the levels' shape."""
    variance_t = level.sigma**2
    at_x0 = previous.alpha * step_variance(level, previous) / variance_t
    at_x_t = (level.alpha / previous.alpha) * previous.sigma**2 / variance_t
    return at_x0, at_x_t


def posterior_variance(level: Level, previous: Level) -> Tensor:
    """Variance of q(x_s | x_t, x0): beta-tilde of Ho et al. (2020), equation 7; float64, of the levels' shape."""
    return step_variance(level, previous) * previous.sigma**2 / level.sigma**2


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """A number per image, (B,), or one for all, (), shaped to multiply images x (B, ...), on its device and in its dtype."""
    value = value.to(device=x.device, dtype=x.dtype)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value
