"""Grids: which times a sampler visits."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.registry import Component, register
from ddpm.schedules import DiscreteSchedule, Schedule


class Grid(Component, kind="grid"):
    """Times for a number of steps."""

    @abstractmethod
    def place(self, schedule: Schedule, steps: int) -> Tensor:
        """(steps,) float64 times of the schedule, falling."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        """What `place` gives, checked; raises ConfigError when times do not fall or lie outside the schedule."""
        found = self.place(schedule, steps)
        if not (found.diff() < 0).all():
            raise ConfigError(
                f"grid {self.name!r} visits a time twice, or goes back, at steps={steps}: use fewer steps or another grid."
            )
        if found[0] > schedule.first or found[-1] < schedule.last:
            raise ConfigError(
                f"grid {self.name!r} leaves the times of schedule {schedule.name!r}, {schedule.first:g} to {schedule.last:g}: list others."
            )
        return found


class IndexGrid(Grid):
    """A grid over the entries of a table: whole numbers. Where there is no table, over as many parts of the range."""

    @abstractmethod
    def fractions(self, steps: int, timesteps: int) -> Tensor:
        """(steps,) float64, falling: times on a scale that runs from 0 to timesteps - 1."""

    def place(self, schedule: Schedule, steps: int) -> Tensor:
        """Raises ConfigError when a table has too few entries."""
        if not isinstance(schedule, DiscreteSchedule):
            t = self.fractions(steps, 1_000_000) / 999_999.0
            return schedule.last + t * (schedule.first - schedule.last)
        if steps > schedule.timesteps:
            raise ConfigError(
                f"the sampler's steps={steps} are more than the schedule's {schedule.timesteps} timesteps."
            )
        return self.fractions(steps, schedule.timesteps).round()


@dataclass(frozen=True, kw_only=True)
class LevelGrid(Grid):
    """A grid over noise levels: real times, rounded where `whole` is true, for a network that knows whole times alone.

    The noisiest and the cleanest level are visited. At zero terminal SNR the noisiest has no finite log-SNR: then it is
    the first time, and the other steps start one time below it.
    """

    whole: bool = False

    @abstractmethod
    def levels(self, noisiest: float, cleanest: float, steps: int) -> Tensor:
        """(steps,) float64 log-SNRs, rising from noisiest to cleanest."""

    def place(self, schedule: Schedule, steps: int) -> Tensor:
        top = int(schedule.zero_terminal_snr)
        first, last = schedule.first - top, schedule.last
        noisiest, cleanest = schedule.at(torch.tensor([first, last], dtype=torch.float64)).log_snr.tolist()
        rest = schedule.t_of(self.levels(noisiest, cleanest, steps - top))
        rest[:1] = first  # not t_of's rounding of it
        rest[1:][-1:] = last
        times = torch.cat([rest.new_tensor([schedule.first] * top), rest])
        return times.round() if self.whole else times


@register("trailing")
class Trailing(IndexGrid):
    """Equal strides counted from the noisiest time (Lin et al. 2024, table 2)."""

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        return (timesteps - torch.arange(steps, dtype=torch.float64) * timesteps / steps).round() - 1


@register("leading")
class Leading(IndexGrid):
    """Whole strides T // S counted from the cleanest time (Song et al. 2021a, code: uniform)."""

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (timesteps // steps)


@register("linspace")
class Linspace(IndexGrid):
    """Evenly from the noisiest to the cleanest time, both visited (Nichol & Dhariwal 2021, section 4)."""

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64)


@register("quadratic")
class Quadratic(IndexGrid):
    """(i sqrt(0.8 T) / (S - 1))^2, denser near the clean image (Song et al. 2021a, appendix D.2 and code).

    Where that would visit a time twice (at the clean end, from about 30 steps of 1000) the later visits move up by one.
    """

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        index = torch.arange(steps, dtype=torch.float64)
        rising = torch.linspace((0.8 * timesteps) ** 0.5, 0, steps, dtype=torch.float64).square().floor().flip(0)
        return ((rising - index).cummax(0).values + index).flip(0)


@register("log-snr")
class LogSNR(LevelGrid):
    """Evenly in log-SNR (Lu et al. 2022a, the step sizes of DPM-Solver)."""

    def levels(self, noisiest: float, cleanest: float, steps: int) -> Tensor:
        return torch.linspace(noisiest, cleanest, steps, dtype=torch.float64)


@register("karras")
class Karras(LevelGrid):
    """Evenly in (sigma / alpha)^(1 / rho) (Karras et al. 2022, equation 5)."""

    rho: Annotated[float, Field(ge=1)] = 7.0

    def levels(self, noisiest: float, cleanest: float, steps: int) -> Tensor:
        high, low = (math.exp(-0.5 * log_snr / self.rho) for log_snr in (noisiest, cleanest))
        return -2.0 * self.rho * torch.linspace(high, low, steps, dtype=torch.float64).log()


@register("custom")
class Custom(Grid):
    """The times listed, falling, real or whole, as many as the sampler has steps: custom:t=999/700/300/50."""

    t: tuple[float, ...] = ()

    def place(self, schedule: Schedule, steps: int) -> Tensor:
        """Raises ConfigError when the list has another length than `steps`."""
        if len(self.t) != steps:
            raise ConfigError(
                f"grid 'custom' lists {len(self.t)} times t, but the sampler has steps={steps}: make them as many."
            )
        return torch.tensor(self.t, dtype=torch.float64)
