"""Decode a folder of images once into the cache, and read them memory-mapped from then on.

A prepared set is a folder $DDPM_CACHE/prepared/KEY with images.npy, labels.npy, skipped.csv and meta.json. KEY hashes the
files' names, sizes and times, the labels and the options, so that a changed folder is prepared anew.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddpm.config import DataConfig
from ddpm.data.base import ImageSet, Skipped
from ddpm.data.decode import UnreadableImageError, choose_size, decode, inspect, quiet
from ddpm.data.places import cache_root
from ddpm.errors import DataError
from ddpm.files import Lock, Progress, atomic_folder, free_bytes

FORMAT = 1
"""Version of the prepared form and of the decoding; part of the key."""

_THREADS = 4
_CHUNK = 64
R = TypeVar("R")


@dataclass(frozen=True)
class Source:
    """Image files of a folder.

    Attributes:
        root: the folder.
        paths: of the images, relative to it, with forward slashes.
        labels: an index into `classes` per path, or None.
        classes: names.
        skipped: images left out already.
        notes: for the user.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


def prepare_images(source: Source, config: DataConfig, progress: Progress | None = None) -> ImageSet:
    """The images of a folder, decoded by `config.size`, `channels` and `resize`, memory-mapped from the cache.

    Two processes that ask at once prepare the set once. A damaged cache is prepared anew. `progress` counts each image
    twice: its header, its pixels.

    Raises DataError: no image can be read, none of a class can, the cache cannot be written to.
    """
    place = cache_root() / "prepared" / _key(source, config)
    found = _read(place)
    if found is not None:
        return found
    try:
        with Lock(place.with_name(f".{place.name}.lock"), wait=True):
            found = _read(place)
            if found is None:
                for left in place.parent.glob(f".{place.name}.tmp-*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                _build(place, source, config, progress or _silent)
                found = _read(place)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise DataError(
                f"the cache {cache_root()} cannot be written ({error.__cause__.strerror}); set DDPM_CACHE to another folder."
            ) from None
        raise
    assert found is not None, f"{place} is not what was written"
    return found


def _key(source: Source, config: DataConfig) -> str:
    options = config.model_dump(mode="json", include={"size", "channels", "resize"})
    files = [_size_and_time(source.root / path) for path in source.paths]
    content = {name: value for name, value in asdict(source).items() if name != "root"}
    return hashlib.sha256(json.dumps([FORMAT, options, files, content]).encode()).hexdigest()[:32]


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # a broken link: decoding says so
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _build(place: Path, source: Source, config: DataConfig, progress: Progress) -> None:
    work = _Work(source, progress, list(source.skipped))
    with quiet(), atomic_folder(place) as folder:
        headers = dict(work.each(inspect, range(len(source.paths)), done=0))
        work.demand_images(headers)
        size, note = choose_size([(header.height, header.width) for header in headers.values()])
        if config.size is not None:
            size, note = config.size, ""
        channels = config.channels or (1 if all(header.grey for header in headers.values()) else 3)
        _demand_room(place, len(headers) * channels * size[0] * size[1])
        read = partial(decode, size=size, channels=channels, resize=config.resize)
        kept = _write_images(
            folder / "images.npy", work.each(read, list(headers), len(source.paths)), (channels, *size)
        )
        work.demand_images(kept)
        _write_labels(folder, source, kept)
        _write_skipped(folder, work.skipped)
        _write_meta(folder, source, [len(kept), channels, *size], [*source.notes, *([note] if note else [])])


@dataclass(frozen=True)
class _Work:
    source: Source
    progress: Progress
    skipped: list[Skipped]

    def each(self, read: Callable[[Path], R], indices: Sequence[int], done: int) -> Iterator[tuple[int, R]]:
        """(index, result) of every image that can be read, in order; the others are added to `skipped`."""

        def attempt(index: int) -> R | Skipped:
            try:
                return read(self.source.root / self.source.paths[index])
            except UnreadableImageError as error:
                return Skipped.of(self.source.paths[index], str(error))

        for index, result in zip(indices, _threaded(attempt, indices), strict=True):
            done += 1
            self.progress(done, 2 * len(self.source.paths))
            if isinstance(result, Skipped):
                self.skipped.append(result)
            else:
                yield index, result

    def demand_images(self, kept: Collection[int]) -> None:
        """Raise DataError if no image, or no image of some class, is left."""
        source = self.source
        if not kept:
            first = self.skipped[0]
            found = f"none of its {len(source.paths)} images can be read ({first.path}: {first.reason}, ...)"
            raise DataError(f"--data.path {source.root}: {found}; give a folder with whole images.")
        if source.labels is not None and (lost := set(source.labels) - {source.labels[i] for i in kept}):
            name = source.classes[min(lost)]
            found = f"no image of the class {name!r} can be read"
            raise DataError(f"--data.path {source.root}: {found}; mend its images, or remove the class.")


def _threaded(function: Callable[[int], R], indices: Sequence[int]) -> Iterator[R]:
    """Results in order, a bounded number of them ahead: decoders leave the interpreter free for other threads."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(indices), _CHUNK):
            yield from pool.map(function, indices[start : start + _CHUNK])


def _demand_room(place: Path, needed: int) -> None:
    free = free_bytes(place)
    if needed > free:
        raise DataError(
            f"the cache {cache_root()} has {free:,} bytes free, but the images need {needed:,}; set DDPM_CACHE to a folder with more room."
        )


def _write_images(path: Path, images: Iterator[tuple[int, NDArray[np.uint8]]], shape: tuple[int, ...]) -> list[int]:
    """Write (index, image) one after the other as one .npy array; returns the indices.

    Written as a file, not as a memory map: on a full disk a write fails with an error, a map kills the process.
    """
    kept = []
    with path.open("wb") as file:
        start = _write_header(file, (0, *shape))
        for index, image in images:
            file.write(image.tobytes())
            kept.append(index)
        file.seek(0)
        assert _write_header(file, (len(kept), *shape)) == start, "NumPy leaves room for the first axis to grow"
    return kept


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _write_labels(folder: Path, source: Source, kept: Sequence[int]) -> None:
    if source.labels is not None:
        np.save(folder / "labels.npy", np.array([source.labels[i] for i in kept], np.int64))


def _write_skipped(folder: Path, skipped: Sequence[Skipped]) -> None:
    rows = sorted((image.path, image.reason) for image in skipped)
    with (folder / "skipped.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *rows])


def _write_meta(folder: Path, source: Source, shape: Sequence[int], notes: Sequence[str]) -> None:
    meta = {
        "format": FORMAT,
        "folder": str(source.root.absolute()),
        "shape": shape,
        "bytes": (folder / "images.npy").stat().st_size,
        "classes": source.classes,
        "notes": notes,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _read(place: Path) -> ImageSet | None:
    """The prepared set, or None if it is absent or damaged."""
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        if (place / "images.npy").stat().st_size != meta["bytes"]:
            return None
        images = np.load(place / "images.npy", mmap_mode="r", allow_pickle=False)
        if list(images.shape) != meta["shape"]:
            return None
        labels = np.load(place / "labels.npy", allow_pickle=False) if meta["classes"] else None
        text = (place / "skipped.csv").read_text(encoding="utf-8")
        skipped = tuple(Skipped(path, reason) for path, reason in list(csv.reader(io.StringIO(text, newline="")))[1:])
        notes = (*meta["notes"], f"Prepared in {place}.")
        return ImageSet("folder", images, labels, tuple(meta["classes"]), skipped, notes)
    except (OSError, EOFError, ValueError, KeyError, TypeError, csv.Error, DataError):
        return None


def _silent(done: int, total: int) -> None:
    """Progress that nobody asked for."""
