"""Variances of the reverse process: fixed, given by the network, or estimated from data."""

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ddpm.objectives import Prediction, beside
from ddpm.registry import Component, register
from ddpm.schedules import Level, Schedule, need_table, posterior_coefficients, posterior_variance


class Variance(Component, kind="variance"):
    """How the variance of p(x_s | x_t) is known.

    learned: from the network, which gives as many channels again; estimated: from data, when the weights are there.
    """

    learned: ClassVar[bool] = False
    estimated: ClassVar[bool] = False

    def check(self, schedule: Schedule) -> None:
        """Raise ConfigError for a schedule on which it has no meaning."""

    @abstractmethod
    def attach(self, found: Prediction, values: Tensor | None, level: Level, schedule: Schedule) -> Prediction:
        """The prediction with its variance.

        `values` are the network's further channels, like x_t, where the variance is learned; the estimate, (T,) float64
        and NaN until it is made, where it is estimated; else None.
        """


@register("fixed-large")
class FixedLarge(Variance):
    """beta, the best for data that are white noise (Ho et al. 2020, section 3.2)."""

    def attach(self, found: Prediction, values: Tensor | None, level: Level, schedule: Schedule) -> Prediction:
        return replace(found, variance_fraction=1.0)


@register("fixed-small")
class FixedSmall(Variance):
    """beta-tilde, the best for data that are one image (Ho et al. 2020, section 3.2)."""

    def attach(self, found: Prediction, values: Tensor | None, level: Level, schedule: Schedule) -> Prediction:
        return replace(found, variance_fraction=0.0)


@register("learned-range")
class LearnedRange(Variance):
    """The network gives v in [-1, 1]: (v + 1) / 2 is the place of the log-variance between beta-tilde and beta (Nichol &
    Dhariwal 2021, equation 15; v is not limited to the range)."""

    learned = True

    def attach(self, found: Prediction, values: Tensor | None, level: Level, schedule: Schedule) -> Prediction:
        assert values is not None
        return replace(found, variance_fraction=(values + 1.0) / 2.0)


@register("learned")
class Learned(Variance):
    """The network gives the log-variance of the step from t to t - 1 (Nichol & Dhariwal 2021, code).

    Other steps have the variance that follows: Var(x_s | x_t) = beta-tilde + c^2 Var(x0 | x_t), with c the weight of x0 in
    the posterior mean, is solved for Var(x0 | x_t) at s = t - 1 and taken at s.
    """

    learned = True

    def check(self, schedule: Schedule) -> None:
        need_table(schedule, f"--diffusion.variance={self.name}")

    def attach(self, found: Prediction, values: Tensor | None, level: Level, schedule: Schedule) -> Prediction:
        assert values is not None
        previous, floor = schedule.at(level.t - 1.0), need_table(schedule, self.name).floor_variance
        small = torch.where(previous.sigma == 0, floor, posterior_variance(level, previous))
        per_x0 = posterior_coefficients(level, previous)[0] ** 2 / small
        excess = values.double() - beside(small.log(), values)
        return replace(found, x0_variance=excess.sign() * excess.abs().expm1() / beside(per_x0, values))


@register("analytic")
class Analytic(Variance):
    """The best variance that is one number a step: Var(x0 | x_t) = (sigma / alpha)^2 (1 - E |eps|^2 / d), with eps the model's
    prediction (Bao et al. 2022, Analytic-DPM, theorem 1 and its Monte Carlo estimate).

    The mean square is estimated for each timestep from so many `images` of the training set, after the last step. Var(x0 | x_t)
    is kept to [0, 1], the range for pixels in [-1, 1], as in their code. In the step to the clean image it is the whole variance,
    or the floor where that is more.
    """

    estimated = True
    images: Annotated[int, Field(ge=1)] = 64

    def check(self, schedule: Schedule) -> None:
        need_table(schedule, f"--diffusion.variance={self.name}")

    def attach(self, found: Prediction, values: Tensor | None, level: Level, schedule: Schedule) -> Prediction:
        assert values is not None
        if values[0].isnan():
            return replace(found, variance_fraction=None)
        t = level.t.to(values.device).clamp(0, len(values) - 1)
        low = t.floor().long()
        eps_square = torch.lerp(values[low], values[(low + 1).clamp(max=len(values) - 1)], t - low)
        of_x0 = (level.sigma / level.alpha) ** 2 * (1.0 - eps_square.to(level.sigma.device))
        # In the step to the clean image `log_variance` adds the floor: it is taken off here, so that the larger of the two stays.
        floor = need_table(schedule, self.name).floor_variance * (level.t < 1)
        return replace(found, x0_variance=beside((of_x0.clamp(0.0, 1.0) - floor).clamp(min=0.0), found.x0))
