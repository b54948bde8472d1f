"""How sure a check has to be before it raises an alarm: a difference must be large enough to matter, and no chance."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

SURE = 4.0
"""Standard errors that a mean must be away from nothing."""

BY_CHANCE = 0.5 * math.erfc(SURE / math.sqrt(2))
"""The probability that a Gaussian number is, to one side: 3 in 100,000. So sure shares have to be, too."""


@dataclass(frozen=True)
class Effect:
    """The mean of independent numbers, and how many of its standard errors it is away from 0."""

    mean: float
    z: float

    @classmethod
    def of(cls, numbers: Any) -> "Effect":
        """From (n,) numbers, n >= 2. Where all are the same, z is infinite, or 0 where they are 0."""
        values = np.asarray(numbers, dtype=np.float64)
        mean, error = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5
        if error <= 1e-12 * abs(mean):
            return cls(mean, math.copysign(math.inf, mean) if mean else 0.0)
        return cls(mean, mean / error)

    def above(self, least: float) -> bool:
        """Whether the mean is above `least` >= 0, and surely above 0."""
        return self.mean > least and self.z > SURE

    def below(self, most: float) -> bool:
        """Whether the mean is below `most` <= 0, and surely below 0."""
        return self.mean < most and self.z < -SURE


def at_least_by_chance(hits: float, trials: int, share: float) -> float:
    """P(X >= hits) for X of so many trials that each succeed with probability `share`: the exact binomial tail."""
    if hits <= 0:
        return 1.0
    if not 0 < share < 1:
        return float(share > 0)
    odds = math.log(share), math.log1p(-share)
    ways = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        for k in range(math.ceil(hits), trials + 1)
    )
    terms = (way + k * odds[0] + (trials - k) * odds[1] for k, way in enumerate(ways, start=math.ceil(hits)))
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def is_more(hits: float, trials: int, share: float) -> bool:
    """Whether hits of trials are surely more than that share."""
    return at_least_by_chance(hits, trials, share) < BY_CHANCE


def is_less(hits: float, trials: int, share: float) -> bool:
    """Whether hits of trials are surely less than that share."""
    return at_least_by_chance(trials - hits, trials, 1.0 - share) < BY_CHANCE
