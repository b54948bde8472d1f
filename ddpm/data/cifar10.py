"""CIFAR-10: 50,000 + 10,000 RGB 32x32 images, read from its binary or its Python version, as archive or folder."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.config import DataConfig
from ddpm.data.base import Dataset, ImageSet
from ddpm.data.places import download_place, places
from ddpm.errors import DataError
from ddpm.files import Progress, download, read_members, reason
from ddpm.registry import register

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
SIZE = 170_052_171

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_PARTS = {"train": _TRAIN, "test": ("test_batch",), "all": (*_TRAIN, "test_batch")}
_PIXELS = 3 * 32 * 32
_MAX_BYTES = 1 << 28
Batch = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class _Version:
    folder: str
    archive: str
    suffix: str


_BINARY = _Version("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin")
_PYTHON = _Version("cifar-10-batches-py", "cifar-10-python.tar.gz", "")


@register("cifar10")
class Cifar10(Dataset):
    """Tiny photographs of ten classes (Krizhevsky, 2009)."""

    reads = ("path",)

    def load(self, config: DataConfig) -> ImageSet:
        return self.prepare(config)

    def prepare(self, config: DataConfig, progress: Progress | None = None) -> ImageSet:
        names = _PARTS[config.split]
        found = _find(names, config.path)
        notes: list[str] = []
        if found is None:
            archive = download_place("cifar10", config.path, [_BINARY.archive]) / _BINARY.archive
            download(URL, archive, SHA256, SIZE, progress)
            found = archive, _BINARY
            notes = [f"Downloaded to {archive.parent}."]
        source, version = found
        contents = _contents(source, version, names)
        parse = parse_binary if version is _BINARY else parse_python
        batches = [parse(contents[name], f"{source}: {name}") for name in names]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches]).astype(np.int64)
        return ImageSet("cifar10", images, labels, _CLASSES, notes=(*notes, f"Read from {source}."))


def _find(names: Sequence[str], path: Path | None) -> tuple[Path, _Version] | None:
    """The first folder or archive that holds the batches: the binary version before the Python version."""
    usual = (Path("data"), Path("cifar_train"), Path("cifar_test"))  # where torchvision's users keep it
    for place in [*places("cifar10", path), *(usual if path is None else ())]:
        for version in (_BINARY, _PYTHON):
            for folder in (place, place / version.folder):
                if all((folder / f"{name}{version.suffix}").is_file() for name in names):
                    return folder, version
            for archive in (place, place / version.archive):
                if archive.name == version.archive and archive.is_file():
                    return archive, version
    return None


def _contents(source: Path, version: _Version, names: Sequence[str]) -> dict[str, bytes]:
    if source.is_file():
        wanted = {f"{version.folder}/{name}{version.suffix}": name for name in names}
        return {wanted[inside]: data for inside, data in read_members(source, wanted, _MAX_BYTES)}
    contents = {}
    for name in names:
        path = source / f"{name}{version.suffix}"
        try:
            with path.open("rb") as file:
                contents[name] = file.read(_MAX_BYTES)
        except OSError as error:
            raise DataError(f"cannot read {path}: {reason(error)}.") from None
    return contents


def parse_binary(data: bytes, source: str) -> Batch:
    """Images (N, 3, 32, 32) and labels (N,) of a binary batch: rows of one label byte and 3,072 pixel bytes.

    Raises DataError.
    """
    if not data or len(data) % (1 + _PIXELS):
        raise DataError(f"{source} is damaged: {len(data):,} bytes are no whole number of images; fetch it again.")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return _checked(rows[:, 1:], rows[:, 0], source)


def parse_python(data: bytes, source: str) -> Batch:
    """Images (N, 3, 32, 32) and labels (N,) of a pickled batch, whose pickle may build nothing but byte arrays.

    Raises DataError.
    """
    try:
        batch = _ByteArrays(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = (batch.get(key, batch.get(key.decode())) for key in (b"data", b"labels"))
        images = pixels.values if isinstance(pixels, _Array) else np.zeros(0, np.uint8)
        return _checked(images.reshape(-1, _PIXELS), np.array([int(label) for label in labels], np.uint8), source)
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise DataError(f"{source} is not a CIFAR-10 batch ({reason(error)}); fetch it again.") from None


def _checked(rows: NDArray[np.uint8], labels: NDArray[np.uint8], source: str) -> Batch:
    if len(rows) == 0 or len(rows) != len(labels) or labels.max() >= len(_CLASSES):
        raise DataError(f"{source} is damaged: its labels do not fit its {len(rows)} images; fetch it again.")
    return rows.reshape(-1, 3, 32, 32), labels


class _Array:
    """Stands in for a pickled array: takes its bytes, and runs none of NumPy's unpickling."""

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, dtype, fortran, data = state
        if not isinstance(dtype, _ByteType) or fortran or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array is not of plain bytes")
        self.values = np.frombuffer(data, np.uint8)


class _ByteType:
    """Stands in for a pickled dtype, which must be unsigned bytes."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array is of type {code!r} instead of bytes")

    def __setstate__(self, _: object) -> None:
        """Byte order and alignment, which bytes have none of."""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text is encoded as {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _ByteType,
    ("_codecs", "encode"): _encode,
}


class _ByteArrays(pickle.Unpickler):
    """An unpickler to which names mean the stand-ins above; any other name is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which was not run")
        return _ALLOWED[module_name, global_name]
