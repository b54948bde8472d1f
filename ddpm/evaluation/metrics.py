"""What all metrics on features share: the estimate they return, checked blocks of features, and one class at a time.

A metric is a function on features (N, D), one row an image; it computes in float64 whatever the features' dtype. The
features may be memory-mapped: they are read a block of rows at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import DataError

Features = NDArray[Any]
"""(N, D), any float or integer dtype."""
Float64 = NDArray[np.float64]
Result = TypeVar("Result")

BLOCK_ROWS = 2048
Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, None where none can be had; each metric says what its interval is meant to cover."""

    value: float
    low: float | None = None
    high: float | None = None


def check_features(features: Features, name: str, at_least: int = 1, width: int | None = None) -> None:
    """Raise DataError unless the features are (N, D) with N >= at_least and, if given, D = width."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise DataError(f"{name} must be an array (images, features), not one of shape {features.shape}.")
    if len(features) < at_least:
        raise DataError(f"{name} hold {len(features)} images, and this metric needs at least {at_least}; add images.")
    if width is not None and features.shape[1] != width:
        raise DataError(
            f"{name} have {features.shape[1]} features an image and the others {width}; use one extractor for both."
        )


def blocks(features: Features, rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, Float64]]:
    """(which rows, those rows in float64) for consecutive blocks; raises DataError for NaN and infinity."""
    for start in range(0, len(features), rows):
        where = slice(start, min(start + rows, len(features)))
        yield where, finite(features[where])


def finite(features: Features) -> Float64:
    """The features in float64; raises DataError for NaN and infinity."""
    block = np.asarray(features, dtype=np.float64)
    if not np.isfinite(block).all():
        raise DataError("a feature is NaN or infinite; look for NaN pixels and a broken extractor.")
    return block


def normal_interval(value: float, error: float) -> Estimate:
    """value +- 1.96 standard errors."""
    return Estimate(value, value - Z95 * error, value + Z95 * error)


def mean_of_independent(values: Float64) -> Estimate:
    """The mean of K >= 2 independent values with Student's interval."""
    half = student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half)


def wilson(hits: int, n: int) -> Estimate:
    """hits / n with Wilson's score interval (Wilson 1927)."""
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def student(degrees: int) -> float:
    """Student's 97.5 % quantile: Abramowitz and Stegun 26.7.5, closed forms for 1 and 2 degrees."""
    if degrees <= 2:
        return math.tan(0.475 * math.pi) if degrees == 1 else 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z95
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class ByClass(Generic[Result]):
    """A metric's results by class label, and why a class has none."""

    results: dict[int, Result]
    left_out: dict[int, str]


def by_class(
    metric: Callable[[Features, Features], Result],
    features: Features,
    labels: NDArray[np.integer[Any]],
    reference: Features,
    reference_labels: NDArray[np.integer[Any]],
) -> ByClass[Result]:
    """The metric of each class on its own: `metric(features of the class, reference features of the class)`.

    Args:
        metric: for instance `lambda x, r: kernel_distance(x, r)`.
        features: (N, D) with labels (N,); reference: (M, D) with reference_labels (M,).

    A class that the metric refuses with a DataError (too few images, mostly) is left out with the error's sentence.
    Raises DataError where the numbers of labels and rows differ.
    """
    for rows, of, name in ((features, labels, "the images"), (reference, reference_labels, "the reference")):
        if of.shape != (len(rows),):
            raise DataError(f"{name} have {len(rows)} rows of features and labels of shape {of.shape}; give one a row.")
    results: dict[int, Result] = {}
    left_out: dict[int, str] = {}
    for label in np.union1d(labels, reference_labels).tolist():
        try:
            results[label] = metric(features[labels == label], reference[reference_labels == label])
        except DataError as error:
            left_out[label] = str(error)
    return ByClass(results, left_out)
