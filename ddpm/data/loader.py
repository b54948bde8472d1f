"""Batches as a pure function of the step: no state to save, the same images for any number of processes or workers."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ddpm.data.base import ImageSet
from ddpm.randomness import Stream, permutation


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch.

    images: (B, C, H, W) uint8; labels: (B,) int64 or None; places: (B,) int64 places in the global batch;
    indices: (B,) int64 places in the data set.
    """

    images: Tensor
    labels: Tensor | None
    places: Tensor
    indices: Tensor


class Loader:
    """The stream of batches of a run.

    The data set is walked in a new order each epoch; place i of the stream is image order[i mod N] of epoch i // N,
    and step s takes the places from s x batch on. An epoch's last batch runs on into the next epoch.

    Args:
        data: the images.
        batch_size: global batch.
        seed: of order and flips.
        flip: mirror images left to right with probability 1/2.
        part: which rows of the global batch are this process's.
        workers: threads that gather ahead.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int,
        flip: bool = False,
        part: slice = slice(None),
        workers: int = 0,
    ) -> None:
        self.data, self.batch_size, self.seed, self.flip, self.workers = data, batch_size, seed, flip, workers
        self.places = torch.arange(batch_size)[part]
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, len(data.images)).numpy())

    def batch(self, step: int) -> Batch:
        """The batch of a step (counted from 0)."""
        indices = self._indices(step)
        images = torch.from_numpy(np.ascontiguousarray(self.data.images[indices]))
        if self.flip:
            mirrored = Stream(self.seed, self.places, "flip", step).bernoulli(0.5, 1).flatten()
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = None if self.data.labels is None else torch.from_numpy(self.data.labels[indices])
        return Batch(images, labels, self.places, torch.from_numpy(indices))

    def _indices(self, step: int) -> np.ndarray:
        n = len(self.data.images)
        stream = step * self.batch_size + self.places.numpy()
        epochs = stream // n
        return np.concatenate([self._order(int(epoch))[stream[epochs == epoch] % n] for epoch in np.unique(epochs)])

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start to stop - 1, gathered ahead by the workers."""
        if self.workers == 0:
            yield from (self.batch(step) for step in range(start, stop))
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="ddpm-loader") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for step in range(start, stop):
                    waiting.append(pool.submit(self.batch, step))
                    if len(waiting) > 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
