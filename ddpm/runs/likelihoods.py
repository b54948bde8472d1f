"""`ddpm evaluate --likelihood`, and `ddpm.likelihood` in Python."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import ddpm
from ddpm import distributed, rundir, runtime, sampling
from ddpm.console import Console
from ddpm.data import ImageSet
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.likelihood import Likelihood, Rows, estimate, labels_for, measure_images, parse_likelihoods
from ddpm.evaluation.references import Reference, find_reference, of_dataset
from ddpm.evaluation.sides import digest
from ddpm.runs.evaluating import BY, Evaluation, Subject, check_writable, places
from ddpm.runs.loading import Model, load
from ddpm.runs.recording import interval, number, written
from ddpm.samplers import Thresholding

HELD_OUT = {"train": "test", "test": "train"}
"""Part of the data that a run was trained on -> the part that it has not seen."""


def likelihood(
    source: str | Path,
    *,
    estimators: Sequence[str] = ("vlb",),
    num_images: int | None = None,
    split: str | None = None,
    reference: str | Path | None = None,
    seed: int = 0,
    thresholding: str | None = None,
    ema: str | None = None,
    chunk: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = False,
) -> list[Evaluation]:
    """Bits per dimension of images under a model, by each estimator: a line of evaluations.jsonl each.

    Args:
        source: a run or checkpoint folder.
        estimators: likelihood specs: vlb, the variational bound; ode, the probability-flow ODE.
        num_images: how many, picked by the seed; None: the run's evaluate.num_images, or all where there are fewer.
        split: part of the run's data they are taken from; None: the part that was not trained on.
        reference: other images: a data set, a folder, an .npz file.
        seed: of the choice of images and of all noise.
        thresholding, ema, chunk, device: as for `ddpm sample`. The ODE is never thresholded.
        precision: as for `ddpm sample`; "auto" is float32.
        out: folder for evaluations.jsonl; None: the run's folder.

    A conditional model is told the images' own labels. A killed evaluation goes on where it stopped, and one of more
    images measures those that are new. Raises ConfigError, DataError, CheckpointError.
    """
    with distributed.join() as world:
        say = Console(quiet=quiet or not world.is_main)
        machine = runtime.resolve(
            device, "float32" if precision == "auto" else precision, processes=world.size, local_rank=world.local_rank
        )
        model = load(source, ema, say.warn)
        found = parse_likelihoods(estimators)
        for estimator in found:
            estimator.groups(model.diffusion.schedule)
        chunk = model.config.sample.chunk if chunk is None else chunk
        sampling.check_chunk(chunk)
        rule = model.diffusion.thresholding if thresholding in (None, "model") else thresholding
        against = _images(model, split, reference)
        assert against.images is not None
        labels = labels_for(model.diffusion, model.classes, against.images)
        count = _count(num_images, model, against)
        jsonl, home = places(Subject(str(source), model=model), out)
        if world.is_main:
            check_writable(home)
        work = _Work(
            model,
            against,
            against.images,
            labels,
            count,
            machine,
            seed,
            chunk,
            Thresholding.parse(rule),
            home,
            world,
            say,
        )
        return [work.evaluate(estimator, str(source), jsonl) for estimator in found]


@dataclass(frozen=True, eq=False)
class _Work:
    """An evaluation with all its parts at hand."""

    model: Model
    reference: Reference
    images: ImageSet
    labels: NDArray[np.int64] | None
    count: int
    machine: runtime.Runtime
    seed: int
    chunk: int
    thresholding: Thresholding
    home: Path
    world: World
    say: Console

    def recipe(self, estimator: Likelihood) -> dict[str, Any]:
        """All that decides an image's numbers beside the estimator, the image and the seed."""
        return {
            "weights_sha256": self.model.weights_sha256,
            "weights": self.model.weights,
            "step": self.model.step,
            "thresholding": self.thresholding.spec if estimator.thresholds else "none",
            "labels": "own" if self.model.diffusion.num_classes else None,
            "chunk": self.chunk,
            "precision": self.machine.precision,
            "device": self.machine.device.type,
        }

    def evaluate(self, estimator: Likelihood, source: str, jsonl: Path) -> Evaluation:
        """Measure, write tables and pictures, add the line."""
        start = time.perf_counter()
        recipe = self.recipe(estimator)
        facts = {**recipe, "by": estimator.spec, "seed": self.seed, "images": self.images.fingerprint}
        folder = self.home / f"likelihood-{estimator.name}-{self.model.step:08d}-{digest(facts)}"
        rows = measure_images(
            estimator,
            self.model.diffusion,
            self.images,
            self.labels,
            self.count,
            self.machine,
            folder,
            seed=self.seed,
            chunk=self.chunk,
            thresholding=self.thresholding,
            world=self.world,
            say=self.say,
        )
        record, written_files = None, []
        if self.world.is_main:
            written_files = estimator.write(folder, self.model.diffusion.schedule, rows)
            record = {**self._record(estimator, rows, source), "recipe": recipe}
            record["seconds"] = round(time.perf_counter() - start, 2)
            rundir.append_jsonl(jsonl, record)
            self._show(estimator, record)
            made = ", ".join(path.name for path in written_files)
            self.say.info(f"{jsonl}: a line added." + (f" In {folder}: {made}." if made else ""))
        pictures = [path for path in written_files if path.suffix == ".png"]
        return Evaluation(cast(dict[str, Any], self.world.broadcast(record)), jsonl, pictures[0] if pictures else None)

    def _record(self, estimator: Likelihood, rows: Rows, source: str) -> dict[str, Any]:
        bits, schedule = rows["bits"], self.model.diffusion.schedule
        named = {f"bpd_{estimator.name}": estimate(bits.sum(axis=1))}
        for part, where in estimator.groups(schedule).items():
            named[f"bpd_{estimator.name}_{part}"] = estimate(bits[:, where].sum(axis=1))
        return {
            "date": rundir.now(),
            "by": BY,
            "ddpm": ddpm.__version__,
            "source": source,
            "step": self.model.step,
            "num_images": self.count,
            "seed": self.seed,
            "quantisation": "uint8",
            "extractor": {"extractor": estimator.spec},
            "reference": self.reference.facts,
            "settings": estimator.facts(schedule, rows),
            "values": {name: written(value) for name, value in named.items()},
            "classes": {},
            "notes": [],
        }

    def _show(self, estimator: Likelihood, record: dict[str, Any]) -> None:
        meanings = ["a dimension: lower is better; all images equally likely have 8", *estimator.parts.values()]
        rows = [
            (name, number(value["value"]), interval(value), meaning)
            for (name, value), meaning in zip(record["values"].items(), meanings, strict=True)
        ]
        split = f" {self.reference.split}" if self.reference.split else ""
        title = f"{record['source']}: {self.count:,} images of {self.reference.name}{split}, by {estimator.spec}"
        self.say.table(title, ("bits", "value", "95 % interval", "what it means"), rows)


