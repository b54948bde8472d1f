"""DPM-Solver and DPM-Solver++ (Lu et al. 2022a and 2022b); lambda = ln(alpha / sigma), h its growth over a step."""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.samplers.base import Denoise, History, Sampler, first_order, holds_signal
from ddpm.samplers.multistep import Variable, adams_bashforth, remember, usable
from ddpm.schedules import Level, Schedule


def between(level: Level, following: Level, share: float, schedule: Schedule) -> Level:
    """The level at this share of the way in lambda."""
    return schedule.at(schedule.t_of(torch.lerp(level.log_snr, following.log_snr, share)))


def growth(level: Level, following: Level) -> Tensor:
    """h = lambda_s - lambda_t; infinite where either is pure noise or the clean image."""
    return 0.5 * (following.log_snr - level.log_snr)


@register("dpm-solver")
class DPMSolver(Sampler):
    """DPM-Solver-2 or -3, single-step: eps expanded in lambda, with `order` evaluations a step.

    A step from noise that holds no signal (see `holds_signal`) and the step to the clean image are of first order.
    """

    order: Annotated[int, Field(ge=2, le=3)] = 3

    rises = True

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Lu et al. (2022a), algorithms 1 (with r1 = 1/2) and 2 (with r1 = 1/3, r2 = 2/3)."""
        found, h = denoise(x, level), growth(level, following)
        if not (h.isfinite() and holds_signal(level)):
            return first_order(found, following)

        def eps_at(share: float, extra: Tensor | float = 0.0) -> tuple[Tensor, Level]:
            middle = between(level, following, share, history.schedule)
            return denoise(first_order(found, middle) - middle.sigma * extra, middle).eps - found.eps, middle

        if self.order == 2:
            d1, _ = eps_at(0.5)
            return first_order(found, following) - following.sigma * torch.expm1(h) * d1
        d1, _ = eps_at(1 / 3)
        d2, _ = eps_at(2 / 3, 2.0 * (torch.expm1(2 / 3 * h) / (2 / 3 * h) - 1.0) * d1)
        return first_order(found, following) - following.sigma * 1.5 * (torch.expm1(h) / h - 1.0) * d2


@register("dpm++2s")
class DPMSolverPlus2S(Sampler):
    """DPM-Solver++(2S), single-step: x0 expanded in lambda, two evaluations a step.

    A step from pure noise (alpha = 0) and the step to the clean image are of first order.
    """

    rises = True

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Lu et al. (2022b), algorithm 1 with r = 1/2."""
        found, h = denoise(x, level), growth(level, following)
        if not h.isfinite():
            return first_order(found, following)
        middle = between(level, following, 0.5, history.schedule)
        d1 = denoise(first_order(found, middle), middle).x0 - found.x0
        return first_order(found, following) - following.alpha * torch.expm1(-h) * d1


@register("dpm++2m")
class DPMSolverPlus2M(Sampler):
    """DPM-Solver++(2M), multistep: the line through two predictions of x0 in lambda, one evaluation a step.

    eta = 0 is deterministic, eta = 1 is SDE-DPM-Solver++(2M). The step to the clean image is of first order.
    """

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def rises(self) -> bool:
        return self.eta == 0

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Lu et al. (2022b), algorithm 2, and its SDE version for eta = 1."""
        found, h = denoise(x, level), growth(level, following)
        kept = torch.exp(-self.eta * h) if self.eta else torch.ones_like(h)
        remember(history, level, found.x0, 2)
        nodes = usable(history, history.remaining)
        x = following.alpha * found.x0 + following.sigma * kept * found.eps
        if len(nodes) == 2 and h.isfinite():
            (_, newer), (before, older) = nodes
            share = h / growth(before, level)
            x = x - 0.5 * following.alpha * torch.expm1(-(1.0 + self.eta) * h) * share * (newer - older)
        if self.eta and not following.is_clean:
            x = x + following.sigma * (1.0 - kept**2).sqrt() * noise()
        return x


@register("dpm++3m")
class DPMSolverPlus3M(Sampler):
    """DPM-Solver++(3M), multistep: the parabola through three predictions of x0 in lambda, one evaluation a step.

    The authors' code, and those that follow it, halve the parabola's curvature, which leaves them second order.
    """

    rises = True

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Lu et al. (2022b), proposition 4.1 (the exact solution), with a polynomial of degree 2."""
        return adams_bashforth(denoise(x, level), level, following, history, 3, "x0", Variable())
