"""Are images copies of training images? Their nearest training neighbours, beside those of held-out images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm.data.base import ImageSet
from ddpm.errors import DataError
from ddpm.evaluation.metrics import Estimate, normal_interval, wilson
from ddpm.evaluation.neighbours import nearest
from ddpm.images import grid

Pixels = NDArray[np.uint8]
PAIRS = 10


@dataclass(frozen=True, eq=False)
class Copies:
    """Distances are root mean square differences per pixel, in levels of 0 to 255.

    Attributes:
        nearest_train: mean distance from an image to its nearest training image, with the interval of that mean.
        nearest_held_out: the same for held-out real images; None where there are none.
        copies: share of images nearer to a training image than 99 % of the held-out ones are: 0.01 is what a model
            that copies nothing has; None where there are no held-out images.
        pairs: a picture (C, H, W) of the closest pairs, a row each: the image, its nearest training image.
    """

    nearest_train: Estimate
    nearest_held_out: Estimate | None
    copies: Estimate | None
    pairs: Pixels


def compare_copies(images: Pixels, train: ImageSet, held_out: ImageSet | None) -> Copies:
    """Compare images (N, C, H, W) uint8, N >= 2, with those trained on. Raises DataError: too few, other shapes."""
    if len(images) < 2:
        raise DataError(f"memorisation needs at least 2 images, and there are {len(images)}; add images.")
    if images.shape[1:] != train.shape:
        raise DataError(f"images are {images.shape[1:]}, the training images {train.shape}; they must be alike.")
    root = float(np.sqrt(np.prod(train.shape)))
    places, distances = nearest(images, train.images)
    closest = np.argsort(distances, kind="stable")[:PAIRS]
    pairs = np.stack([images[closest], train.images[places[closest]]], axis=1).reshape(-1, *train.shape)
    real = None if held_out is None or len(held_out) < 2 else nearest(held_out.images, train.images)[1]
    return Copies(
        nearest_train=_mean(distances / root),
        nearest_held_out=None if real is None else _mean(real / root),
        copies=None if real is None else wilson(int(np.sum(distances < np.percentile(real, 1))), len(distances)),
        pairs=grid(pairs, 2),
    )


def _mean(distances: NDArray[np.float64]) -> Estimate:
    return normal_interval(float(distances.mean()), float(distances.std(ddof=1)) / len(distances) ** 0.5)
