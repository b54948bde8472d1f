"""Judging generated images by their nearest real neighbours in pixel space: are they what was asked, new, and varied?

Nothing here is trained: real images that were held out are judged by the same rule, which says how good the rule is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.data.base import ImageSet
from ddpm.errors import DataError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Judgement:
    """What the nearest neighbours say.

    judged_as_asked: share of generated images whose nearest training image has the label asked for.
    real_held_out: the same share of held-out real images: what the rule can reach.
    copies: generated images nearer to a training image than `copy_distance`.
    copy_distance: the 1st percentile of the distances from held-out images to their nearest training image.
    diversity: mean distance between generated images of a class, over that of real ones.
    num_samples: generated images judged.
    """

    judged_as_asked: float
    real_held_out: float
    copies: int
    copy_distance: float
    diversity: float
    num_samples: int


def judge(images: Pixels, labels: Labels, train: ImageSet, held_out: ImageSet) -> Judgement:
    """Judge generated images (N, C, H, W) uint8 with the labels (N,) asked for, against labelled real ones.

    Distances are Euclidean over pixels of 0 to 255. Raises DataError when a set has no labels or shapes differ.
    """
    if train.labels is None or held_out.labels is None:
        raise DataError(f"data set {train.name!r} has no labels, so a nearest neighbour cannot judge by them.")
    if images.shape[1:] != train.shape:
        raise DataError(
            f"images are {images.shape[1:]}, the real ones {train.shape}; they must be alike to be compared."
        )
    near, distance = nearest(images, train.images)
    real_near, real_distance = nearest(held_out.images, train.images)
    copy_distance = float(np.percentile(real_distance, 1))
    return Judgement(
        judged_as_asked=float(np.mean(train.labels[near] == labels)),
        real_held_out=float(np.mean(train.labels[real_near] == held_out.labels)),
        copies=int(np.sum(distance < copy_distance)),
        copy_distance=copy_distance,
        diversity=_spread(images, labels) / _spread(train.images, train.labels),
        num_samples=len(images),
    )


def nearest(
    queries: NDArray[Any], references: NDArray[Any], block: int = 500
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(indices, distances): the nearest reference of each query, by Euclidean distance over elements; ties: the first.

    Pixels, uint8, are searched in float32; features of any other dtype in float64.
    """
    exact: type[np.floating[Any]] = np.float32 if references.dtype == np.uint8 else np.float64
    flat: NDArray[Any] = references.reshape(len(references), -1).astype(exact)
    squares = np.einsum("ij,ij->i", flat, flat)
    index, distance = np.empty(len(queries), np.int64), np.empty(len(queries), np.float64)
    for start in range(0, len(queries), block):
        part = queries[start : start + block].reshape(-1, flat.shape[1]).astype(exact)
        found = np.argmin(squares - 2.0 * (part @ flat.T), axis=1)
        index[start : start + block] = found
        gap = part.astype(np.float64) - flat[found]
        distance[start : start + block] = np.sqrt(np.einsum("ij,ij->i", gap, gap))
    return index, distance


def _spread(images: Pixels, labels: Labels, most: int = 500) -> float:
    """Mean over classes of the mean distance between two images of the class (at most `most` of them)."""
    means = []
    for label in np.unique(labels):
        members = images[labels == label][:most].reshape(-1, images[0].size).astype(np.float64)
        if len(members) > 1:
            squares = np.einsum("ij,ij->i", members, members)
            gaps = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2.0 * members @ members.T, 0.0))
            means.append(gaps.sum() / (len(members) * (len(members) - 1)))
    if not means:
        raise DataError("diversity needs at least two images of one class.")
    return float(np.mean(means))
