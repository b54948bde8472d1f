"""The kernel distance (KID): the squared maximum mean discrepancy with a cubic polynomial kernel.

    k(x, y) = (x.y / D + 1)^3

Unbiased (Gretton et al. 2012, eq. 3; Binkowski et al. 2018): its expectation does not depend on the number of images,
and is 0 for equal distributions, so it may come out below 0.
"""

import math
from dataclasses import dataclass

import numpy as np

from ddpm.errors import DataError
from ddpm.evaluation.metrics import (
    Estimate,
    Features,
    Float64,
    blocks,
    check_features,
    mean_of_independent,
    normal_interval,
)
from ddpm.randomness import permutation


def kernel_distance(features: Features, reference: Features, subset_size: int | None = None, seed: int = 0) -> Estimate:
    """The kernel distance between features (N, D) and reference features (M, D), N and M >= 2.

    Args:
        subset_size: None compares the whole sets, in O((N + M)^2 D) time. Otherwise both sets are shuffled by the seed
            and cut into disjoint subsets of this size, as many as the smaller set fills (2 at least); the value is the
            mean over pairs of subsets. The usual protocol's subsets (1,000 images) overlap: same expectation, but
            no interval follows from them.
        seed: of the shuffle.

    The interval is for the distance between the two distributions: Student's over the subsets, or 1.96 standard errors
    of the U-statistic over whole sets (on Gaussian data it covers 93 to 96 %, about 85 % where few directions carry
    the variance and the distributions are equal). It supposes independent sets: a set against itself comes out at
    about -2 (mean k(x, x) - mean k(x, y)) / N. Memory is bounded by blocks of 2,048 rows. Raises DataError.
    """
    check_features(reference, "the reference images", at_least=2)
    check_features(features, "the images", at_least=2, width=reference.shape[1])
    if subset_size is None:
        return _whole(features, reference)
    count = min(len(features), len(reference)) // max(subset_size, 1)
    if subset_size < 2 or count < 2:
        raise DataError(
            f"{len(features)} and {len(reference)} images do not fill two subsets of {subset_size}, 2 images at least each; "
            "choose another subset size."
        )
    ours, theirs = (permutation(seed, i, len(x)).numpy() for i, x in enumerate((features, reference)))
    cuts = [slice(i * subset_size, (i + 1) * subset_size) for i in range(count)]
    return mean_of_independent(np.array([_whole(features[ours[cut]], reference[theirs[cut]]).value for cut in cuts]))


@dataclass(frozen=True)
class _Kernel:
    """Means of the kernel between two sets: over all, by row, by column, and of its square; without i = j in one set."""

    mean: float
    rows: Float64
    columns: Float64
    square: float

    def centred_square(self) -> float:
        """Mean square of the kernel with the means of its row and column taken off."""
        spread = float(np.mean(self.rows**2) + np.mean(self.columns**2)) - self.mean**2
        return max(0.0, self.square - spread)


def _whole(features: Features, reference: Features) -> Estimate:
    """The U-statistic and its standard error.

    The variance of the derivatives counts the second-order part of the variance twice, which is all there is where the
    distributions are equal; so that part, from the doubly centred kernel, is taken off once.
    """
    n, m = len(features), len(reference)
    own, other, cross = _kernel(features), _kernel(reference), _kernel(features, reference)
    value = own.mean + other.mean - 2.0 * cross.mean
    first = 4.0 * (np.var(own.rows - cross.rows, ddof=1) / n + np.var(other.rows - cross.columns, ddof=1) / m)
    second = (
        2.0 * own.centred_square() / n**2 + 2.0 * other.centred_square() / m**2 + 4.0 * cross.centred_square() / (n * m)
    )
    return normal_interval(value, math.sqrt(float(max(first - second, first / 2))))


def _kernel(a: Features, b: Features | None = None) -> _Kernel:
    other = a if b is None else b
    rows, columns, square = np.zeros(len(a)), np.zeros(len(other)), 0.0
    for i, x in blocks(a):
        for j, y in blocks(other):
            k = (x @ y.T / x.shape[1] + 1.0) ** 3
            if b is None and i == j:
                np.fill_diagonal(k, 0.0)
            rows[i] += k.sum(axis=1)
            columns[j] += k.sum(axis=0)
            square += float(np.vdot(k, k))
    width, height = (len(a) - 1, len(a) - 1) if b is None else (len(other), len(a))
    pairs = len(a) * width
    return _Kernel(float(rows.sum()) / pairs, rows / width, columns / height, square / pairs)
