"""What a data set is: a component that loads an `ImageSet`, uint8 images in memory or memory-mapped."""

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddpm.config import DataConfig
from ddpm.data.decode import convert_arrays
from ddpm.errors import ConfigError, DataError
from ddpm.files import Progress
from ddpm.registry import Component

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Skipped:
    """An image that was left out."""

    path: str
    reason: str

    @classmethod
    def of(cls, path: str, reason: str) -> Self:
        """With a path that can be printed, even if its bytes are not UTF-8."""
        return cls(os.fsencode(path).decode(errors="replace"), reason)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their labels, as they are stored.

    Attributes:
        name: of the data set.
        images: uint8 (N, C, H, W), 0..255, read-only, maybe memory-mapped.
        labels: int64 (N,), indices into `classes`, or None.
        classes: names; () without labels.
        skipped: images that were left out, and why.
        notes: decisions to tell the user, one sentence each.

    Raises DataError where these do not fit together.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images = np.asarray(self.images)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(
                f"data set {self.name!r}: images are {images.dtype} {images.shape}; they must be uint8 (N, channels, height, width)."
            )
        object.__setattr__(self, "images", _read_only(images))
        if self.labels is not None:
            object.__setattr__(self, "labels", _read_only(self._checked(np.asarray(self.labels))))
        elif self.classes:
            raise DataError(f"data set {self.name!r}: has class names but no labels.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, images, labels and class names: equal for equal data, wherever it was read from."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes)).encode())
        for start in range(0, len(self.images), 4096):
            digest.update(self.images[start : start + 4096].tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def _checked(self, labels: NDArray[np.generic]) -> NDArray[np.int64]:
        if labels.dtype.kind not in "iu" or labels.shape != self.images.shape[:1]:
            wanted = f"one integer for each of the {len(self.images)} images"
            raise DataError(f"data set {self.name!r}: labels are {labels.dtype} {labels.shape}; they must be {wanted}.")
        whole = labels.astype(np.int64)
        if len(whole) and (whole.min() < 0 or whole.max() >= len(self.classes)):
            raise DataError(
                f"data set {self.name!r}: labels go from {whole.min()} to {whole.max()}, but there are {len(self.classes)} class names."
            )
        return whole


class Dataset(Component, ABC, kind="dataset"):
    """A source of images. A subclass implements `load`, or `prepare` where it downloads or decodes."""

    reads: ClassVar[tuple[str, ...]] = ("path", "labels")
    """Which of --data.path and --data.labels it uses; the others are refused."""

    @abstractmethod
    def load(self, config: DataConfig) -> ImageSet:
        """The images of `config.split`; `config.size` and `config.channels` may be left to `load_dataset`.

        Raises DataError: files missing or damaged, no such split.
        """

    def prepare(self, config: DataConfig, progress: Progress | None = None) -> ImageSet:
        """`load`, telling `progress` (done, total) where it takes long."""
        return self.load(config)


def load_dataset(config: DataConfig, progress: Progress | None = None) -> ImageSet:
    """The images that a config describes, in its size and channels.

    Raises:
        ConfigError: an unknown data set or option, a flag that the data set does not read.
        DataError: files missing or damaged, no such split, no image.
    """
    dataset = Dataset.parse(config.dataset)
    for flag in ("path", "labels"):
        if getattr(config, flag) is not None and flag not in dataset.reads:
            raise ConfigError(f"--data.{flag} is not used by the data set {dataset.name!r}; leave it out.")
    found = dataset.prepare(config, progress)
    if len(found) == 0:
        raise DataError(f"data set {dataset.name!r}: the split {config.split!r} holds no image.")
    images = convert_arrays(
        found.images, config.size or found.shape[1:], config.channels or found.shape[0], config.resize
    )
    return found if images is found.images else replace(found, images=images)


def every_fifth(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for every fifth image of each class, in order: the test part of sets that come without a split."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    chosen = np.empty(len(labels), dtype=np.bool_)
    chosen[order] = (np.arange(len(labels)) - starts) % 5 == 4
    return chosen


def in_split(labels: NDArray[np.int64], split: str) -> NDArray[np.bool_]:
    """Which images belong to 'train', 'test' or 'all', by `every_fifth`."""
    test = every_fifth(labels)
    return {"train": ~test, "test": test, "all": np.ones_like(test)}[split]


def _read_only(array: NDArray[T]) -> NDArray[T]:
    view = array.view()
    view.flags.writeable = False
    return view
