"""Samplers x steps on one model: quality against network evaluations and seconds, the front, a recommended setting."""

import dataclasses
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ddpm.errors import ConfigError
from ddpm.evaluation.metrics import Estimate
from ddpm.samplers import Sampler
from ddpm.schedules import Schedule

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Cell:
    """A sampler at a number of steps.

    Attributes:
        sampler: its spec, with every option.
        label: the words that were typed for it.
        steps: of the sampler.
        evaluations: network evaluations that an image costs, counted (two a step under classifier-free guidance).
        quality: the distance to the reference with its interval; lower is better.
        seconds: an image's time, median of the rounds, with the lowest and the highest round.
        images_sha256: of the images that were judged.
    """

    sampler: str
    label: str
    steps: int
    evaluations: float
    quality: Estimate
    seconds: Estimate
    images_sha256: str

    def row(self) -> dict[str, Any]:
        """As a line of sweep.csv."""
        return {
            "sampler": self.label,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "value": self.quality.value,
            "low": self.quality.low,
            "high": self.quality.high,
            "seconds": self.seconds.value,
            "seconds_low": self.seconds.low,
            "seconds_high": self.seconds.high,
            "spec": self.sampler,
            "images_sha256": self.images_sha256,
        }


def plan(
    specs: Sequence[str], budgets: Sequence[int], schedule: Schedule
) -> tuple[list[tuple[str, Sampler]], list[str]]:
    """(label, sampler) for every spec and budget, and notes on those left out.

    A spec with steps of its own is taken as it is; any other takes, for each budget, the most steps whose network
    evaluations do not exceed it. Raises ConfigError where a spec cannot be read or used, or nothing is left.
    """
    cells: dict[str, tuple[str, Sampler]] = {}
    notes: list[str] = []
    for spec in specs:
        sampler = Sampler.parse(spec)
        if re.search(r"[:,]\s*steps=", spec):
            sampler.path(schedule)
            cells[sampler.spec] = (spec, sampler)
            continue
        for budget in budgets:
            fitted = fit(sampler, budget, schedule)
            if fitted is None:
                notes.append(
                    f"{spec} left out at {budget} evaluations: it cannot do with so few, or the schedule has no such steps."
                )
            else:
                cells.setdefault(fitted.spec, (spec, fitted))
    if not cells:
        raise ConfigError("--samplers: none of them fits a number of --evaluations; allow more.")
    return list(cells.values()), notes


def fit(sampler: Sampler, budget: int, schedule: Schedule) -> Sampler | None:
    """The sampler with the most steps whose evaluations do not exceed the budget; None where there is no such number."""
    for steps in range(budget, 0, -1):
        tried = dataclasses.replace(sampler, steps=steps)
        try:
            if tried.evaluations(schedule) <= budget:
                tried.path(schedule)
                return tried
        except ConfigError:
            continue
    return None


def interleave(tasks: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, Estimate]:
    """Seconds of each task: the median of rounds in which every task runs once, with the lowest and the highest.

    One round before them warms up.
    """
    found: dict[K, list[float]] = {key: [] for key in tasks}
    for number in range(rounds + 1):
        for key, task in tasks.items():
            start = time.perf_counter()
            task()
            if number:
                found[key].append(time.perf_counter() - start)
    return {key: Estimate(float(np.median(times)), min(times), max(times)) for key, times in found.items()}


def front(cells: Sequence[Cell], cost: Callable[[Cell], float]) -> list[Cell]:
    """The Pareto front by rising cost: each cell is better than all that cost no more."""
    kept: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cost(cell), cell.quality.value)):
        if not kept or cell.quality.value < kept[-1].quality.value:
            kept.append(cell)
    return kept


def recommend(cells: Sequence[Cell]) -> Cell:
    """The quickest cell that is no worse than the best one, within the best one's interval."""
    best = min(cells, key=lambda cell: cell.quality.value)
    limit = best.quality.value if best.quality.high is None else best.quality.high
    return min((cell for cell in cells if cell.quality.value <= limit), key=lambda cell: cell.seconds.value)


def verdict(cells: Sequence[Cell], baseline: Cell, budget: int) -> str:
    """A sentence on the best cell within a budget of evaluations, beside the baseline; "" where there is none."""
    within = [cell for cell in cells if cell.evaluations <= budget]
    if not within:
        return ""
    best = min(within, key=lambda cell: cell.quality.value)
    limit = baseline.quality.value if baseline.quality.high is None else baseline.quality.high
    words = "no worse than" if best.quality.value <= limit else "worse than"
    return (
        f"{best.label} with {best.evaluations:g} evaluations ({best.quality.value:.4g}) is {words} {baseline.label} with "
        f"{baseline.evaluations:g} ({baseline.quality.value:.4g}), in 1/{baseline.seconds.value / best.seconds.value:.3g} of its time."
    )
