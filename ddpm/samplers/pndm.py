"""Pseudo numerical methods for diffusion models on manifolds (Liu et al. 2022)."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.registry import register
from ddpm.samplers.base import Denoise, History, Sampler, first_order, holds_signal
from ddpm.schedules import DiscreteSchedule, Level, Schedule

_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the last predictions for equal steps, newest first."""


@register("pndm")
class PNDM(Sampler):
    """Classical solvers for eps in time, whose steps are DDIM's: second order; it needs equal strides in time.

    After the warm-up, the four-step Adams-Bashforth method with one evaluation a step (PLMS). warm_up=runge-kutta: three
    Runge-Kutta steps of four evaluations (F-PNDM); warm_up=euler: one improved Euler step of two, then rising order (PLMS
    alone). A step from noise that holds no signal (see `holds_signal`), and one of the warm-up to the clean image, are of first
    order.
    """

    warm_up: Literal["runge-kutta", "euler"] = "runge-kutta"

    rises = True

    def check(self, path: Sequence[Level], schedule: Schedule) -> None:
        super().check(path, schedule)
        times = [float(level.t) for level in path if not level.is_clean]
        strides = [abs(after - before) for before, after in pairwise(times)]
        rounding = 1.0 if isinstance(schedule, DiscreteSchedule) else 1e-5 * abs(schedule.first - schedule.last)
        if strides and max(strides) - min(strides) > rounding:
            raise ConfigError(
                f"sampler {self.name!r} needs equal strides in time, and these are {min(strides):g} to {max(strides):g}: "
                "walk from the noisiest level by grid=trailing, leading or linspace, or take another sampler."
            )

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Liu et al. (2022), section 3.3: equation 9 carries x along eps, which a classical solver gives."""
        found = denoise(x, level)
        history.insert(0, found.eps)
        del history[4:]
        if not holds_signal(level):
            return first_order(found, following)

        def to(end: Level, eps: Tensor) -> Tensor:
            ratio = end.alpha / level.alpha
            return ratio * x + (end.sigma - ratio * level.sigma) * eps

        if len(history) < (4 if self.warm_up == "runge-kutta" else 2):
            if following.is_clean:
                return to(following, found.eps)
            if self.warm_up == "euler":
                return to(following, (found.eps + denoise(to(following, found.eps), following).eps) / 2)
            middle = history.schedule.at((level.t + following.t) / 2)
            second = denoise(to(middle, found.eps), middle).eps
            third = denoise(to(middle, second), middle).eps
            fourth = denoise(to(following, third), following).eps
            return to(following, (found.eps + 2 * second + 2 * third + fourth) / 6)
        weights = _ADAMS_BASHFORTH[len(history) - 1]
        return to(following, sum((w * e for w, e in zip(weights, history, strict=True)), 0 * found.eps))
