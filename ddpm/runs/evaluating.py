"""`ddpm evaluate` and `ddpm stats`, and `ddpm.evaluate` in Python."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ddpm import checkpoint, distributed, files, images, rundir, runtime
from ddpm.config import DataConfig
from ddpm.console import Console
from ddpm.data import ImageSet
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation import protocol
from ddpm.evaluation.features import Features
from ddpm.evaluation.metrics import Estimate
from ddpm.evaluation.protocol import Scores
from ddpm.evaluation.references import (
    Reference,
    find_reference,
    holds_statistics,
    of_dataset,
    read_images,
    subset,
)
from ddpm.evaluation.sides import Side, cached_side, digest, extractor_key, side, statistics_of
from ddpm.evaluation.statistics import ReferenceStatistics, check_comparable, load_npz, save_npz
from ddpm.evaluation.store import feature_arrays
from ddpm.guidance import Guidance
from ddpm.randomness import permutation
from ddpm.rundir import RunDir
from ddpm.runs.drawing import Recipe
from ddpm.runs.loading import Model, is_foreign, load
from ddpm.runs.recording import read_estimate, record_of, show
from ddpm.runs.scoring import Drawing

BY = "ddpm evaluate"
"""Who wrote a line."""


@dataclass(frozen=True)
class Evaluation:
    """A line of evaluations.jsonl, the file it went to, and the picture of the closest pairs (None without one)."""

    record: dict[str, Any]
    path: Path
    picture: Path | None

    @property
    def values(self) -> dict[str, Estimate]:
        """The metrics by name, as they are called in the record; what has no interval has None for it."""
        return {name: read_estimate(value) for name, value in self.record["values"].items()}


@dataclass(frozen=True, eq=False)
class Subject:
    """What is judged: a model that draws, images, or statistics; one of the three is there."""

    source: str
    model: Model | None = None
    images: ImageSet | None = None
    statistics: ReferenceStatistics | None = None

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width), where it is known."""
        return self.model.diffusion.shape if self.model else self.images.shape if self.images else None


def evaluate(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    num_images: int | None = None,
    metrics: Sequence[str] | None = None,
    extractor: str | None = None,
    weights: Path | None = None,
    seed: int = 0,
    sampler: str | None = None,
    guidance: float | str | Guidance | None = None,
    thresholding: str | None = None,
    ema: str | None = None,
    splits: int = 10,
    quantise: bool = True,
    chunk: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = False,
) -> Evaluation:
    """Judge images against a reference, and append a self-describing line to evaluations.jsonl.

    Args:
        source: a run or checkpoint folder (images are drawn from seeds `seed` on), a folder of images, an .npz file of images
            (arr_0) or of statistics (mu, sigma).
        reference: a data set's name, a folder, an .npz file; None: the data that the run was trained on.
        num_images: how many are drawn, or taken (a subset seeded by `seed`); None: the run's evaluate.num_images, or all.
        metrics: of fd, kid, is, pr, classes, memorisation; None: all that can be had.
        extractor: a spec; None: tiny-cnn where its weights for the reference are shipped, else inception-tf.
        weights: the file that the extractor reads.
        sampler, guidance, thresholding, ema, chunk, device, precision: as for `ddpm sample`.
        splits: of the Inception Score.
        quantise: score images as the 8-bit files they would be saved as; without it, drawn pixels before rounding (the
            protocol of w86763777/pytorch-ddpm).
        out: folder for evaluations.jsonl; None: the run's folder, else `evaluations`.

    Everything is checked, and the reference read, before the first image is drawn. A killed evaluation goes on where it
    stopped. Raises ConfigError, DataError, CheckpointError, MissingDependencyError.
    """
    with distributed.join() as world:
        say = Console(quiet=quiet or not world.is_main)
        start = time.perf_counter()
        machine = runtime.resolve(device, precision, processes=world.size, local_rank=world.local_rank)
        _check_options(num_images, splits)
        subject = _subject(source, ema, num_images, seed, say)
        against = reference_of(subject, reference)
        opened = open_extractor(subject, against, extractor, weights, machine.device)
        if not quantise:
            _check_unrounded(subject, opened)
        drawing = None
        if subject.model is not None:
            recipe = Recipe.of(subject.model, machine, sampler, guidance, thresholding, chunk, None)
            count = num_images or subject.model.config.evaluate.num_images
            drawing = Drawing(subject.model.diffusion, recipe, range(seed, seed + count), quantise)
            drawing.check()
        jsonl, home = places(subject, out)
        work = _Work(subject, drawing, against, opened, splits, home, world, say)
        chosen, notes = work.choose(metrics)
        if world.is_main:
            check_writable(home)
        scores = work.score(chosen, machine)
        record = world.broadcast(work.record(scores, notes, seed, start) if world.is_main else None)
        result = Evaluation(cast(dict[str, Any], record), jsonl, work.picture if "memorisation" in chosen else None)
        if world.is_main:
            rundir.append_jsonl(jsonl, result.record)
            show(result.record, say)
            say.info(f"{jsonl}: a line added." + (f" The closest pairs: {result.picture}." if result.picture else ""))
        return result


