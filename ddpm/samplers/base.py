"""The sampling loop, and what every sampler shares: the path of noise levels and the thresholding of x0.

To add a sampler is to write one `step` in a file of this folder.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.models.diffusion import Predictor
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.registry import Component, register
from ddpm.samplers.grids import Grid, Trailing
from ddpm.schedules import DiscreteSchedule, Level, Schedule

Denoise = Callable[[Tensor, Level], Prediction]
"""denoise(x, level) -> guided and thresholded prediction: what a step may call, once or more."""

OnStep = Callable[[int, Tensor, Tensor], None]
"""on_step(index, x, x0): called after each step with the new x and the predicted x0."""


class Thresholding(Component, kind="thresholding"):
    """What is done to the predicted x0 before a step uses it."""

    @abstractmethod
    def apply(self, x0: Tensor) -> Tensor:
        """The corrected x0, like x0."""


@register("clip")
class Clip(Thresholding):
    """Clamp x0 to the range of images, [-1, 1] (Ho et al. 2020, code; Ho et al. 2022 call it static thresholding)."""

    def apply(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1.0, 1.0)


@register("none")
class Unbounded(Thresholding):
    """Leave x0 as predicted."""

    def apply(self, x0: Tensor) -> Tensor:
        return x0


@register("model")
class OfModel(Unbounded):
    """What the checkpoint remembers as its own."""


@dataclass(frozen=True, kw_only=True)
class Sampler(Component, kind="sampler"):
    """The shared loop. Options: steps (none: every timestep), the grid of times they fall on, and the thresholding."""

    steps: Annotated[int, Field(ge=1)] | None = 50
    grid: Grid = Trailing()
    thresholding: Thresholding = OfModel()

    @abstractmethod
    def step(
        self,
        x: Tensor,
        level: Level,
        following: Level,
        denoise: Denoise,
        noise: Callable[[], Tensor],
        history: list[Any],
    ) -> Tensor:
        """Go from one noise level to the next.

        Args:
            x: (B, C, H, W) at `level`.
            level, following: single levels, float64 tensors of shape (); the last `following` is the clean image.
            denoise: the model, guided and thresholded.
            noise: gives standard normal noise like x; the same for every call within a step.
            history: the sampler's own memory within one path, empty at its start.

        Returns:
            x at `following`.
        """

    def path(self, schedule: Schedule) -> list[Level]:
        """The levels walked: `steps` falling ones, then the clean image."""
        return [schedule.at(t) for t in self.grid.times(schedule, self.count(schedule))] + [schedule.clean]

    def count(self, schedule: Schedule) -> int:
        """Steps on this schedule; raises ConfigError when `steps` is left open and the schedule has no table."""
        if self.steps is not None:
            return self.steps
        if not isinstance(schedule, DiscreteSchedule):
            raise ConfigError(f"sampler {self.name!r} needs steps=N on the continuous schedule {schedule.name!r}.")
        return schedule.timesteps

    def sample(
        self,
        predictor: Predictor,
        x: Tensor,
        condition: Tensor | None,
        noise: Callable[[int], Tensor],
        thresholding: Thresholding = Clip(),  # noqa: B008 - frozen
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw images: `walk` along `path` from standard normal noise x (B, C, H, W)."""
        path = self.path(predictor.schedule)
        x = x * predictor.schedule.start_std(path[0]).to(x)
        return self.walk(predictor, x, path, condition, noise, thresholding, on_step)

    @torch.inference_mode()
    def walk(
        self,
        predictor: Predictor,
        x: Tensor,
        path: Sequence[Level],
        condition: Tensor | None,
        noise: Callable[[int], Tensor],
        thresholding: Thresholding = Clip(),  # noqa: B008 - frozen
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Take x along any path of levels, falling or (inversion, editing) rising.

        Args:
            predictor: the model, or a guided one.
            x: (B, C, H, W) images at the first level of the path.
            path: single levels, at least two.
            condition: (B,) int64 labels or None.
            noise: noise(i) gives the standard normal noise of step i, like x.
            thresholding: the model's, used where the sampler names none itself.
            on_step: called after each step.

        Returns:
            (B, C, H, W) at the last level; images are about [-1, 1], and not clipped further.
        """
        rule = thresholding if isinstance(self.thresholding, OfModel) else self.thresholding
        seen: list[Tensor] = []

        def denoise(x_t: Tensor, level: Level) -> Prediction:
            found = predictor.predict(x_t, level, condition)
            if not isinstance(rule, Unbounded):
                x0 = rule.apply(found.x0)
                found = replace(found, x0=x0, eps=eps_from_x0(x0, x_t, level))
            seen[:] = [found.x0]
            return found

        history: list[Any] = []
        for i, (level, following) in enumerate(pairwise(path)):
            x = self.step(x, level, following, denoise, lambda i=i: noise(i), history)  # type: ignore[misc]
            if on_step is not None:
                on_step(i, x, seen[0])
        return x
