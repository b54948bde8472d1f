"""What the network predicts, and how its output becomes a prediction of x0 and eps.

An objective turns (x_t, level) into the network's input and noise label, names the training target, and turns the
network's output back into x0 and eps. With x_t = alpha x0 + sigma eps each of x0, eps and v determines the others.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import CheckpointError, ConfigError
from ddpm.registry import Component, register
from ddpm.schedules import (
    Level,
    Schedule,
    broadcast,
    need_table,
    posterior_coefficients,
    posterior_variance,
    step_variance,
)


@dataclass(frozen=True)
class Prediction:
    """What a model says of x_t: tensors like x_t, float32 or wider.

    The variance of the reverse step is told in a form that holds for any two levels, so that a sampler may skip steps:
    variance_fraction places its logarithm between beta-tilde (0, fixed-small) and beta (1, fixed-large), as Nichol &
    Dhariwal (2021), equation 15; a number, a tensor like x_t, or None where it is not known. x0_variance, where it is given,
    goes before it: Var(x0 | x_t), a number or a tensor that broadcasts with x_t, from which the best variance of any step
    follows (Bao et al. 2022, Analytic-DPM, theorem 1).
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: float | Tensor | None = 1.0
    x0_variance: float | Tensor | None = None

    def log_variance(
        self, level: Level, previous: Level, fraction: float | Tensor | None = None, floor: Tensor | None = None
    ) -> Tensor:
        """ln of the variance of p(x_s | x_t) for s < t; broadcasts with x_t, float64.

        Args:
            level, previous: t and s; s is not the clean image unless `floor` is given.
            fraction: where given, is used in place of what the prediction says of its variance.
            floor: float64 (), the variance of the step to the clean image, whose beta-tilde is zero: it stands for beta-tilde
                there, and for beta too where the fraction is a number (the clipping of Ho et al. 2020, code).

        A variance below beta-tilde, which no data have, is beta-tilde / (1 + r) where one above it is beta-tilde (1 + r).
        Raises CheckpointError where the variance is not known.
        """
        small, large = posterior_variance(level, previous), step_variance(level, previous)
        share = self.variance_fraction if fraction is None else fraction
        if floor is not None:
            clean = previous.sigma == 0
            small = torch.where(clean, floor, small)
            large = large if isinstance(share, Tensor) else torch.where(clean, floor, large)
        low = beside(small.log(), self.x0)
        if fraction is None and self.x0_variance is not None:
            ratio = beside(posterior_coefficients(level, previous)[0] ** 2 / small, self.x0) * self.x0_variance
            return low + ratio.sign() * ratio.abs().log1p()
        if share is None:
            raise CheckpointError(
                "these weights have no estimate of their variance yet (--diffusion.variance=analytic makes it after the "
                "last step): finish the run, or take a sampler that needs none, such as ddim or ddpm:variance=fixed-small."
            )
        return share * beside(large.log(), self.x0) + (1.0 - share) * low


