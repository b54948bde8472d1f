"""Drawing the images that are judged, and judging a model while it is trained."""

import copy
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from ddpm import checkpoint, files, randomness, rundir, runtime, sampling
from ddpm.config import EvaluateConfig, RunConfig
from ddpm.console import Console
from ddpm.data import ImageSet
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation import protocol
from ddpm.evaluation.features import Features
from ddpm.evaluation.sides import Side, cached_side, side, statistics_of
from ddpm.evaluation.statistics import ReferenceStatistics
from ddpm.evaluation.store import Store, feature_arrays
from ddpm.models import GaussianDiffusion
from ddpm.rundir import RunDir
from ddpm.runs.drawing import Recipe
from ddpm.runs.guiding import Guide
from ddpm.runs.recording import record_of
from ddpm.samplers import Sampler, Thresholding
from ddpm.training.hooks import Checkpoints
from ddpm.training.loggers import SinkGroup
from ddpm.training.trainer import Trainer, load_weights

BY = "ddpm train"
METRICS = ("fd", "kid", "is")


@dataclass(frozen=True, eq=False)
class Drawing:
    """Images to be drawn: by which model, how, which seeds."""

    diffusion: GaussianDiffusion
    recipe: Recipe
    seeds: range
    quantise: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels that the images have; () without."""
        return self.recipe.guidance.classes

    def check(self) -> None:
        """Raise ConfigError for what the model cannot draw."""
        sampling.check_labels(self.diffusion, self.recipe.labels, len(self.classes))
        self.recipe.sampler.path(self.diffusion.schedule)
        if self.seeds.stop > randomness.SEEDS_END - self.recipe.chunk:
            raise ConfigError(f"--seed={self.seeds.start}: seeds end at 2^62; choose a lower one.")

    def draw(
        self, folder: Path, machine: runtime.Runtime, world: World, say: Console
    ) -> tuple[ImageSet, NDArray[np.float32] | None]:
        """The images and their labels, and their pixels before rounding unless they are quantised; all memory-mapped.

        What an earlier call drew into the folder is kept. Raises DataError.
        """
        model = self.diffusion
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {"images": ("uint8", model.shape), "labels": ("int64", ())}
        if not self.quantise:
            arrays["pixels"] = ("float32", model.shape)
        with Store(folder, len(self.seeds), arrays, world) as store:
            missing = store.missing()
            if len(missing):
                machine.place(model)
                with say.progress("drawing", len(self.seeds), "images") as bar:
                    bar.advance(len(self.seeds) - len(missing))
                    for part in self._parts(missing + self.seeds.start, machine, world):
                        labels = np.full(len(part.seeds), -1) if part.labels is None else part.labels
                        unrounded = {} if part.pixels is None else {"pixels": part.pixels}
                        store.write(part.seeds - self.seeds.start, images=part.images, labels=labels, **unrounded)
                        bar.advance(len(part.seeds) * world.size)
            store.sync()
            labels = np.array(store.read("labels")) if self.classes else None
            drawn = ImageSet(str(folder), store.read("images"), labels, self.classes)
            return drawn, None if self.quantise else store.read("pixels")

    def _parts(self, seeds: Any, machine: runtime.Runtime, world: World) -> Any:
        recipe = self.recipe
        return sampling.generate(
            self.diffusion,
            recipe.sampler,
            machine,
            seeds=seeds,
            guidance=recipe.guidance,
            chunk=recipe.chunk,
            thresholding=recipe.thresholding,
            world=world,
            on_step=finite_at(recipe.sampler.count(self.diffusion.schedule) - 1),
            pixels=not self.quantise,
        )


def finite_at(last: int) -> sampling.OnChunk:
    """A sampler's on_step that raises DataError where the images of the last step are not finite."""

    def check(index: int, x: torch.Tensor, _: torch.Tensor) -> None:
        if index == last and not bool(x.isfinite().all()):
            raise DataError(
                "the model draws images with NaN or infinite pixels; use an earlier checkpoint, or --ema none."
            )

    return check


@dataclass(frozen=True, eq=False)
class Judge:
    """What a model in training is judged by: the extractor, and the features of the images that it is trained on."""

    settings: EvaluateConfig
    extractor: Features
    data: ImageSet
    statistics: ReferenceStatistics
    reference: Side

    @classmethod
    def open(cls, settings: RunConfig, data: ImageSet, machine: runtime.Runtime, world: World, say: Console) -> "Judge":
        """Every process must call. Raises ConfigError, DataError, MissingDependencyError, before a step is done."""
        dataset = settings.data.dataset.partition(":")[0]
        extractor = protocol.open_extractor(settings.evaluate.extractor, None, dataset, machine.device)
        facts = protocol.Facts(
            images=settings.evaluate.num_images,
            references=len(data),
            has_logits="logits" in feature_arrays(extractor, data.shape),
            splits=10,
            same_shape=True,
        )
        protocol.choose(("fd", settings.evaluate.metric), facts)
        reference = cached_side(data, extractor, world, say, "features of the training images")
        return cls(settings.evaluate, extractor, data, statistics_of(reference, extractor), reference)

    def score(self, images: ImageSet, folder: Path) -> protocol.Scores:
        """fd, kid and is (where the extractor has classes, and there are images enough) of images drawn."""
        taken = side(folder / "features", images, self.extractor, World(), Console(quiet=True), "")
        enough = taken.logits is not None and len(images) >= 10
        metrics = METRICS if enough else METRICS[:2]
        return protocol.score(metrics, self.extractor.name, taken, self.reference, self.statistics, None)

    @property
    def metric(self) -> str:
        """The name of the metric that the best checkpoint is chosen by."""
        return protocol.named(self.settings.metric, self.extractor.name)


