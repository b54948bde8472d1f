"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of a set of images.

The manifold of a set is the union of balls around its members that reach to their k-th nearest neighbour in the set.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ddpm.errors import DataError
from ddpm.evaluation.metrics import Estimate, Features, Float64, blocks, check_features, student
from ddpm.randomness import permutation

_TIE = 1e-12
_PARTS = 3
_CUTS = 3


@dataclass(frozen=True)
class Manifold:
    """How two sets lie in each other's manifold.

    precision: share of images in the reference's manifold.
    recall: share of reference images in the images' manifold.
    density: mean number of reference balls that an image lies in, over k; may exceed 1.
    coverage: share of reference balls that hold an image.

    The intervals are for the expectations at these N and M, both sets being samples. As a manifold is made by its set,
    neither Wilson's interval nor the bootstrap holds (the first covered 63 to 92 % on Gaussian data, the second
    duplicates points); instead both sets are three times cut at random into thirds, whose values vary three times as
    much. This covers 90 to 97 % there. Fewer than 3 (k + 1) images have no interval.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def precision_recall_density_coverage(features: Features, reference: Features, k: int = 5) -> Manifold:
    """The four shares for features (N, D) against reference features (M, D), N and M > k.

    All four depend on N and M: compare equal numbers only. The literature takes k = 3 with 50,000 images for precision
    and recall, k = 5 with 10,000 for the others. A point lies in a ball if it is strictly nearer than the radius; ties
    count as outside, told apart at 1e-12 of the largest squared norm, so that rounding decides nothing.

    O((N + M)^2 D) time; memory for a block of 2,048 by 2,048 distances. Raises DataError.
    """
    if k < 1:
        raise DataError(f"k is {k}; it must be at least 1.")
    check_features(reference, "the reference images", at_least=k + 1)
    check_features(features, "the images", at_least=k + 1, width=reference.shape[1])
    values = _values(features, reference, k)
    half = _half_widths(features, reference, k)
    if half is None:
        return Manifold(*(Estimate(value) for value in values.tolist()))
    lows, highs = np.maximum(values - half, 0.0), np.minimum(values + half, (1.0, 1.0, np.inf, 1.0))
    return Manifold(*(Estimate(*three) for three in zip(values.tolist(), lows.tolist(), highs.tolist(), strict=True)))


def _half_widths(features: Features, reference: Features, k: int) -> Float64 | None:
    """Half the intervals of the four values, from sets cut into parts; None where a part would be too small."""
    if min(len(features), len(reference)) < _PARTS * (k + 1):
        return None
    variances: Float64 = np.zeros((_CUTS, 4))
    for cut in range(_CUTS):
        ours, theirs = (
            [np.sort(part) for part in np.array_split(permutation(side, cut, len(x)).numpy(), _PARTS)]
            for side, x in enumerate((features, reference))
        )
        values = [_values(features[i], reference[j], k) for i, j in zip(ours, theirs, strict=True)]
        variances[cut] = np.var(values, axis=0, ddof=1) / _PARTS
    return np.asarray(student(_CUTS * (_PARTS - 1)) * np.sqrt(variances.mean(axis=0)))


def _values(features: Features, reference: Features, k: int) -> Float64:
    """Precision, recall, density, coverage."""
    centre = np.asarray(np.mean(reference, axis=0, dtype=np.float64))
    ours, theirs = _Points.of(features, centre), _Points.of(reference, centre)
    tie = _TIE * max(ours.squares.max(), theirs.squares.max())
    our_reach, their_reach = _reach(ours, k) - tie, _reach(theirs, k) - tie
    held, recalled, covered = np.zeros(len(features)), np.zeros(len(reference), bool), np.zeros(len(reference), bool)
    for i, j, squared in _distances(theirs, ours):
        inside = squared < their_reach[i, None]
        held[j] += inside.sum(axis=0)
        covered[i] |= inside.any(axis=1)
        recalled[i] |= (squared < our_reach[None, j]).any(axis=1)
    return np.array([np.mean(held > 0), recalled.mean(), held.mean() / k, covered.mean()])


@dataclass(frozen=True, eq=False)
class _Points:
    """Features, the point that they are measured from (less cancels then), and their squared distances to it."""

    features: Features
    centre: Float64
    squares: Float64

    @classmethod
    def of(cls, features: Features, centre: Float64) -> "_Points":
        squares = [np.einsum("ij,ij->i", x, x) for x in (block - centre for _, block in blocks(features))]
        return cls(features, centre, np.concatenate(squares))

    def blocks(self) -> Iterator[tuple[slice, Float64]]:
        for where, block in blocks(self.features):
            yield where, block - self.centre


def _distances(a: _Points, b: _Points) -> Iterator[tuple[slice, slice, Float64]]:
    """(rows of a, rows of b, squared distances between them), block by block."""
    for i, x in a.blocks():
        for j, y in b.blocks():
            yield i, j, np.maximum(a.squares[i, None] + b.squares[None, j] - 2.0 * (x @ y.T), 0.0)


def _reach(points: _Points, k: int) -> Float64:
    """Squared distance from each point to its k-th nearest other point."""
    nearest = np.full((len(points.squares), k), np.inf)
    for i, j, squared in _distances(points, points):
        if i == j:
            np.fill_diagonal(squared, np.inf)
        nearest[i] = np.partition(np.concatenate([nearest[i], squared], axis=1), k - 1, axis=1)[:, :k]
    return np.asarray(nearest.max(axis=1))
