"""Grids: which times a sampler visits. For table schedules the times are whole numbers, so that they hit the table."""

from abc import abstractmethod

import torch
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.registry import Component, register
from ddpm.schedules import DiscreteSchedule, Schedule


class Grid(Component, kind="grid"):
    """Times for a number of steps."""

    @abstractmethod
    def fractions(self, steps: int, timesteps: int) -> Tensor:
        """(steps,) float64, falling: times on a scale that runs from 0 to timesteps - 1."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        """(steps,) float64 times of the schedule, falling; raises ConfigError when a table has too few entries."""
        if not isinstance(schedule, DiscreteSchedule):
            t = self.fractions(steps, 1_000_000) / 999_999.0
            return schedule.last + t * (schedule.first - schedule.last)
        if steps > schedule.timesteps:
            raise ConfigError(
                f"the sampler's steps={steps} are more than the schedule's {schedule.timesteps} timesteps."
            )
        times = self.fractions(steps, schedule.timesteps).round()
        if len(times.unique()) != steps:
            raise ConfigError(
                f"grid {self.name!r} visits a timestep twice at steps={steps}: use fewer steps or another grid."
            )
        return times


@register("trailing")
class Trailing(Grid):
    """Equal strides counted from the noisiest time (Lin et al. 2024, table 2)."""

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        return (timesteps - torch.arange(steps, dtype=torch.float64) * timesteps / steps).round() - 1


@register("leading")
class Leading(Grid):
    """Whole strides T // S counted from the cleanest time (Song et al. 2021a, code: uniform)."""

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (timesteps // steps)


@register("linspace")
class Linspace(Grid):
    """Evenly from the noisiest to the cleanest time, both visited (Nichol & Dhariwal 2021, section 4)."""

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64)


@register("quadratic")
class Quadratic(Grid):
    """(i sqrt(0.8 T) / (S - 1))^2, denser near the clean image (Song et al. 2021a, appendix D.2 and code).

    Where that would visit a time twice (at the clean end, from about 30 steps of 1000) the later visits move up by one.
    """

    def fractions(self, steps: int, timesteps: int) -> Tensor:
        index = torch.arange(steps, dtype=torch.float64)
        rising = torch.linspace((0.8 * timesteps) ** 0.5, 0, steps, dtype=torch.float64).square().floor().flip(0)
        return ((rising - index).cummax(0).values + index).flip(0)
