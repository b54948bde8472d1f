"""Euler's and Heun's methods with churn (Karras et al. 2022, algorithm 2), on any schedule.

The paper works on x / alpha at the noise level rho = sigma / alpha, its sigma; so do the options here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.samplers.base import Denoise, History, Sampler, first_order, holds_signal
from ddpm.schedules import Level, step_variance


@dataclass(frozen=True, kw_only=True)
class Churned(Sampler):
    """A step that first raises the noise level rho by the factor 1 + min(s_churn / steps, sqrt(2) - 1).

    `steps` is the sampler's, also where a part of them is walked, as editing does.

    Only levels with s_tmin <= rho <= s_tmax (none: any) are raised, and none beyond the schedule's noisiest. The noise
    added has deviation s_noise.
    """

    s_churn: Annotated[float, Field(ge=0)] = 0.0
    s_tmin: Annotated[float, Field(ge=0)] = 0.0
    s_tmax: Annotated[float, Field(gt=0)] | None = None
    s_noise: Annotated[float, Field(gt=0)] = 1.0

    @property
    def rises(self) -> bool:
        return self.s_churn == 0

    def churned(self, x: Tensor, level: Level, noise: Callable[[], Tensor], history: History) -> tuple[Tensor, Level]:
        """x at the raised level, and that level (algorithm 2, lines 4 to 6)."""
        rho = level.sigma / level.alpha
        gamma = min(self.s_churn / self.count(history.schedule), 2**0.5 - 1) if self.s_churn else 0.0
        if gamma == 0 or not self.s_tmin <= rho <= (self.s_tmax or rho) or not rho.isfinite():
            return x, level
        raised = history.schedule.at(history.schedule.t_of(-2.0 * (rho * (1.0 + gamma)).log()))
        if not raised.log_snr < level.log_snr:
            return x, level
        added = step_variance(raised, level).sqrt() * self.s_noise
        return raised.alpha / level.alpha * x + added * noise(), raised


@register("euler")
class Euler(Churned):
    """Euler's method in rho, which is DDIM; with s_churn the noise level rises before each step."""

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Karras et al. (2022), algorithm 2 without lines 9 to 11."""
        x, level = self.churned(x, level, noise, history)
        return first_order(denoise(x, level), following)


@register("heun")
class Heun(Churned):
    """Heun's method in rho: second order, two evaluations a step; with s_churn the noise level rises before each step.

    A step from noise that holds no signal (see `holds_signal`) and the step to the clean image are Euler's.
    """

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Karras et al. (2022), algorithm 2: x + (rho_s - rho_t) (eps + eps') / 2, for x / alpha."""
        x, level = self.churned(x, level, noise, history)
        found = denoise(x, level)
        euler = first_order(found, following)
        if following.is_clean or not holds_signal(level):
            return euler
        move = following.sigma - following.alpha * level.sigma / level.alpha
        return euler + 0.5 * move * (denoise(euler, following).eps - found.eps)
