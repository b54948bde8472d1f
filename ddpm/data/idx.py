"""The IDX files that MNIST and its relatives come in: found, fetched, read."""

import gzip
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm.config import DataConfig
from ddpm.data.base import ImageSet
from ddpm.data.places import download_place, places
from ddpm.errors import DataError
from ddpm.files import Progress, download, reason

_PARTS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class IdxFiles:
    """A data set of four IDX files.

    Attributes:
        name: of the data set.
        folders: further folders to look in, and a name that other libraries give the set's own folder.
        url: where the four files lie.
        sha256: of each file there, by name.
        classes: names of the labels.
    """

    name: str
    url: str
    sha256: Mapping[str, str]
    classes: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    alias: str = ""

    def load(self, config: DataConfig, progress: Progress | None) -> ImageSet:
        """Read the split from --data.path or the first place that has it, else download it; raises DataError."""
        wanted = [(f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in _PARTS[config.split]]
        folder = self._folder([name for pair in wanted for name in pair], config.path)
        notes: list[str] = []
        if folder is None:
            folder = download_place(self.name, config.path, self.sha256)
            notes = [f"Downloaded to {folder}."]
            for name in [f"{name}.gz" for pair in wanted for name in pair]:
                download(f"{self.url}/{name}", folder / name, self.sha256[name], progress=progress)
        pairs = [(_read(folder, images, 3), _read(folder, labels, 1)) for images, labels in wanted]
        for (pixels, targets), (name, _) in zip(pairs, wanted, strict=True):
            if len(pixels) != len(targets):
                raise DataError(
                    f"{folder / name}: {len(pixels)} images, but {len(targets)} labels; delete both files and fetch them again."
                )
        images = np.concatenate([pixels for pixels, _ in pairs])[:, None]
        labels = np.concatenate([targets for _, targets in pairs]).astype(np.int64)
        return ImageSet(self.name, images, labels, self.classes, notes=(*notes, f"Read from {folder}."))

    def _folder(self, names: list[str], path: Path | None) -> Path | None:
        for place in places(self.name, path, *self.folders):
            for folder in (place, place / "raw", place / self.alias / "raw"):
                if all(_file(folder, name) is not None for name in names):
                    return folder
        return None


def _file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)


def _read(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    path = _file(folder, name)
    assert path is not None, "found or downloaded before"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return parse_idx(file.read(_MAX_BYTES), dimensions)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}); delete it and run the command again.") from None


def parse_idx(data: bytes, dimensions: int) -> NDArray[np.uint8]:
    """The array in an IDX file of bytes: 0, 0, 8 (unsigned byte), number of dimensions, big-endian sizes, values.

    Raises ValueError: another type, another number of dimensions, missing or surplus bytes.
    """
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"it does not start as an IDX file of {dimensions} dimensions does")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    if len(data) - start != math.prod(shape):
        raise ValueError(f"its header tells of {math.prod(shape):,} bytes, and {len(data) - start:,} follow")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
