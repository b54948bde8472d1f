"""How training times are drawn: a function of (seed, step, place in the global batch), and for one of them of past losses."""

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ddpm.randomness import Stream
from ddpm.registry import Component, register
from ddpm.schedules import DiscreteSchedule, Schedule, need_table

PURPOSE = "time"


class Times(Component, kind="times"):
    """A distribution of training times."""

    def check(self, schedule: Schedule) -> None:
        """Raise ConfigError for a schedule that it cannot draw from."""

    def memory(self, schedule: Schedule) -> "LossHistory | None":
        """What it remembers between steps; None: nothing."""
        return None

    @abstractmethod
    def draw(self, stream: Stream, schedule: Schedule, memory: "LossHistory | None") -> tuple[Tensor, Tensor | None]:
        """Times (B,) float64 for the images of a stream, and the factors (B,) float64 that keep the mean loss what it is
        with uniform times (None: the loss is to change with the times)."""


@register("uniform")
class Uniform(Times):
    """Independent and uniform in t (Ho et al. 2020, algorithm 1)."""

    def draw(self, stream: Stream, schedule: Schedule, memory: "LossHistory | None") -> tuple[Tensor, Tensor | None]:
        return schedule.draw(stream.at(PURPOSE).uniform()), None


@register("stratified")
class Stratified(Times):
    """Uniform in t, spread evenly over the global batch: one random shift a step of a low-discrepancy sequence.

    Kingma et al. (2021) shift i / n; here image i has the radical inverse of i (van der Corput's sequence), which gives the
    same set for a batch of 2^k, and needs to know neither the other images nor the size of the batch.
    """

    def draw(self, stream: Stream, schedule: Schedule, memory: "LossHistory | None") -> tuple[Tensor, Tensor | None]:
        shift = replace(stream.at(PURPOSE), ids=torch.zeros_like(stream.ids[:1])).uniform()
        return schedule.draw((radical_inverse(stream.ids) + shift) % 1.0), None


@register("logit-normal")
class LogitNormal(Times):
    """The logistic function of a normal number in place of a uniform one: a mean above 0 favours noise (Esser et al. 2024,
    section 3.1)."""

    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0

    def draw(self, stream: Stream, schedule: Schedule, memory: "LossHistory | None") -> tuple[Tensor, Tensor | None]:
        return schedule.draw(torch.sigmoid(self.mean + self.std * stream.at(PURPOSE).normal().double())), None


@register("log-normal")
class LogNormal(Times):
    """ln(sigma / alpha) is normal with P_mean and P_std (Karras et al. 2022, table 1), kept to the schedule's range; on a
    table the nearest step."""

    mean: float = -1.2
    std: Annotated[float, Field(gt=0)] = 1.2

    def draw(self, stream: Stream, schedule: Schedule, memory: "LossHistory | None") -> tuple[Tensor, Tensor | None]:
        t = schedule.t_of(-2.0 * (self.mean + self.std * stream.at(PURPOSE).normal().double()))
        return t.round() if isinstance(schedule, DiscreteSchedule) else t, None


@register("loss-second-moment")
class LossSecondMoment(Times):
    """p(t) in proportion to sqrt(E[L_t^2]) over the last `history` losses of t, uniform until every t has as many (Nichol &
    Dhariwal 2021, equation 18); a share `uniform` of p stays uniform, as in their code. The loss is divided by T p(t)."""

    history: Annotated[int, Field(ge=1, le=1000)] = 10
    uniform: Annotated[float, Field(ge=0, le=1)] = 0.001

    def check(self, schedule: Schedule) -> None:
        need_table(schedule, f"--diffusion.times={self.name}")

    def memory(self, schedule: Schedule) -> "LossHistory":
        return LossHistory(need_table(schedule, self.name).timesteps, self.history)

    def draw(self, stream: Stream, schedule: Schedule, memory: "LossHistory | None") -> tuple[Tensor, Tensor | None]:
        assert memory is not None
        u = stream.at(PURPOSE).uniform()
        moments = memory.losses.square().mean(dim=1).sqrt()
        p = (1.0 - self.uniform) * moments / moments.sum() + self.uniform / len(moments)
        # Whole numbers, whose running sum is the same in any order of adding, and so on every device.
        shares = (p.nan_to_num() * 2.0**40).round().clamp(min=1.0).long()
        sums = shares.cumsum(dim=0)
        chosen = torch.searchsorted(sums, (u * sums[-1]).long(), right=True).clamp(max=len(moments) - 1)
        factor = sums[-1] / (len(moments) * shares[chosen].double())
        full = (memory.counts >= self.history).all()
        return torch.where(full, chosen.double(), schedule.draw(u)), torch.where(full, factor, torch.ones_like(factor))


class LossHistory(nn.Module):
    """The last n losses of each timestep, as buffers: losses (T, n) float64, a ring for each t, and counts (T,) int64."""

    losses: Tensor
    counts: Tensor

    def __init__(self, timesteps: int, n: int) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(timesteps, n, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(timesteps, dtype=torch.int64))

    @torch.no_grad()
    def add(self, t: Tensor, losses: Tensor) -> None:
        """Take in losses (B,) of timesteps t (B,), in order; of more than n of one t the last n stay."""
        n = self.losses.shape[1]
        order = torch.argsort(t.long(), stable=True)
        steps, losses = t.long()[order], losses.double()[order]
        first, end = (torch.searchsorted(steps, steps, right=right) for right in (False, True))
        places = torch.arange(len(steps), device=steps.device)
        kept = places >= end - n
        slots = (self.counts[steps] + places - first) % n
        self.losses[steps[kept], slots[kept]] = losses[kept]
        self.counts += torch.bincount(steps, minlength=len(self.counts))


def radical_inverse(n: Tensor) -> Tensor:
    """The van der Corput sequence: the bits of n, an int64 below 2^32, mirrored at the binary point; float64 in [0, 1)."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        n = ((n >> shift) & mask) | ((n & mask) << shift)
    return n.double() / 2.0**32
