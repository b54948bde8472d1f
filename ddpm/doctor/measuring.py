"""Taking the losses of a model on images: as it was trained, and as if something about it were otherwise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.doctor.evidence import Float64
from ddpm.doctor.exam import FLOOR, Average, Losses
from ddpm.doctor.linear import LinearDenoiser
from ddpm.losses import per_image_loss
from ddpm.models import GaussianDiffusion
from ddpm.objectives import Objective, eps_from_x0
from ddpm.randomness import Stream
from ddpm.schedules import Level, Schedule

LEVELS = 8
CHUNK = 16
"""Images that go through the network together."""

RANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "[0, 1]": lambda x: (x + 1.0) / 2.0,
    "[0, 255]": lambda x: (x + 1.0) * 127.5,
    "[-1, 1] with black and white exchanged": lambda x: -x,
}
"""Ranges in which images are fed by mistake -> the way to them from [-1, 1]."""

OBJECTIVES = ("eps", "v", "x0")
"""Objectives that see x_t and t alike and are taken for each other by mistake."""


def levels_of(schedule: Schedule) -> Level:
    """`LEVELS` noise levels, (L,), from the least noise to the most: quantiles of those that training draws."""
    u = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    level = schedule.at(schedule.draw(u))
    order = torch.argsort(level.log_snr, descending=True)
    return Level(*(value[order] for value in vars(level).values()))


@dataclass(frozen=True, eq=False)
class Trial:
    """Some images at one level: their places, x0, eps, x_t and the network's output (b, C, H, W), the level (b,)."""

    rows: slice
    x0: Tensor
    eps: Tensor
    x_t: Tensor
    output: Tensor
    level: Level


Judge = Callable[[Trial], Sequence[Tensor]]
"""judge(trial) -> numbers of each image: tensors (b,)."""