@dataclass(frozen=True, kw_only=True)
class Objective(Component, kind="objective"):
    """A parameterisation of the denoiser.

    label_scale multiplies t to give the network's noise label (1000 / T where a model was trained with rescaled times).
    """

    needs_signal: ClassVar[bool] = False
    """Whether it divides by alpha, which no level may then have at 0."""

    label_scale: Annotated[float, Field(gt=0)] = 1.0

    def check(self, schedule: Schedule) -> None:
        """Raise ConfigError for a schedule on which it has no meaning."""
        if self.needs_signal and schedule.zero_terminal_snr:
            raise ConfigError(
                f"--diffusion.objective={self.name} divides by alpha, which is 0 at the last time of schedule {schedule.name!r}: use v or x0."
            )

    def condition(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The network's input, like x_t, and its noise label, (B,) float32."""
        label = (level.t * self.label_scale).to(device=x_t.device, dtype=torch.float32)
        return x_t, label.expand(x_t.shape[0])

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Tensor:
        """What the network should output, like x0."""

    @abstractmethod
    def to_prediction(self, output: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Prediction:
        """x0 and eps from the network's output; all like x_t."""

    def x0_factor(self, level: Level, schedule: Schedule) -> Tensor:
        """The squared error of x0 over that of the output, (dx0 / doutput)^2: float64, of the levels' shape."""
        x_t = torch.zeros(level.t.numel(), 1, dtype=torch.float64, device=level.t.device)
        one, zero = (self.to_prediction(torch.full_like(x_t, y), x_t, level, schedule).x0 for y in (1.0, 0.0))
        return (one - zero).square().reshape(level.t.shape)


@register("eps")
class Epsilon(Objective):
    """The network predicts the noise (Ho et al. 2020, equation 14)."""

    needs_signal = True

    def target(self, x0: Tensor, eps: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Tensor:
        return eps

    def to_prediction(self, output: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Prediction:
        at = level.like(x_t)
        return Prediction((x_t - at.sigma * output) / at.alpha, output)


@register("x0")
class Original(Objective):
    """The network predicts the clean image (Ho et al. 2020, section 3.2; Salimans & Ho 2022, section 4)."""

    def target(self, x0: Tensor, eps: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Tensor:
        return x0

    def to_prediction(self, output: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Prediction:
        return Prediction(output, eps_from_x0(output, x_t, level))


@register("v")
class Velocity(Objective):
    """The network predicts v = alpha eps - sigma x0 (Salimans & Ho 2022, section 4 and appendix D)."""

    def target(self, x0: Tensor, eps: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Tensor:
        at = level.like(x0)
        return at.alpha * eps - at.sigma * x0

    def to_prediction(self, output: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Prediction:
        at = level.like(x_t)
        total = at.alpha**2 + at.sigma**2
        return Prediction((at.alpha * x_t - at.sigma * output) / total, (at.sigma * x_t + at.alpha * output) / total)


@register("xprev")
class Previous(Objective):
    """The network predicts the posterior mean of x_{t-1} (Ho et al. 2020, equation 8)."""

    def check(self, schedule: Schedule) -> None:
        super().check(schedule)
        need_table(schedule, f"--diffusion.objective={self.name}, the step before,")

    def target(self, x0: Tensor, eps: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Tensor:
        at_x0, at_x_t = self._coefficients(x0, level, schedule)
        return at_x0 * x0 + at_x_t * x_t

    def to_prediction(self, output: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Prediction:
        at_x0, at_x_t = self._coefficients(x_t, level, schedule)
        x0 = (output - at_x_t * x_t) / at_x0
        return Prediction(x0, eps_from_x0(x0, x_t, level))

    def _coefficients(self, x: Tensor, level: Level, schedule: Schedule) -> tuple[Tensor, Tensor]:
        at_x0, at_x_t = posterior_coefficients(level, schedule.at(level.t - 1.0))
        return broadcast(at_x0, x), broadcast(at_x_t, x)


@register("edm")
class EDM(Objective):
    """The network's input and output have unit variance at every noise level, for data with deviation sigma_data.

    On x / alpha, whose noise level is sigma / alpha (the paper's sigma), the prediction is c_skip x + c_out F(c_in x, c_noise)
    (Karras et al. 2022, equation 7 and table 1); the noise label is ln(sigma / alpha) / 4, times label_scale. An even loss on F
    is the paper's, weighted by 1 / c_out^2 (equation 8).
    """

    needs_signal = True

    sigma_data: Annotated[float, Field(gt=0)] = 0.5

    def condition(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        label = (level.log_snr * (-0.125 * self.label_scale)).to(device=x_t.device, dtype=torch.float32)
        return x_t / self._std(level.like(x_t)), label.expand(x_t.shape[0])

    def target(self, x0: Tensor, eps: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Tensor:
        at = level.like(x0)
        return (at.sigma * x0 - self.sigma_data**2 * at.alpha * eps) / (self.sigma_data * self._std(at))

    def to_prediction(self, output: Tensor, x_t: Tensor, level: Level, schedule: Schedule) -> Prediction:
        at, data = level.like(x_t), self.sigma_data
        scaled = x_t / self._std(at)
        x0 = data * (data * at.alpha * scaled + at.sigma * output) / self._std(at)
        return Prediction(x0, (at.sigma * scaled - data * at.alpha * output) / self._std(at))

    def _std(self, at: Level) -> Tensor:
        """Deviation of x_t, alpha / c_in."""
        return (at.sigma**2 + (at.alpha * self.sigma_data) ** 2).sqrt()


def eps_from_x0(x0: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """The noise that x_t holds if x0 is the clean image: (x_t - alpha x0) / sigma."""
    at = level.like(x_t)
    return (x_t - at.alpha * x0) / at.sigma


def beside(value: Tensor, x: Tensor) -> Tensor:
    """float64 numbers of levels, (B,) or (), shaped to stand beside images x (B, ...), on its device, still float64."""
    value = value.to(x.device)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value
