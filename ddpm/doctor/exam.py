"""What is measured of a run before anything is judged: the checks see this, and neither files nor the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.doctor.evidence import Float64
from ddpm.schedules import Level, Schedule

Pixels = NDArray[np.uint8]

FLOOR = 0.01
"""Share of its target's power that a network may leave without harm: a linear denoiser is exact where noise is all there
is, a network is not, and there a ratio of their errors would be large and mean nothing."""


@dataclass(frozen=True, eq=False)
class Losses:
    """Errors of the network's output by the loss that it was trained with, of n images at L noise levels: float64 (n, L).

    model: of the network; linear: of the best linear denoiser in its place; power: of a network that says 0.
    """

    model: Float64
    linear: Float64
    power: Float64

    def log_ratio(self, theirs: Float64 | None = None) -> Float64:
        """(n, L): ln of the network's errors over others (those of the linear denoiser), both raised by the floor."""
        return log_ratio(self.model, self.linear if theirs is None else theirs, self.power)


def log_ratio(ours: Float64, theirs: Float64, power: Float64) -> Float64:
    """(n, L): ln of errors over others, both raised by `FLOOR` of the targets' power (m, L)."""
    floor = FLOOR * power.mean(axis=0)
    ratio: Float64 = np.log((ours + floor) / (theirs + floor))
    return ratio


@dataclass(frozen=True)
class Average:
    """The moving average that images are drawn by, beside the weights that it averages.

    name: as checkpoints call it; untouched: tensors that are one constant in it, as norms and biases are when a network is
    made, but not in the weights; stood_still: whether it is that of an earlier checkpoint, number by number, though the
    weights have moved on (None: there is no earlier one).
    """

    name: str
    untouched: int
    stood_still: bool | None


@dataclass(frozen=True, eq=False)
class Samples:
    """Images drawn as the run recommends.

    images: uint8 (n, C, H, W); labels: (n,) asked for, or None; out_of_range: root mean square of what x had beyond
    [-1, 1] when the last step was done, and the largest of it; thresholding, steps, finer_steps: of the sampler;
    losses: of the images, and power: of their targets, float64 (n, L); finer_losses: of the images of the same noise with
    finer steps, None where the sampler has no finer ones.
    """

    images: Pixels
    labels: NDArray[np.int64] | None
    out_of_range: tuple[float, float]
    thresholding: str
    steps: int
    finer_steps: int
    losses: Float64
    power: Float64
    finer_losses: Float64 | None


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Root mean square distances in grey levels from n images drawn, and from real ones, to their nearest training image.

    second: to the second nearest; held_out: (n,) to the nearest held-out image, None without such; real: (m,) of held-out
    images, or of each training image to the nearest other; prior: share of the distinct images that were trained on;
    pairs: a picture of the closest (C, H, W).
    """

    nearest: Float64
    second: Float64
    held_out: Float64 | None
    real: Float64
    prior: float
    pairs: Pixels


@dataclass(frozen=True, eq=False)
class Judged:
    """Labels given to the images drawn by a judge of real images.

    judge: what it is; given: (n,); asked: (n,) or None; real: labels it gives to m real images, real_true: their own.
    """

    judge: str
    given: NDArray[np.int64]
    asked: NDArray[np.int64] | None
    real: NDArray[np.int64]
    real_true: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelLosses:
    """What labels are worth, of n images: ln of the error with K candidate labels, the first their own; float64 (n, K).

    model: of the network; linear: of the linear denoiser with a mean for each class; candidates: (n, K) int64;
    neighbours_agree: hits and trials of "an image's nearest other has its label"; by_chance: what share would by chance.
    """

    model: Float64
    linear: Float64
    candidates: NDArray[np.int64]
    neighbours_agree: tuple[int, int]
    by_chance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Exam:
    """Everything that is known; None (or empty) where it could not be had, and `missing` says why.

    Attributes:
        schedule: of the model.
        level: the L noise levels that losses are taken at: quantiles of those trained on.
        classes: names.
        differs: field -> (in the run's folder, in the checkpoint), where these would train differently.
        other_images: whether the data set holds other images now than were trained on.
        data: training images, some; uint8 (N, C, H, W).
        fitted: losses on training images, by the weights that images are drawn by.
        held: the same on held-out images.
        raw: the loss (n, L) of the weights themselves on the images of `held` (without it, of `fitted`).
        average: None where images are drawn by the weights themselves.
        ranges: losses on the images of `fitted` in other ranges, by name.
        permuted: losses (n, L) with their channels in other orders.
        objectives: losses if the output were that of another objective, by name.
        by_time: losses (n, L, L) where the noise is of level i, and the network is told the time of level j.
        moment: largest mean square of the training images along any axis.
        labels: what they are worth, for a conditional model.
        samples, neighbours, judged: of images drawn.
        metrics: lines of metrics.jsonl.
        missing: what could not be looked at, and why.
    """

    schedule: Schedule
    level: Level
    classes: Sequence[str] = ()
    differs: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    other_images: bool = False
    data: Pixels | None = None
    fitted: Losses | None = None
    held: Losses | None = None
    raw: Float64 | None = None
    average: Average | None = None
    ranges: Mapping[str, Losses] = field(default_factory=dict)
    permuted: Mapping[tuple[int, ...], Float64] = field(default_factory=dict)
    objectives: Mapping[str, Losses] = field(default_factory=dict)
    by_time: Float64 | None = None
    moment: float | None = None
    labels: LabelLosses | None = None
    samples: Samples | None = None
    neighbours: Neighbours | None = None
    judged: Judged | None = None
    metrics: Sequence[Mapping[str, float]] = ()
    missing: Sequence[str] = ()