@dataclass(frozen=True, eq=False)
class _Work:
    """An evaluation with all its parts at hand."""

    subject: Subject
    drawing: Drawing | None
    reference: Reference
    extractor: Features | None
    splits: int
    home: Path
    world: World
    say: Console

    @property
    def picture(self) -> Path:
        """Where the closest pairs are shown."""
        return self.home / self.key / "closest.png"

    @property
    def key(self) -> str:
        """The folder of this very set of images: everything that decides them is in its name's digest."""
        if self.drawing is not None:
            assert self.subject.model is not None
            return drawn_folder(self.home, self.subject.model, self.drawing).name
        facts = {"images": self.subject.images.fingerprint if self.subject.images else self.subject.source}
        head = "".join(letter if letter.isalnum() else "-" for letter in Path(self.subject.source).stem) or "images"
        return f"{head}-{digest(facts)}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels that the images have; () without labels."""
        images = self.subject.images
        return self.drawing.classes if self.drawing else images.classes if images else ()

    @property
    def count(self) -> int | None:
        """Images that are judged; None for statistics."""
        return len(self.drawing.seeds) if self.drawing else len(self.subject.images) if self.subject.images else None

    def choose(self, metrics: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Which metrics, and notes on others; refuses sets that cannot be compared. Raises ConfigError, DataError."""
        theirs, shape = self.reference.images, self.subject.shape
        if theirs is not None and shape is not None and shape != theirs.shape:
            raise DataError(
                f"--reference {self.reference.name}: its images are {_size(theirs.shape)}, those of {self.subject.source} {_size(shape)}; "
                "compare images of one size and number of channels."
            )
        for known in (self.subject.statistics, self.reference.statistics):
            if known is not None and self.extractor is not None:
                check_comparable(expected(self.extractor, shape or (theirs.shape if theirs else None)), known)
        has_logits = False
        if self.extractor is not None and (shape or (theirs and theirs.shape)) is not None:
            channels = cast(tuple[int, int, int], shape or (theirs and theirs.shape))
            has_logits = "logits" in feature_arrays(self.extractor, channels)
        facts = protocol.Facts(
            images=self.count,
            references=None if theirs is None else len(theirs),
            has_logits=has_logits,
            splits=self.splits,
            same_shape=theirs is not None and shape == theirs.shape,
            classes=protocol.comparable_classes(self.classes, theirs),
        )
        return protocol.choose(metrics, facts)

    def score(self, metrics: Sequence[str], machine: runtime.Runtime) -> Scores:
        """Read the reference, draw what is missing, take features, compare. Other processes than the main one get no numbers."""
        theirs, statistics = self._reference_side()
        if self.subject.statistics is not None:
            check_comparable(self.subject.statistics, statistics)
            return protocol.score_statistics(self.subject.statistics, statistics, self.extractor_name)
        assert self.extractor is not None
        if self.drawing is None:
            assert self.subject.images is not None
            ours = cached_side(self.subject.images, self.extractor, self.world, self.say, "features of the images")
        else:
            folder = self.home / self.key
            drawn, pixels = self.drawing.draw(folder, machine, self.world, self.say)
            key = extractor_key(self.extractor)
            ours = side(folder / key, drawn, self.extractor, self.world, self.say, "features", pixels=pixels)
        if not self.world.is_main:
            return Scores()
        self.say.info(f"comparing: {', '.join(metrics)}.")
        found = protocol.score(
            metrics, self.extractor.name, ours, theirs, statistics, self.reference.held_out, self.splits
        )
        if found.pairs is not None:
            images.save_png(self.picture, found.pairs)
        return found

    @property
    def extractor_name(self) -> str:
        """Of the extractor, or of that which made the statistics."""
        made = [
            s.extractor for s in (self.subject.statistics, self.reference.statistics) if s is not None and s.extractor
        ]
        return self.extractor.name if self.extractor is not None else (made or ["unknown"])[0]

    def _reference_side(self) -> tuple[Side | None, ReferenceStatistics]:
        if self.reference.statistics is not None:
            return None, self.reference.statistics
        assert self.reference.images is not None and self.extractor is not None
        theirs = cached_side(self.reference.images, self.extractor, self.world, self.say, "features of the reference")
        return theirs, statistics_of(theirs, self.extractor)

    def record(self, scores: Scores, notes: Sequence[str], seed: int, start: float) -> dict[str, Any]:
        """The line of evaluations.jsonl."""
        drawn, model = self.drawing, self.subject.model
        facts = dict(self.extractor.facts) if self.extractor is not None else {"extractor": self.extractor_name}
        return record_of(
            by=BY,
            source=self.subject.source,
            step=None if model is None else model.step,
            recipe=None if drawn is None or model is None else drawn.recipe.written(model),
            seed=None if drawn is None else seed,
            num_images=self.count,
            extractor=facts,
            reference=self.reference.facts,
            scores=scores,
            notes=notes,
            quantisation="uint8" if drawn is None or drawn.quantise else "none",
            seconds=time.perf_counter() - start,
        )


def drawn_folder(home: Path, model: Model, drawing: Drawing) -> Path:
    """Where the images of this very recipe and these seeds are kept."""
    facts = {**drawing.recipe.written(model), "seeds": [drawing.seeds.start, drawing.seeds.stop]}
    if not drawing.quantise:
        facts["quantisation"] = "none"
    return home / f"{facts['sampler'].partition(':')[0]}-{model.step:08d}-{digest(facts)}"


def expected(extractor: Features, shape: tuple[int, int, int] | None) -> ReferenceStatistics:
    """Statistics of images of this shape as an extractor would make them, with zeros for numbers."""
    return ReferenceStatistics(
        mu=np.zeros(extractor.dim),
        sigma=np.zeros((extractor.dim, extractor.dim)),
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        image_size=None if shape is None else (shape[1], shape[2]),
    )


def stats(
    data: DataConfig,
    out: Path,
    *,
    extractor: str | None = None,
    weights: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> ReferenceStatistics:
    """Write mu and sigma of a data set's features, with n, the extractor, its checksum, sizes: `ddpm stats`.

    Args:
        data: a data set; `folder` and `npz` with a path are read as `ddpm evaluate` reads them.
        out: .npz file.
        extractor, weights, device: as for `evaluate`.

    Raises ConfigError, DataError, MissingDependencyError.
    """
    say, world = Console(quiet=quiet), World()
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: must end in .npz.")
    machine = runtime.resolve(device)
    plain = data.dataset in ("folder", "npz") and data == DataConfig(dataset=data.dataset, path=data.path)
    found = read_images(data.path) if plain and data.path is not None else of_dataset(data).images
    assert found is not None
    opened = protocol.open_extractor(extractor, weights, data.dataset.partition(":")[0], machine.device)
    if len(found) < 2:
        raise DataError(f"{found.name}: statistics need at least 2 images, and there are {len(found)}; add some.")
    check_writable(out.parent)
    made = statistics_of(cached_side(found, opened, world, say, "features"), opened)
    save_npz(out, made)
    say.info(f"{out}: mean and covariance of {len(found):,} images of {found.name} by {opened.name}.")
    return made


def _check_options(num_images: int | None, splits: int) -> None:
    if num_images is not None and num_images < 1:
        raise ConfigError(f"--num-images={num_images} is wrong: it must be at least 1.")
    if splits < 1:
        raise ConfigError(f"--splits={splits} is wrong: it must be at least 1.")


def _check_unrounded(subject: Subject, extractor: Features | None) -> None:
    """Raise ConfigError where there are no pixels before rounding, or the extractor rounds them."""
    if subject.model is None or extractor is None:
        raise ConfigError(f"--no-quantise: {subject.source} draws nothing, its images are 8-bit already; leave it out.")
    if extractor.rounds:
        raise ConfigError(
            f"--no-quantise: the extractor {extractor.name} rounds pixels to 8 bits itself; leave it out."
        )


def _subject(source: str | Path, ema: str | None, num_images: int | None, seed: int, say: Console) -> Subject:
    """What SOURCE is: statistics or images of an .npz file, a run or a checkpoint, ours or another program's, a folder of images."""
    path, name = Path(source).expanduser(), str(source)
    if path.is_file() and path.suffix == ".npz" and holds_statistics(path):
        return Subject(name, statistics=load_npz(path))
    if path.suffix != ".npz" and ((path.is_dir() and _is_run(path)) or is_foreign(path)):
        return Subject(name, model=load(path, ema, say.warn))
    if not path.exists():
        raise DataError(f"{path}: is no run, checkpoint, folder of images or .npz file; give one of these.")
    found = read_images(path)
    if num_images is not None and num_images > len(found):
        raise DataError(f"--num-images={num_images}: {path} holds {len(found)} images; ask for no more than these.")
    if num_images is not None and num_images < len(found):
        found = subset(found, np.sort(permutation(seed, 0, len(found)).numpy()[:num_images]))
    return Subject(name, images=found)


def _is_run(path: Path) -> bool:
    return (
        (path / checkpoint.MANIFEST).exists() or (path / "checkpoints").is_dir() or (path / "config.yaml").exists()
        or bool(checkpoint.listing(path))
    )  # fmt: skip


def reference_of(subject: Subject, given: str | Path | None) -> Reference:
    """What is compared with: what --reference names, or the data that the model was trained on; raises ConfigError, DataError."""
    if given is not None:
        return find_reference(str(given))
    if subject.model is None:
        raise ConfigError(
            f"--reference is missing: {subject.source} has no data of its own; give a data set, a folder or an .npz file."
        )
    return of_dataset(subject.model.config.data)


def open_extractor(
    subject: Subject, reference: Reference, spec: str | None, weights: Path | None, device: torch.device
) -> Features | None:
    """The extractor, or None where both sides are statistics; checked to take the images."""
    if subject.statistics is not None and reference.statistics is not None:
        return None
    opened = protocol.open_extractor(spec, weights, reference.dataset or _dataset_of(subject), device)
    for shape in (subject.shape, reference.images.shape if reference.images is not None else None):
        if shape is not None:
            opened.check_channels(shape[0])
    return opened


def _dataset_of(subject: Subject) -> str:
    return subject.model.config.data.dataset.partition(":")[0] if subject.model is not None else ""


def places(subject: Subject, out: Path | None) -> tuple[Path, Path]:
    """The file for the record, and the folder for pictures and what is kept of the work."""
    if out is None and subject.model is not None and subject.model.source.parent.name == "checkpoints":
        run = RunDir(subject.model.source.parent.parent)
        return run.evaluations, run.path / "evaluations"
    home = out or Path("evaluations")
    return home / "evaluations.jsonl", home


def check_writable(folder: Path) -> None:
    """Raise DataError before any work where a folder cannot be written to."""
    probe = folder / ".writable"
    files.write_text(probe, "")
    with suppress(OSError):
        probe.unlink()


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
