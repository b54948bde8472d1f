"""Likelihood of 8-bit images in bits per dimension: what its estimators share, and the walk over a set of images.

An estimator gives for each image terms that sum to -log2 p(image) per dimension, or to an upper bound of it. Images are
measured in chunks; what is random is keyed by the seed and the image's place in its data set. So the numbers of an image
do not depend on how many others are asked for, on the processes, or on a stop in between.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ddpm.evaluation
from ddpm.console import Console
from ddpm.data.base import ImageSet
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.metrics import Estimate, mean_of_independent
from ddpm.evaluation.store import Store
from ddpm.images import to_float
from ddpm.models.diffusion import NO_LABEL, GaussianDiffusion, Predictor
from ddpm.randomness import Stream, permutation
from ddpm.registry import Component, import_submodules
from ddpm.runtime import Runtime
from ddpm.samplers import Thresholding
from ddpm.schedules import Level, Schedule

Rows = Mapping[str, NDArray[np.float64]]
"""What was measured, a row an image: "bits" (N, terms), and an estimator's further arrays."""


class Likelihood(Component, kind="likelihood"):
    """A way to find -log2 p(x0) per dimension."""

    parts: ClassVar[dict[str, str]]
    """Name -> what it is, of the parts that the terms make up."""
    thresholds: ClassVar[bool]
    """Whether the predicted x0 is thresholded as sampling does it."""

    @abstractmethod
    def groups(self, schedule: Schedule) -> dict[str, slice]:
        """Which terms make up each of the parts; together all of them. Raises ConfigError where the schedule does not do."""

    @abstractmethod
    def shapes(self, schedule: Schedule) -> dict[str, tuple[int, ...]]:
        """The arrays that `measure` gives, each with the shape of an image's row; "bits" is (terms,)."""

    @abstractmethod
    def measure(
        self, predictor: Predictor, x0: Tensor, condition: Tensor | None, stream: Stream, thresholding: Thresholding
    ) -> dict[str, Tensor]:
        """The rows of some images.

        Args:
            predictor: the model.
            x0: (B, C, H, W) the images in [-1, 1], each value of a uint8.
            condition: (B,) int64 labels, or None.
            stream: the images' random numbers.
            thresholding: of the predicted x0, where it `thresholds`.

        Returns:
            float64 tensors, "bits" (B, terms) among them: terms that sum to bits per dimension.
        """

    @abstractmethod
    def facts(self, schedule: Schedule, rows: Rows) -> dict[str, Any]:
        """What a record says of how it was done: network evaluations an image, what becomes of the 8 bits."""

    def write(self, folder: Path, schedule: Schedule, rows: Rows) -> list[Path]:
        """Tables and pictures of the terms, if the estimator has some; the files written. Raises DataError."""
        return []


def parse_likelihoods(specs: Sequence[str]) -> list[Likelihood]:
    """Estimators by their written form; raises ConfigError."""
    _import_estimators()
    return [Likelihood.parse(spec) for spec in specs]


@cache
def _import_estimators() -> None:
    import_submodules(ddpm.evaluation.__name__, ddpm.evaluation.__path__)


def labels_for(model: GaussianDiffusion, classes: Sequence[str], images: ImageSet) -> NDArray[np.int64] | None:
    """The labels that the model is told with the images; None for an unconditional model.

    Without labels of their own they are -1, no label, where the model has learnt that. Raises DataError.
    """
    if not model.num_classes:
        return None
    if images.labels is not None:
        numbers = images.classes == tuple(map(str, range(images.num_classes))) and images.num_classes <= len(classes)
        if images.classes != tuple(classes) and not numbers:
            raise DataError(f"{images.name}: its classes are not those of the model; give images of its classes.")
        return images.labels
    if not model.label_drop:
        raise DataError(
            f"{images.name}: has no labels, and the model was trained with --diffusion.label-drop=0; add them."
        )
    return np.full(len(images), NO_LABEL)


def measure_images(
    likelihood: Likelihood,
    model: GaussianDiffusion,
    images: ImageSet,
    labels: NDArray[np.int64] | None,
    count: int,
    machine: Runtime,
    folder: Path,
    *,
    seed: int,
    chunk: int,
    thresholding: Thresholding,
    world: World,
    say: Console,
) -> Rows:
    """The rows of `count` of the images, picked by the seed; every process must call, and each gets all of them.

    Rows that an earlier call left in the folder are kept. A chunk that is asked for in part is measured whole, so that
    more images asked for later change no number. Raises DataError: rows that are not finite, a folder in use or full.
    """
    shapes = likelihood.shapes(model.schedule)
    order = permutation(seed, 0, len(images)).numpy()
    with Store(folder, len(images), {name: ("float64", shape) for name, shape in shapes.items()}, world) as store:
        missing = store.missing()
        missing = missing[missing < count]
        mine = [start for start in np.unique(missing // chunk) * chunk if start // chunk % world.size == world.rank]
        if len(missing):
            machine.place(model)
            with say.progress(f"likelihood by {likelihood.name}", count, "images") as bar:
                bar.advance(count - len(missing))
                for start in mine:
                    rows = np.arange(start, min(start + chunk, len(images)))
                    padded = order[np.resize(rows, chunk)]
                    x0 = machine.images(to_float(torch.from_numpy(images.images[padded])))
                    stream = Stream(seed, torch.from_numpy(padded).to(machine.device), "likelihood")
                    condition = None if labels is None else torch.from_numpy(labels[padded]).to(machine.device)
                    with machine.autocast():
                        found = likelihood.measure(model, x0, condition, stream, thresholding)
                    store.write(rows, **{name: _finite(value[: len(rows)]) for name, value in found.items()})
                    bar.advance(min(len(rows) * world.size, count - bar.done))
        world.barrier()
        return {name: store.read(name)[:count] for name in shapes}


def ends(schedule: Schedule) -> tuple[Level, Level]:
    """The noisiest and the least noisy level; raises ConfigError where the former holds no signal."""
    if schedule.zero_terminal_snr:
        raise ConfigError(
            f"schedule {schedule.name!r} ends without signal, where log-SNR has no end; use vlb:steps=none."
        )
    noisiest, cleanest = (schedule.at(torch.tensor(t, dtype=torch.float64)) for t in (schedule.first, schedule.last))
    return noisiest, cleanest


def estimate(values: NDArray[np.float64]) -> Estimate:
    """The mean over images (N,) with its interval, which holds the choice of images and all that was drawn for them."""
    return mean_of_independent(values) if len(values) > 1 else Estimate(float(values.mean()))


def _finite(value: Tensor) -> NDArray[np.float64]:
    if not bool(value.isfinite().all()):
        raise DataError("the model's likelihood is NaN or infinite; use an earlier checkpoint, or --ema none.")
    return value.double().cpu().numpy()