@dataclass(frozen=True, eq=False)
class Patient:
    """A model in eval mode on its device, and images to try it on: float (n, C, H, W) in [-1, 1], labels (n,) or None.

    Whatever is tried, image i at level j is mixed with the same noise, so that two losses differ by what was changed alone.
    `told` hears how many images have gone through the network.
    """

    model: GaussianDiffusion
    images: Tensor
    labels: Tensor | None
    level: Level
    told: Callable[[int], None] = lambda count: None

    def losses(self, linear: LinearDenoiser, objective: Objective | None = None) -> Losses:
        """Of the network, of the linear denoiser and of silence; `objective`: as if the output were that of another."""
        meant = objective or self.model.objective

        def judge(trial: Trial) -> list[Tensor]:
            target = self._said(trial, trial.x0, trial.eps, meant)
            guess = self._said_of(trial, linear.x0(trial.x_t, trial.level), meant)
            return [self._loss(said, target) for said in (trial.output, guess, torch.zeros_like(target))]

        return Losses(*self._measure(judge))

    def model_losses(self, time: Tensor | None = None) -> Float64:
        """Of the network alone, (n, L); `time`, of shape (): it is told this one in place of the level's own."""
        return self._measure(lambda trial: [self._error(trial)], time)[0]

    def losses_and_power(self) -> tuple[Float64, Float64]:
        """Of the network alone, and of silence, both (n, L)."""

        def judge(trial: Trial) -> list[Tensor]:
            target = self._said(trial, trial.x0, trial.eps, self.model.objective)
            return [self._loss(said, target) for said in (trial.output, torch.zeros_like(target))]

        found, power = self._measure(judge)
        return found, power

    def by_time(self) -> Float64:
        """(n, L, L): the loss where the noise is of level i, and the network is told the time of level j."""
        return np.stack([self.model_losses(time) for time in self.level.t], axis=2)

    def by_label(
        self, candidates: NDArray[np.int64], classes: LinearDenoiser, power: Float64
    ) -> tuple[Float64, Float64]:
        """ln of the errors with candidate labels (n, K), the mean over the levels: of the network, of a linear denoiser.

        classes: with a mean for each class; power: of the targets (n, L), which the floor is a share of.
        """
        columns = [replace(self, labels=torch.from_numpy(column))._by_own_label(classes) for column in candidates.T]
        floor = FLOOR * power.mean(axis=0)
        model, linear = (np.stack([np.log(pair[k] + floor).mean(axis=1) for pair in columns], axis=1) for k in (0, 1))
        return model, linear

    def _by_own_label(self, classes: LinearDenoiser) -> list[Float64]:
        assert self.labels is not None
        labels, objective = self.labels, self.model.objective

        def judge(trial: Trial) -> list[Tensor]:
            guess = self._said_of(trial, classes.x0(trial.x_t, trial.level, labels[trial.rows]), objective)
            return [self._error(trial), self._loss(guess, self._said(trial, trial.x0, trial.eps, objective))]

        return self._measure(judge)

    def _error(self, trial: Trial) -> Tensor:
        return self._loss(trial.output, self._said(trial, trial.x0, trial.eps, self.model.objective))

    def _loss(self, said: Tensor, target: Tensor) -> Tensor:
        """The error that training makes small, of each image: one that minimises another is not to be blamed for it."""
        return per_image_loss(self.model.error, said, target)

    def _said(self, trial: Trial, x0: Tensor, eps: Tensor, objective: Objective) -> Tensor:
        return objective.target(x0, eps, trial.x_t, trial.level, self.model.schedule)

    def _said_of(self, trial: Trial, x0: Tensor, objective: Objective) -> Tensor:
        return self._said(trial, x0, eps_from_x0(x0, trial.x_t, trial.level), objective)

    @torch.inference_mode()
    def _measure(self, judge: Judge, time: Tensor | None = None) -> list[Float64]:
        """What the judge says of every image at every level: arrays (n, L)."""
        columns = []
        for step in range(len(self.level.t)):
            parts = [judge(self._trial(step, start, time)) for start in range(0, len(self.images), CHUNK)]
            columns.append(torch.cat([torch.stack(list(part)) for part in parts], dim=1).double().cpu())
            self.told(len(self.images))
        return list(torch.stack(columns, dim=2).numpy())

    def _trial(self, step: int, start: int, time: Tensor | None) -> Trial:
        rows = slice(start, min(start + CHUNK, len(self.images)))
        device = next(self.model.parameters()).device
        x0 = self.images[rows].to(device)
        eps = Stream(0, torch.arange(rows.start, rows.stop, device=device), "doctor", step).normal(*x0.shape[1:])
        level = Level(*(value[step] for value in vars(self.level).values())).expand(len(x0))
        x_t = self.model.q_sample(x0, level, eps)
        told = level if time is None else replace(level, t=time.expand(len(x0)))
        labels = None if self.labels is None else self.labels[rows].to(device)
        found = self.model.predict(x_t, told, labels)
        output = self.model.objective.target(found.x0, found.eps, x_t, told, self.model.schedule)
        return Trial(rows, x0, eps, x_t, output, level)


def compare_average(
    name: str,
    average: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    earlier: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None,
) -> Average:
    """A moving average beside the weights, by state_dict key; `earlier`: both of an earlier checkpoint."""
    moved = [key for key, value in weights.items() if _varies(value) and not torch.equal(value, average[key])]
    untouched = sum(bool((average[key] == average[key].flatten()[0]).all()) for key in moved)
    stood_still = None
    if earlier is not None and any(not torch.equal(weights[key], earlier[1][key]) for key in moved):
        stood_still = all(torch.equal(average[key], earlier[0][key]) for key in moved)
    return Average(name, untouched, stood_still)


def _varies(value: Tensor) -> bool:
    """Whether numbers are finite and not all the same."""
    return bool(value.isfinite().all()) and bool((value != value.flatten()[0]).any())
