"""The Inception Score (Salimans et al. 2016): exp(E_x KL(p(y | x) || p(y))), over splits of the images."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ddpm.distributed import World
from ddpm.errors import DataError
from ddpm.evaluation.metrics import BLOCK_ROWS, Estimate, Features, Float64, check_features, mean_of_independent
from ddpm.randomness import permutation


@dataclass(frozen=True)
class Score(Estimate):
    """The mean over splits with an interval for its expectation at this split size.

    deviation: the standard deviation over splits (over their number, not one less), as papers quote it; 0 for one split.
    """

    deviation: float = 0.0


class ScoreSums:
    """What the score needs of a stream of logits: for each split, how many, the sum of p and that of p log p.

    Args:
        num_images: how many will come in all; split s begins at image floor(s num_images / splits).
        classes: of the classifier.
        splits: 10 in the literature. It biases the score: compare equal splits and num_images only.
        seed: shuffle the images before they are split; None keeps their order. Images in the order of their classes
            need it: a split of few classes scores low.

    Raises DataError where there are fewer images than splits.
    """

    def __init__(self, num_images: int, classes: int, splits: int = 10, seed: int | None = None) -> None:
        if not 1 <= splits <= num_images:
            raise DataError(f"{num_images} images cannot be cut into {splits} splits; add images or take fewer splits.")
        sizes = np.diff(np.arange(splits + 1) * num_images // splits)
        order = np.arange(num_images) if seed is None else permutation(seed, 0, num_images).numpy()
        self._split: NDArray[np.int64] = np.empty(num_images, np.int64)
        self._split[order] = np.repeat(np.arange(splits), sizes)
        self.counts: NDArray[np.int64] = np.zeros(splits, np.int64)
        self.sums: Float64 = np.zeros((splits, classes))
        self.negentropies: Float64 = np.zeros(splits)

    def add(self, logits: ArrayLike, first: int) -> None:
        """Take in images first, first + 1, ...: logits or log-probabilities (B, classes); -inf is probability 0.

        Raises DataError for NaN, +inf, another number of classes or images past the end.
        """
        batch = np.asarray(logits)
        check_features(batch, "a batch's logits", at_least=0, width=self.sums.shape[1])
        split = self._split[first : first + len(batch)]
        if first < 0 or len(split) < len(batch):
            raise DataError(f"images {first} to {first + len(batch) - 1} came, and {len(self._split)} were announced.")
        p, log_p = _softmax(batch)
        np.add.at(self.counts, split, 1)
        np.add.at(self.sums, split, p)
        np.add.at(self.negentropies, split, np.sum(p * np.where(p > 0, log_p, 0.0), axis=1))

    def over(self, world: World) -> "ScoreSums":
        """The sums of all processes, on each of them; every process must call."""
        total = ScoreSums.__new__(ScoreSums)
        total._split = self._split
        total.counts, total.sums, total.negentropies = (
            world.sum(torch.from_numpy(part.copy())).numpy() for part in (self.counts, self.sums, self.negentropies)
        )
        return total

    def score(self) -> Score:
        """The score. Raises DataError where images are missing; a single split has no interval."""
        missing = len(self._split) - int(self.counts.sum())
        if missing:
            raise DataError(f"{missing} of {len(self._split)} images never came, so there is no Inception Score.")
        mean = self.sums / self.counts[:, None]
        marginal = np.sum(mean * np.log(np.where(mean > 0, mean, 1.0)), axis=1)
        scores = np.exp(self.negentropies / self.counts - marginal)
        if len(scores) == 1:
            return Score(float(scores[0]), deviation=0.0)
        return Score(**vars(mean_of_independent(scores)), deviation=float(scores.std()))


def inception_score(logits: Features, splits: int = 10, seed: int | None = None) -> Score:
    """The Inception Score of logits or log-probabilities (N, classes); see `ScoreSums` for splits and seed."""
    check_features(logits, "the images' logits")
    sums = ScoreSums(len(logits), logits.shape[1], splits, seed)
    for first in range(0, len(logits), BLOCK_ROWS):
        sums.add(logits[first : first + BLOCK_ROWS], first)
    return sums.score()


def _softmax(logits: Features) -> tuple[Float64, Float64]:
    """(p, log p) of each row, in float64."""
    z = np.asarray(logits, dtype=np.float64)
    if np.isnan(z).any() or not np.isfinite(z.max(axis=1, initial=-np.inf)).all():
        raise DataError("a logit is NaN or infinite; look for NaN pixels and a broken extractor.")
    z = z - z.max(axis=1, keepdims=True)
    p = np.exp(z)
    total = p.sum(axis=1, keepdims=True)
    return p / total, z - np.log(total)
