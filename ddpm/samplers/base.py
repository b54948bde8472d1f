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
from ddpm.registry import Component
from ddpm.samplers.grids import Grid, Trailing
from ddpm.samplers.thresholding import Clip, OfModel, Thresholding, Unbounded
from ddpm.schedules import DiscreteSchedule, Level, Schedule

Denoise = Callable[[Tensor, Level], Prediction]
"""denoise(x, level) -> guided and thresholded prediction: what a step may call, once or more."""

OnStep = Callable[[int, Tensor, Tensor], None]
"""on_step(index, x, x0): called after each step with the new x and the predicted x0."""


class History(list[Any]):
    """A sampler's memory within one walk: a list of its own, empty at the start; and where the walk stands.

    schedule: the model's; remaining: steps, with the one under way; ends_clean: whether the
    last level is the clean image.
    """

    def __init__(self, schedule: Schedule, path: Sequence[Level]) -> None:
        super().__init__()
        self.schedule = schedule
        self.remaining = len(path) - 1
        self.ends_clean = path[-1].is_clean


@dataclass(frozen=True, kw_only=True)
class Sampler(Component, kind="sampler"):
    """The shared loop. Options: steps (none: every timestep), the grid of times they fall on, and the thresholding."""

    steps: Annotated[int, Field(ge=1)] | None = 50
    grid: Grid = Trailing()
    thresholding: Thresholding = OfModel()

    @abstractmethod
    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: Any
    ) -> Tensor:
        """Go from one noise level to the next.

        Args:
            x: (B, C, H, W) at `level`, which is never the clean image but may be pure noise (alpha = 0).
            level, following: single levels, float64 tensors of shape (); the last `following` is the clean image.
            denoise: the model, guided and thresholded.
            noise: gives standard normal noise like x; the same for every call within a step.
            history: the walk's `History`: a list for what the sampler remembers, empty at the start.

        Returns:
            x at `following`.
        """

    @property
    def rises(self) -> bool:
        """Whether steps may go to noisier levels, as inversion does: true of solvers that draw no noise."""
        return False

    def path(self, schedule: Schedule) -> list[Level]:
        """The levels walked: `steps` falling ones, then the clean image; raises ConfigError for options that do not fit."""
        path = [schedule.at(t) for t in self.grid.times(schedule, self.count(schedule))] + [schedule.clean]
        self.check(path, schedule)
        return path

    def count(self, schedule: Schedule) -> int:
        """Steps on this schedule; raises ConfigError when `steps` is left open and the schedule has no table."""
        if self.steps is not None:
            return self.steps
        if not isinstance(schedule, DiscreteSchedule):
            raise ConfigError(f"sampler {self.name!r} needs steps=N on the continuous schedule {schedule.name!r}.")
        return schedule.timesteps

    def evaluations(self, schedule: Schedule) -> int:
        """How often the model is asked along `path`: found by walking it with a model that counts.

        Guidance multiplies it by the networks that it runs.
        """
        counter, x = _Counter(schedule), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        self.walk(counter, x, self.path(schedule), None, lambda i: x)
        return counter.calls

    def check(self, path: Sequence[Level], schedule: Schedule) -> None:
        """Raise ConfigError for a path that this sampler cannot walk."""
        if not self.rises and any(level.log_snr > following.log_snr for level, following in pairwise(path)):
            raise ConfigError(
                f"sampler {self.name!r} walks from noise to image only; from image to noise take one that draws none, such as ddim:eta=0."
            )

    def corrected(self, found: Prediction, x: Tensor, level: Level, rule: Thresholding) -> Prediction:
        """The prediction with x0 thresholded, and eps as x holds it beside that x0."""
        x0 = rule.apply(found.x0)
        return replace(found, x0=x0, eps=eps_from_x0(x0, x, level))

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

    def invert(
        self,
        predictor: Predictor,
        x: Tensor,
        condition: Tensor | None = None,
        thresholding: Thresholding = Clip(),  # noqa: B008 - frozen
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images x (B, C, H, W) to the standard normal noise that `sample` makes them from: `walk` along `path` reversed.

        Raises ConfigError: a sampler that draws noise.
        """
        path = self.path(predictor.schedule)[::-1]
        x = self.walk(predictor, x, path, condition, lambda i: torch.zeros_like(x), thresholding, on_step)
        return x / predictor.schedule.start_std(path[-1]).to(x)

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

        A model says nothing of the clean image itself. A step that starts there takes x for x0, and for eps what the
        model finds in x at the level that follows.

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

        Raises ConfigError: a path that this sampler cannot walk.
        """
        self.check(path, predictor.schedule)
        rule = thresholding if isinstance(self.thresholding, OfModel) else self.thresholding
        seen: list[Tensor] = []

        def denoise(x_t: Tensor, level: Level) -> Prediction:
            found = predictor.predict(x_t, level, condition)
            if not isinstance(rule, Unbounded):
                found = self.corrected(found, x_t, level, rule)
            seen[:] = [found.x0]
            return found

        history = History(predictor.schedule, path)
        for i, (level, following) in enumerate(pairwise(path)):
            if level.is_clean:
                x = following.alpha * x + following.sigma * denoise(x, following).eps
            else:
                x = self.step(x, level, following, denoise, lambda i=i: noise(i), history)  # type: ignore[misc]
            history.remaining -= 1
            if on_step is not None:
                on_step(i, x, seen[0])
        return x


def first_order(found: Prediction, following: Level) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps: the deterministic DDIM step (Song et al. 2021, equation 12), finite at every level.

    It is the first-order step of every solver here, whatever it integrates, and where alpha is 0 or the image clean the only one.
    """
    return following.alpha * found.x0 + following.sigma * found.eps


def holds_signal(level: Level) -> bool:
    """Whether a step from this level may be of higher order in eps: ln(alpha / sigma) is at least -5.1.

    Below it, where Lu et al. (2022a, code) cut the cosine schedule off, x is noise, and a step multiplies what a network gets
    wrong in eps by up to sigma / alpha. The first order does not: its x0 and eps come from one prediction.
    """
    return bool(level.log_snr >= -10.2)


class _Counter:
    """A predictor that counts how often it is asked."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.calls = schedule, 0

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        self.calls += 1
        return Prediction(x_t, x_t, x0_variance=0.0)
