"""`ddpm doctor RUN`: why are the samples of a run bad?"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ddpm
from ddpm import checkpoint, config, plots, rundir, runtime
from ddpm.console import Console
from ddpm.doctor.checks import examine
from ddpm.doctor.drawing import Recipe
from ddpm.doctor.evidence import Float64
from ddpm.doctor.exam import Exam
from ddpm.doctor.examination import Subject, measure
from ddpm.doctor.findings import Finding, alarms
from ddpm.doctor.measuring import compare_average
from ddpm.errors import CheckpointError, ConfigError, DataError
from ddpm.evaluation import protocol
from ddpm.evaluation.features import Features
from ddpm.evaluation.references import Reference, find_reference, of_dataset
from ddpm.evaluation.tiny_cnn import shipped
from ddpm.guidance import Guidance
from ddpm.images import grid
from ddpm.rundir import RunDir
from ddpm.runs import drawing
from ddpm.runs.evaluating import check_writable
from ddpm.runs.loading import Model, is_foreign, load

SHOWN = 36
"""Images of each kind in the picture."""

LEAST = 16
"""Images drawn, at least: from fewer hardly anything is sure."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, causes before what they cause, and the files doctor.json and doctor.png."""

    findings: list[Finding]
    path: Path
    picture: Path

    @property
    def alarms(self) -> list[Finding]:
        """The warnings and errors."""
        return alarms(self.findings)


def diagnose(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    num_images: int = 64,
    seed: int = 0,
    sampler: str | None = None,
    guidance: float | str | Guidance | None = None,
    thresholding: str | None = None,
    ema: str | None = None,
    chunk: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = False,
) -> Diagnosis:
    """Try a trained model on real images, draw some, and say what is wrong with it and what to do about it.

    Args:
        source: a run, or a checkpoint.
        reference: the images that it should have learnt: a data set, a folder, an .npz file of images; None: those that
            it was trained on.
        num_images: images that are drawn, from seeds `seed` on; at least 16.
        sampler, guidance, thresholding, ema, chunk, device, precision: as for `ddpm sample`.
        out: folder for doctor.json and doctor.png; None: the run's own, else `doctor`.

    Raises ConfigError, DataError, CheckpointError.
    """
    say, start = Console(quiet=quiet), time.perf_counter()
    if num_images < LEAST:
        raise ConfigError(f"--num-images={num_images} is wrong: it must be at least {LEAST}.")
    if is_foreign(Path(source)):
        raise ConfigError(
            f"{source}: is another program's checkpoint; make a run of it by `ddpm import`, and examine that."
        )
    machine = runtime.resolve(device, precision)
    model = load(source, ema, say.warn)
    recipe = drawing.Recipe.of(model, machine, sampler, guidance, thresholding, chunk, None)
    seeds = drawing.seeds_from(seed, num_images)
    recipe.sampler.path(model.diffusion.schedule)
    run = _run_of(model.source)
    home = out or (Path("doctor") if run is None else run.path)
    check_writable(home)
    subject = _subject(model, machine, recipe, seeds, reference, run)
    exam = measure(subject, say)
    found = examine(exam)
    record = {
        "date": rundir.now(),
        "ddpm": ddpm.__version__,
        "source": str(model.source),
        **recipe.written(model),
        "reference": None if subject.train is None else subject.train.name,
        "seeds": [seeds.start, seeds.stop],
        "findings": [asdict(finding) for finding in found],
        "levels": _levels(exam),
        "seconds": round(time.perf_counter() - start, 1),
    }
    rundir.write_json(home / "doctor.json", record)
    _paint(home / "doctor.png", exam)
    _show(say, found, home)
    return Diagnosis(found, home / "doctor.json", home / "doctor.png")


def _run_of(source: Path) -> RunDir | None:
    """The run that a checkpoint stands in."""
    return RunDir(source.parent.parent) if source.parent.name == "checkpoints" else None


def _subject(
    model: Model,
    machine: runtime.Runtime,
    recipe: drawing.Recipe,
    seeds: range,
    reference: str | Path | None,
    run: RunDir | None,
) -> Subject:
    found = checkpoint.load(model.source)
    real, missing = _real(model, reference)
    weights = None if model.weights == "model" else found.tensors("model")
    machine.place(model.diffusion)
    return Subject(
        diffusion=model.diffusion,
        machine=machine,
        recipe=Recipe(recipe.sampler, recipe.thresholding, recipe.guidance, recipe.chunk),
        seeds=seeds,
        classes=recipe.guidance.classes or model.classes,
        weights=weights,
        average=None if weights is None else _average(model, found.tensors(model.weights), weights),
        train=None if real is None else real.images,
        held_out=None if real is None else real.held_out,
        classifier=None if real is None else _classifier(real, machine),
        differs=_differences(run, found),
        other_images=real is not None
        and reference is None
        and found.state["data"]["fingerprint"] not in (None, real.facts["fingerprint"]),  # None: imported
        metrics=[] if run is None else [m for m in rundir.read_jsonl(run.metrics) if m.get("step", 0) <= model.step],
        missing=missing,
    )