class Scoring:
    """Scores the first moving average and keeps the best checkpoint; training does not notice.

    A line of evaluations.jsonl each time, the values to the sinks, the best step to best.json. A resumed run takes off the
    lines of steps that it does again.
    """

    def __init__(
        self,
        judge: Judge,
        settings: RunConfig,
        guide: Guide,
        run: RunDir,
        sinks: SinkGroup,
        saver: Checkpoints,
        step: int,
    ) -> None:
        self.judge, self.settings, self.guide = judge, settings, guide
        self.run, self.sinks, self.saver = run, sinks, saver
        self._model: GaussianDiffusion | None = None
        _drop_after(run.evaluations, step)
        if (best := self._best(step=-1)) is not None:
            rundir.write_json(run.best, best)

    def __call__(self, trainer: Trainer) -> None:
        """Draw, score, record; raises DataError (images that are not finite, a full disk), which training survives."""
        start = time.perf_counter()
        folder = self.run.path / "evaluations" / f"training-{trainer.step:08d}"
        drawing = self._drawing(trainer)
        try:
            drawn, _ = drawing.draw(folder, trainer.runtime, World(), Console(quiet=True))
            scores = self.judge.score(drawn, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        record = record_of(
            by=BY,
            source=str(self.run.path),
            step=trainer.step,
            recipe=self._recipe(trainer, drawing.recipe),
            seed=0,
            num_images=len(drawing.seeds),
            extractor=dict(self.judge.extractor.facts),
            reference={
                "name": self.judge.data.name,
                "split": self.settings.data.split,
                "n": len(self.judge.data),
                "fingerprint": self.judge.data.fingerprint,
            },
            scores=scores,
            notes=(),
            seconds=time.perf_counter() - start,
        )
        rundir.append_jsonl(self.run.evaluations, record)
        self.sinks.log(trainer.step, {name: value.value for name, value in scores.values.items()})
        best = self._best(trainer.step)
        if best is not None and best["step"] == trainer.step:
            self.saver.save(trainer)
            rundir.write_json(self.run.best, best)

    def _drawing(self, trainer: Trainer) -> Drawing:
        assert isinstance(trainer.module, GaussianDiffusion)
        if self._model is None:
            self._model = copy.deepcopy(trainer.module).eval().requires_grad_(False)
        load_weights(self._model, trainer.drawing_weights())
        self._model.do_without_estimate()
        sample, machine = self.settings.sample, trainer.runtime
        recipe = Recipe(
            Sampler.parse(sample.sampler),
            self.guide,
            (),
            sample.chunk,
            Thresholding.parse(self._model.thresholding),
            machine.precision,
            machine.device.type,
        )
        return Drawing(self._model, recipe, range(self.judge.settings.num_images))

    def _recipe(self, trainer: Trainer, recipe: Recipe) -> dict[str, Any]:
        """As `Recipe.written` has it of the checkpoint of this step; the checksum is that of the file it would be."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.drawing_weights().items()}
        return {
            "weights_sha256": hashlib.sha256(safetensors.torch.save(tensors)).hexdigest(),
            "weights": f"ema-{trainer.emas[0].name}" if trainer.emas else "model",
            "step": trainer.step,
            "sampler": recipe.sampler.spec,
            "thresholding": recipe.thresholding.spec,
            **recipe.guidance.written,
            "labels": [],
            "chunk": recipe.chunk,
            "precision": recipe.precision,
            "device": recipe.device,
        }

    def _best(self, step: int) -> dict[str, Any] | None:
        """The best of the lines that training wrote by the present metric: of `step`, or with a checkpoint that stands."""
        sign = -1.0 if self.judge.settings.metric == "is" else 1.0
        found = [
            {"step": line["step"], "metric": self.judge.metric, "value": line["values"][self.judge.metric]["value"]}
            for line in rundir.read_jsonl(self.run.evaluations)
            if line.get("by") == BY
            and line["num_images"] == self.judge.settings.num_images
            and self.judge.metric in line["values"]
            and (line["step"] == step or checkpoint.step_folder(self.run.checkpoints, line["step"]).is_dir())
        ]
        return min(found, key=lambda line: sign * line["value"], default=None)


def _drop_after(path: Path, step: int) -> None:
    """Take off what training wrote of later steps; lines of `ddpm evaluate` stay."""
    if path.exists():
        held = rundir.read_jsonl(path)
        kept = [line for line in held if line.get("by") != BY or line["step"] <= step]
        if len(kept) < len(held):
            files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
