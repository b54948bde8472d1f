"""Images in a NumPy archive, as sampling scripts of other projects write them."""

import zipfile
import zlib
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ddpm.config import DataConfig
from ddpm.data.base import Dataset, ImageSet
from ddpm.errors import ConfigError, DataError
from ddpm.files import reason
from ddpm.registry import register

_MAX_CLASSES = 1 << 16


@register("npz")
class Npz(Dataset):
    """An .npz file with uint8 images (arr_0 or images) and maybe integer labels (arr_1 or labels).

    Images are (N, H, W, C), (N, C, H, W) or, grey, (N, H, W); an array that could be either of the first two is read as
    the first. The whole file is the split 'train'.
    """

    reads = ("path",)

    def load(self, config: DataConfig) -> ImageSet:
        if config.path is None:
            raise ConfigError("the data set 'npz' needs --data.path FILE.npz.")
        if config.split == "test":
            raise DataError(f"--data.split test: {config.path} has no test part; use --data.split all.")
        images, labels = _arrays(config.path.expanduser())
        if labels is None:
            return ImageSet("npz", images)
        largest = int(labels.max()) if labels.dtype.kind in "iu" and labels.size else 0
        if largest >= _MAX_CLASSES:
            raise DataError(
                f"--data.path {config.path}: a label is {largest}; labels are class numbers below {_MAX_CLASSES:,}."
            )
        return ImageSet("npz", images, cast(NDArray[np.int64], labels), tuple(str(i) for i in range(largest + 1)))


def _arrays(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.generic] | None]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files
            images = next((archive[name] for name in ("arr_0", "images") if name in names), None)
            labels = next((archive[name] for name in ("arr_1", "labels") if name in names), None)
    except (
        OSError,
        ValueError,
        EOFError,
        AttributeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        TypeError,
    ) as error:
        raise DataError(
            f"--data.path {path}: cannot be read as an .npz file of plain arrays ({reason(error)})."
        ) from None
    if images is None:
        raise DataError(
            f"--data.path {path}: holds {', '.join(names) or 'nothing'}; the images must be called arr_0 or images."
        )
    return _channels_first(images, path), labels


def _channels_first(images: NDArray[np.generic], path: Path) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        raise DataError(f"--data.path {path}: the images are {images.dtype}; save them as uint8, 0 to 255.")
    bytes_ = images.astype(np.uint8, copy=False)
    if bytes_.ndim == 3:
        return bytes_[:, None]
    if bytes_.ndim == 4 and bytes_.shape[3] in (1, 3):
        return np.ascontiguousarray(bytes_.transpose(0, 3, 1, 2))
    if bytes_.ndim == 4 and bytes_.shape[1] in (1, 3):
        return bytes_
    raise DataError(
        f"--data.path {path}: the images are {images.shape}; they must be (N, H, W, C) or (N, C, H, W) with 1 or 3 channels."
    )
