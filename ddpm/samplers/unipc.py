"""UniPC: a unified predictor-corrector (Zhao et al. 2023)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddpm.objectives import Prediction, eps_from_x0
from ddpm.registry import register
from ddpm.samplers.base import Denoise, History, Sampler, first_order, holds_signal
from ddpm.samplers.dpm_solver import growth
from ddpm.samplers.multistep import Node, Variable, correction, remember, usable
from ddpm.schedules import Level


@register("unipc")
class UniPC(Sampler):
    """UniPC-p, multistep: a predictor of order p, corrected to p + 1 by the evaluation of the next step.

    One evaluation a step; the last x is not corrected. `b` is the function B(h), which matters where one node besides the
    step's start is used; `predicted` is what the polynomial in lambda goes through.
    """

    order: Annotated[int, Field(ge=1, le=3)] = 3
    b: Literal["bh1", "bh2"] = "bh2"
    predicted: Literal["x0", "eps"] = "x0"

    rises = True

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: History
    ) -> Tensor:
        """Zhao et al. (2023), algorithms 1 (UniC-p) for x and 2 (UniP-p) for what follows."""
        found = denoise(x, level)
        if history:
            before, start = history[0]
            used = usable(history, history.remaining + 1)
            x = first_order(start, level) + self.added(before, level, [*used, (level, found)], short=len(used) == 1)
            found = self.beside(found, x, level)
        remember(history, level, found, self.order)
        used = usable(history, history.remaining)
        return first_order(found, following) + self.added(level, following, used, short=len(used) == 2)

    def added(
        self, level: Level, following: Level, past: Sequence[tuple[Level, Prediction]], short: bool
    ) -> Tensor | float:
        """What the nodes add to the first-order step; `short`: two of them, with 1/2 as the weight (their appendix)."""
        nodes: list[Node] = [(at, getattr(found, self.predicted)) for at, found in past]
        if self.predicted == "eps" and not holds_signal(level):
            return 0.0
        h = growth(level, following)
        if not short or not h.isfinite():
            return correction(level, following, nodes, self.predicted, Variable())
        (_, here), (there, other) = nodes
        signed, scale = (-h, following.alpha) if self.predicted == "x0" else (h, following.sigma)
        b = signed if self.b == "bh1" else torch.expm1(signed)
        return -0.5 * scale * b * h / growth(level, there) * (other - here)

    def beside(self, found: Prediction, x: Tensor, level: Level) -> Prediction:
        """The prediction kept as it was made, and beside it what the corrected x then holds of the other."""
        if self.predicted == "x0":
            return replace(found, eps=eps_from_x0(found.x0, x, level))
        at = level.like(x)
        return replace(found, x0=(x - at.sigma * found.eps) / at.alpha)
