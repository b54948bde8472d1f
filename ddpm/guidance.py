"""Guidance: a predictor made from another one, with the same interface."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ddpm.models.diffusion import NO_LABEL, Predictor
from ddpm.objectives import Prediction
from ddpm.schedules import Level, Schedule

V = TypeVar("V", float | Tensor, float | Tensor | None)


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022): eps = eps_none + weight (eps_label - eps_none).

    weight 1 is the conditional model, 0 the unconditional one; the paper's w is weight - 1 (its equation 6).
    """

    model: Predictor
    weight: float

    @property
    def schedule(self) -> Schedule:
        """The guided model's schedule."""
        return self.model.schedule

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """Both predictions in one batch; guiding eps and x0 by the same weight is the same thing, since both are linear."""
        assert condition is not None, "guidance needs labels"
        both = self.model.predict(
            torch.cat([x_t, x_t]),
            level if level.t.ndim == 0 else Level(*(torch.cat([v, v]) for v in vars(level).values())),
            torch.cat([condition, torch.full_like(condition, NO_LABEL)]),
        )
        (x0, x0_none), (eps, eps_none) = both.x0.chunk(2), both.eps.chunk(2)
        return Prediction(
            torch.lerp(x0_none, x0, self.weight),
            torch.lerp(eps_none, eps, self.weight),
            _first_half(both.variance_fraction, len(x_t)),
            _first_half(both.x0_variance, len(x_t)),
        )


def _first_half(value: V, n: int) -> V:
    """The conditional part of what was predicted for 2 n images together."""
    return value[:n] if isinstance(value, Tensor) and value.ndim and len(value) == 2 * n else value
