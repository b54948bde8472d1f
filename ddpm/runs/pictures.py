"""Image and mask files of the user, brought to a model's size and channels by the rules that data sets follow."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddpm.data.decode import SUFFIXES, UnreadableImageError, convert_arrays, decode, inspect, quiet
from ddpm.errors import DataError

Pixels = NDArray[np.uint8]
Resize = Literal["crop", "fit", "stretch"]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image file: where it is, its upright (height, width), and its pixels as a model takes them, uint8 (C, H, W)."""

    path: Path
    size: tuple[int, int]
    pixels: Pixels


def read_pictures(path: Path, shape: tuple[int, int, int], resize: Resize) -> list[Picture]:
    """The image of a file, or those that lie in a folder, by name.

    Raises DataError: nothing there, no image, one that cannot be read, two of one name.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist; give an image file, or a folder of them.")
    found = [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not found:
            raise DataError(f"{path}: holds no image; files that end in {', '.join(sorted(SUFFIXES))} are read.")
    stem, count = Counter(p.stem for p in found).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: {count} images are called {stem}; give each a name of its own.")
    return [_read(p, shape, resize) for p in found]


def read_mask(path: Path, pictures: Sequence[Picture], resize: Resize) -> NDArray[np.bool_]:
    """A mask for all pictures, bool (H, W) of the model's size: True where the file is nearer to white than to black.

    It is resized as the pictures are; what they are padded with is never filled. Raises DataError: it is missing, cannot
    be read, is of another size than a picture, or leaves nothing to fill or to keep.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: does not exist; give a mask, an image that is white where the picture is to be filled."
        )
    size = _size(path)
    for picture in pictures:
        if picture.size != size:
            raise DataError(
                f"{path}: the mask is {_written(size)} (height x width) and {picture.path} is {_written(picture.size)}; "
                "give a mask of the picture's size."
            )
    keep = 255 - _read(path, (1, *size), resize).pixels
    fill: NDArray[np.bool_] = convert_arrays(keep[None], pictures[0].pixels.shape[1:], 1, resize)[0, 0] < 128
    if not fill.any():
        raise DataError(f"{path}: the mask is black, so nothing would be filled; paint white what is to be made.")
    if fill.all():
        raise DataError(
            f"{path}: the mask is white, so nothing would be kept; for a whole new image use `ddpm sample`."
        )
    return fill


def _read(path: Path, shape: tuple[int, int, int], resize: Resize) -> Picture:
    with _readable(path):
        return Picture(path, _size(path), decode(path, shape[1:], shape[0], resize))


def _size(path: Path) -> tuple[int, int]:
    with _readable(path):
        header = inspect(path)
        return header.height, header.width


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except UnreadableImageError as error:
        raise DataError(f"{path}: cannot be read as an image ({error}).") from None


def _written(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
