"""Linear multistep methods: a polynomial through the predictions of earlier steps, integrated over the next.

In x_s / alpha_s = x_t / alpha_t + integral of eps d(rho), rho = sigma / alpha, and in x_s / sigma_s = x_t / sigma_t +
integral of x0 d(1 / rho), the prediction is replaced by the polynomial through its last values. Samplers differ in which
prediction that is, and in the variable of the polynomial.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ddpm.objectives import Prediction
from ddpm.registry import register
from ddpm.samplers.base import Denoise, History, Sampler, first_order
from ddpm.schedules import Level, Schedule

Predicted = Literal["x0", "eps"]
Node = tuple[Level, Tensor]
"""A level, and the prediction (x0 or eps) made there."""

_TAU, _WEIGHT = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(24))
_TAU, _WEIGHT = (_TAU + 1.0) / 2.0, _WEIGHT / 2.0  # Gauss-Legendre on [0, 1]


class Variable:
    """The variable of the polynomial, as a number at each level and back to rho = sigma / alpha: here ln(rho).

    `ends`: whether it stays finite at the clean image, so that the order need not fall on the way there.
    """

    ends = False

    def of(self, level: Level) -> Tensor:
        return -0.5 * level.log_snr

    def rho(self, value: Tensor) -> Tensor:
        return value.exp()


class Rho(Variable):
    """rho itself."""

    ends = True

    def of(self, level: Level) -> Tensor:
        return level.sigma / level.alpha

    def rho(self, value: Tensor) -> Tensor:
        return value


@dataclass
class Time(Variable):
    """The schedule's time t."""

    schedule: Schedule

    def of(self, level: Level) -> Tensor:
        return level.t

    def rho(self, value: Tensor) -> Tensor:
        level = self.schedule.at(value)
        return level.sigma / level.alpha


def correction(
    level: Level, following: Level, nodes: Sequence[Node], predicted: Predicted, variable: Variable
) -> Tensor | float:
    """What the polynomial through `nodes` adds to the first-order step from `level`, whose own prediction is the first.

    With c the variable and l_j the Lagrange polynomials, the weight of node j beyond first order is the integral over the
    step of l_j'(c) gap(c) dc, where gap(c) = sigma_s - alpha_s rho(c) for eps and alpha_s - sigma_s / rho(c) for x0
    (integration by parts). Gauss quadrature gives it to rounding. Nodes at infinite c are left out.
    """
    start, end = variable.of(level), variable.of(following)
    taus = [(variable.of(at) - start) / (end - start) for at, _ in nodes]
    finite = [(float(tau), value) for tau, (_, value) in zip(taus, nodes, strict=True) if tau.isfinite()]
    if len(finite) < 2 or not (end - start).isfinite():
        return 0.0
    rho = variable.rho(start + (end - start) * _TAU)
    gap = following.sigma - following.alpha * rho if predicted == "eps" else following.alpha - following.sigma / rho
    moments = torch.stack([k * (_WEIGHT * _TAU ** max(k - 1, 0) * gap).sum() for k in range(len(finite))])
    return weighted([tau for tau, _ in finite], moments, [value for _, value in finite])


def weighted(taus: Sequence[float], moments: Tensor, values: Sequence[Tensor]) -> Tensor:
    """sum_j v_j m_j with the weights v that give the functional on 1, tau, tau^2, ... these moments."""
    powers = torch.tensor(taus, dtype=torch.float64) ** torch.arange(len(taus))[:, None]
    weights = torch.linalg.solve(powers, moments)
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros_like(values[0]))


def remember(history: History, level: Level, value: Any, order: int) -> None:
    """Put what was predicted at a level first in the history, which keeps `order` entries."""
    history.insert(0, (level, value))
    del history[order:]


def usable(history: History, remaining: int) -> list[Any]:
    """The entries for a step with so many steps left; on the way to the clean image no more than that.

    So the order falls to 1 (Lu et al. 2022b and Zhao et al. 2023, code), and the last step gives x0.
    """
    return history[:remaining] if history.ends_clean else history[:]


def adams_bashforth(
    found: Prediction,
    level: Level,
    following: Level,
    history: History,
    order: int,
    predicted: Predicted,
    variable: Variable,
) -> Tensor:
    """The step of order `order`, or less until so many predictions are there: first order, and what is added to it."""
    remember(history, level, getattr(found, predicted), order)
    nodes = history if variable.ends else usable(history, history.remaining)
    return first_order(found, following) + correction(level, following, nodes, predicted, variable)


@register("lms")
class LMS(Sampler):
    """Adams-Bashforth: eps as a polynomial in rho (k-diffusion's linear multistep; rho AB of Zhang & Chen 2023)."""

    order: Annotated[int, Field(ge=1, le=4)] = 4

    rises = True

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Zhang & Chen (2023), proposition 3: in rho the equation is dy = eps d(rho)."""
        return adams_bashforth(denoise(x, level), level, following, history, self.order, "eps", Rho())


@register("deis")
class DEIS(Sampler):
    """Exponential integrator: eps as a polynomial in time, or in ln(rho) (Zhang & Chen 2023).

    Order r + 1 is t AB of their degree r.
    """

    order: Annotated[int, Field(ge=1, le=4)] = 3
    variable: Literal["t", "log-rho"] = "t"

    rises = True

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Zhang & Chen (2023), equations 14 and 15."""
        variable = Time(history.schedule) if self.variable == "t" else Variable()
        return adams_bashforth(denoise(x, level), level, following, history, self.order, "eps", variable)
