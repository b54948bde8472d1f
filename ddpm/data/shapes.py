"""Drawn RGB images whose every factor is known: the ground truth for conditional models and for metrics."""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ddpm.config import DataConfig
from ddpm.data.base import Dataset, ImageSet, in_split
from ddpm.registry import register

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
SHAPES = ("disc", "square", "triangle")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Class k has colour k // 3 and shape k % 3."""


@register("shapes")
class Shapes(Dataset):
    """One shape of one colour on black per image, somewhere inside it; the classes are colour x shape.

    Image i has class i % 12, and all classes are equally frequent. The centre is uniform over the pixels where the shape
    fits. Every pixel is the colour or black. Of each class every fifth image is the test part.
    """

    num_images: Annotated[int, Field(ge=1, le=1_000_000)] = 6000
    size: Annotated[int, Field(ge=8, le=256)] = 32
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    reads = ()

    def load(self, config: DataConfig) -> ImageSet:
        labels = np.arange(self.num_images, dtype=np.int64) % len(CLASSES)
        chosen = np.flatnonzero(in_split(labels, config.split))
        images = np.empty((len(chosen), 3, self.size, self.size), np.uint8)
        for start in range(0, len(chosen), 1024):
            part = chosen[start : start + 1024]
            images[start : start + 1024] = draw(labels[part], self._centres(part), self.size)
        return ImageSet("shapes", images, labels[chosen], CLASSES)

    def _centres(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 2) row and column of each image's centre: a pure function of the seed and the image's index."""
        radius = radius_px(self.size)
        bits = _mix(np.uint64(self.seed) << np.uint64(32) | indices.astype(np.uint64))
        places = np.uint64(self.size - 2 * radius)
        rows, columns = (bits >> np.uint64(40)) % places, (bits >> np.uint64(8) & np.uint64(0xFFFFFF)) % places
        return np.stack([rows, columns], axis=1).astype(np.int64) + radius


def radius_px(size: int) -> int:
    """Half the width of every shape, in pixels."""
    return size // 4


def draw(labels: NDArray[np.int64], centres: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """(N, 3, size, size) uint8 images of classes `labels` (N,) with their shapes at `centres` (N, 2), row and column."""
    radius = radius_px(size)
    grid = np.arange(size)
    down = grid[None, :, None] - centres[:, 0, None, None]
    across = np.abs(grid[None, None, :] - centres[:, 1, None, None])
    inside = np.stack(
        [
            down**2 + across**2 <= radius**2,
            np.maximum(np.abs(down), across) <= radius,
            (2 * across <= down + radius) & (down <= radius),
        ]
    )
    mask = inside[labels % len(SHAPES), np.arange(len(labels))]
    colours = np.array(list(COLOURS.values()), np.uint8)[labels // len(SHAPES)]
    images: NDArray[np.uint8] = colours[:, :, None, None] * mask[:, None]
    return images


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): 64 well-mixed bits from each word."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
