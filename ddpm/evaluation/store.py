"""Arrays on disk with a row an image, filled in any order, by several processes, over several calls.

A store is a folder: an .npy file for each array, done.npy with a byte for each row, rows.json with their shapes. A row's
byte is set after the row is written, so that a process that is killed leaves whole rows, and rows to do again. Rows are
written as to a file and read as a memory map: a full disk is an error, not a crash, and memory does not grow.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm import files
from ddpm.distributed import World
from ddpm.errors import DataError
from ddpm.evaluation.features import Features

_DONE = "done"
_FACTS = "rows.json"


class Store:
    """Rows on disk, used as a context by one process group at a time.

    Args:
        folder: made if need be; one that holds other shapes, or is damaged, is started anew.
        rows: how many.
        arrays: name -> dtype and shape of a row.
        world: the processes; all of them enter and leave together.
        wait: wait for another group that uses the folder, instead of raising DataError.

    Raises DataError: no room, not writable, in use.
    """

    def __init__(
        self,
        folder: Path,
        rows: int,
        arrays: Mapping[str, tuple[str, tuple[int, ...]]],
        world: World = World(),  # noqa: B008 - frozen
        wait: bool = False,
    ) -> None:
        self.folder, self.rows, self.world, self.wait = folder, rows, world, wait
        self._arrays = {**arrays, _DONE: ("uint8", ())}
        self._stack = ExitStack()
        self._files: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.world.is_main:
                stack.enter_context(files.Lock(self.folder / "lock", self.wait))
                if not self._is_whole():
                    self._make()
            self.world.barrier()
            for name in self._arrays:
                descriptor = os.open(self._path(name), os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                self._files[name] = (descriptor, self.read(name).offset)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def missing(self) -> NDArray[np.int64]:
        """Rows that are not written yet, rising."""
        return np.flatnonzero(self.read(_DONE) == 0)

    def write(self, rows: NDArray[np.int64], **arrays: NDArray[Any]) -> None:
        """Write some rows (R,) of every array (R, ...), then mark them done; raises DataError."""
        converted = {name: np.ascontiguousarray(arrays[name], self._arrays[name][0]) for name in arrays}
        converted[_DONE] = np.ones(len(rows), np.uint8)
        assert list(converted) == list(self._arrays), (list(converted), list(self._arrays))
        try:
            for name, array in converted.items():
                assert array.shape == (len(rows), *self._arrays[name][1]), (name, array.shape)
                descriptor, offset = self._files[name]
                for row, values in zip(rows.tolist(), array, strict=True):
                    _write_all(descriptor, values.tobytes(), offset + row * values.nbytes)
        except OSError as error:
            raise DataError(
                f"cannot write {self.folder} ({files.reason(error)}); what is done is kept: free some space and run the command again."
            ) from None

    def read(self, name: str) -> "np.memmap[Any, Any]":
        """An array (rows, ...), memory-mapped and read-only."""
        return np.load(self._path(name), mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]

    def sync(self) -> None:
        """Wait for all processes, then see that no row is missing."""
        self.world.barrier()
        assert not len(self.missing()), f"{self.folder}: rows are missing"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _facts(self) -> str:
        return json.dumps({"rows": self.rows, "arrays": self._arrays}, sort_keys=True)

    def _is_whole(self) -> bool:
        try:
            return (self.folder / _FACTS).read_text(encoding="utf-8") == self._facts() and all(
                (held := self.read(name)).shape == (self.rows, *shape) and held.dtype == dtype
                for name, (dtype, shape) in self._arrays.items()
            )
        except (OSError, ValueError, EOFError):
            return False

    def _make(self) -> None:
        needed = sum(
            self.rows * np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in self._arrays.values()
        )
        if (free := files.free_bytes(self.folder)) < needed:
            raise DataError(f"{self.folder}: needs {needed:,} bytes, but only {free:,} are free; free some space.")
        try:
            (self.folder / _FACTS).unlink(missing_ok=True)
            for name, (dtype, shape) in self._arrays.items():
                np.lib.format.open_memmap(self._path(name), "w+", np.dtype(dtype), (self.rows, *shape))  # zeros, sparse
        except OSError as error:
            raise DataError(f"cannot write {self.folder} ({files.reason(error)}); choose another place.") from None
        files.write_text(self.folder / _FACTS, self._facts())


def extract(images: NDArray[Any], features: Features, store: Store, progress: files.Progress) -> None:
    """Put the features of images (N, C, H, W), uint8 or float32 in 0..255 (and logits, where the store has them) into the rows that lack them.

    Blocks of whole chunks of the network are what processes share, so the split changes nothing. Raises DataError.
    """
    block = features.chunk * max(1, 256 // features.chunk)
    missing = store.missing()
    todo = np.unique(missing // block)
    mine = [int(index) for index in todo if index % store.world.size == store.world.rank]
    for done, index in enumerate(mine, 1):
        rows = np.arange(index * block, min((index + 1) * block, len(images)))
        found, logits = features.features(torch.from_numpy(np.array(images[rows[0] : rows[-1] + 1])))
        named = {"features": found.numpy()} if logits is None else {"features": found.numpy(), "logits": logits.numpy()}
        store.write(rows, **named)
        progress(len(images) * done // len(mine), len(images))


def feature_arrays(features: Features, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The arrays that a store of these features needs, found by trying the network on a black image (C, H, W).

    Raises DataError where the network does not take such images.
    """
    found, logits = features.features(torch.zeros(1, *shape, dtype=torch.uint8))
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {"features": ("float32", (found.shape[1],))}
    return arrays if logits is None else {**arrays, "logits": ("float32", (logits.shape[1],))}


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