def _real(model: Model, given: str | Path | None) -> tuple[Reference | None, list[str]]:
    """The images to compare with, and what cannot be looked at; raises DataError for a --reference that does not fit."""
    if given is not None:
        real = find_reference(str(given))
        if real.images is None:
            raise ConfigError(f"--reference {given}: holds statistics alone; give a data set, or images.")
        if real.images.shape != model.diffusion.shape:
            sizes = ("x".join(map(str, shape)) for shape in (real.images.shape, model.diffusion.shape))
            raise DataError(
                "--reference {}: its images are {}, those of the model {}; give images of one size.".format(
                    given, *sizes
                )
            )
        return real, []
    try:
        return of_dataset(model.config.data), []
    except (DataError, ConfigError) as error:
        return None, [f"no training images to compare with ({error.args[0].rstrip('.')}); give some by --reference"]


def _average(model: Model, average: Any, weights: Any) -> Any:
    """The average beside the weights, and beside those of the checkpoint before where there is one."""
    standing = checkpoint.listing(model.source.parent)
    for path in standing[standing.index(model.source) + 1 :] if model.source in standing else ():
        try:
            older = checkpoint.load(path)
            return compare_average(
                model.weights.removeprefix("ema-"),
                average,
                weights,
                (older.tensors(model.weights), older.tensors("model")),
            )
        except CheckpointError:  # damaged, or without this average
            continue
    return compare_average(model.weights.removeprefix("ema-"), average, weights, None)


def _classifier(real: Reference, machine: runtime.Runtime) -> Features | None:
    """The small classifier of a data set whose weights are shipped, where its classes are the images'."""
    if real.images is None or real.dataset not in shipped():
        return None
    opened = protocol.open_extractor(None, None, real.dataset, machine.device)
    return opened if opened.classes == real.images.classes else None


def _differences(run: RunDir | None, found: checkpoint.Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Fields in which the run's config.yaml is not the checkpoint's."""
    folder = None if run is None else run.read_config()
    return {} if folder is None else config.differences(folder, found.config())


def _levels(exam: Exam) -> dict[str, Any]:
    """Losses by noise level, as lists."""
    tables: dict[str, Float64 | None] = {"weights": exam.raw}
    if exam.fitted is not None:
        tables |= {"loss": exam.fitted.model, "linear": exam.fitted.linear}
    if exam.held is not None:
        tables["held_out"] = exam.held.model
    if exam.samples is not None:
        tables |= {"samples": exam.samples.losses, "finer_samples": exam.samples.finer_losses}
    means = {name: table.mean(axis=0).tolist() for name, table in tables.items() if table is not None}
    return {"t": exam.level.t.tolist(), "log_snr": exam.level.log_snr.tolist(), **means}


def _paint(path: Path, exam: Exam) -> None:
    """doctor.png: losses by level, pixels, the course of training; real images, drawn ones, the closest pairs."""
    parts: list[plots.Curves | plots.Shown] = []
    levels = _levels(exam)
    log_snr = levels["log_snr"]
    named = {
        "training images": "loss",
        "held-out images": "held_out",
        "weights, not averaged": "weights",
        "images drawn": "samples",
        "linear denoiser": "linear",
    }
    series = {name: (log_snr, levels[key]) for name, key in named.items() if key in levels}
    parts.append(plots.Curves(series, "log-SNR", "loss", "loss by noise level", logy=True))
    sets = {"training images": exam.data, "drawn": None if exam.samples is None else exam.samples.images}
    histograms = {name: _histogram(images) for name, images in sets.items() if images is not None}
    parts.append(plots.Curves(histograms, "pixel value", "share", "pixels"))
    if lines := [line for line in exam.metrics if "loss" in line and "grad_norm" in line]:
        steps = [line["step"] for line in lines]
        course = {
            name: (steps, [line[key] for line in lines])
            for name, key in (("loss", "loss"), ("gradient norm", "grad_norm"))
        }
        parts.append(plots.Curves(course, "step", "", "training", logy=True))
    for name, images in sets.items():
        if images is not None:
            parts.append(plots.Shown(grid(images[:SHOWN]), name))
    if exam.neighbours is not None:
        parts.append(plots.Shown(exam.neighbours.pairs, "closest: drawn, trained on"))
    plots.panel(path, parts, columns=3, size=(5.5, 4.2))


def _histogram(images: Any) -> tuple[list[float], list[float]]:
    counts, edges = np.histogram(images, bins=64, range=(0, 256))
    return (edges[:-1] + 2).tolist(), (counts / counts.sum()).tolist()


def _show(say: Console, found: list[Finding], home: Path) -> None:
    for finding in found:
        say.info(f"{finding.level:8} {finding.check + ':':14} {finding}")
    wrong = alarms(found)
    told = (
        "nothing wrong was found"
        if not wrong
        else f"{len(wrong)} alarm{'s' if len(wrong) > 1 else ''}, the first is the likeliest cause"
    )
    say.info(f"{told}. {home / 'doctor.png'} shows it, {home / 'doctor.json'} holds the numbers.")