def _images(model: Model, split: str | None, reference: str | Path | None) -> Reference:
    """The images to be measured; raises ConfigError or DataError."""
    if reference is not None and split is not None:
        raise ConfigError("--split and --reference exclude each other.")
    data = model.config.data
    if reference is not None:
        found = find_reference(str(reference))
    else:
        part = split or HELD_OUT.get(data.split)
        if part is None:
            raise ConfigError(
                f"{model.source}: was trained on all images of {data.dataset}; give --split train, or others by --reference."
            )
        try:
            found = of_dataset(data.model_copy(update={"split": part}))
        except DataError as error:
            if split is not None:
                raise
            raise DataError(f"there are no held-out images, so give --split train or --reference: {error}") from None
    if found.images is None:
        raise DataError(f"--reference {reference}: is statistics, and likelihood needs images; give some.")
    if found.images.shape != model.diffusion.shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (found.images.shape, model.diffusion.shape))
        raise DataError(f"{found.name}: its images are {theirs}, those of the model {ours}; give images of its size.")
    return found


def _count(num_images: int | None, model: Model, against: Reference) -> int:
    assert against.images is not None
    there = len(against.images)
    if num_images is not None and num_images < 1:
        raise ConfigError(f"--num-images={num_images} is wrong: it must be at least 1.")
    if num_images is not None and num_images > there:
        raise DataError(f"--num-images={num_images}: {against.name} holds {there} images; ask for no more than these.")
    return num_images or min(model.config.evaluate.num_images, there)
