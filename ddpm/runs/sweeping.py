"""`ddpm sweep`: samplers x steps on a checkpoint, and the setting that `ddpm sample` uses from then on."""

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

import ddpm
from ddpm import distributed, files, plots, rundir, runtime, sampling
from ddpm import sweep as study
from ddpm.console import Console
from ddpm.data import ImageSet
from ddpm.distributed import World
from ddpm.errors import ConfigError
from ddpm.evaluation import protocol
from ddpm.evaluation.features import Features
from ddpm.evaluation.metrics import Estimate
from ddpm.evaluation.sides import cached_side, extractor_key, side, statistics_of
from ddpm.evaluation.statistics import ReferenceStatistics, check_comparable
from ddpm.guidance import Guidance
from ddpm.rundir import RunDir
from ddpm.runs.drawing import Recipe
from ddpm.runs.evaluating import Subject, check_writable, drawn_folder, expected, open_extractor, places, reference_of
from ddpm.runs.guiding import absolute
from ddpm.runs.loading import Model, load
from ddpm.runs.recording import interval, number, written
from ddpm.runs.scoring import Drawing
from ddpm.samplers import Sampler
from ddpm.sweep import Cell


@dataclass(frozen=True)
class Sweep:
    """What a sweep found: every cell, the baseline (None without one), the recommended cell, and where it was written."""

    cells: list[Cell]
    baseline: Cell | None
    recommended: Cell
    folder: Path


def sweep(
    source: str | Path,
    *,
    samplers: Sequence[str] = ("ddim", "ddpm", "dpm++2m", "dpm++3m", "unipc", "heun"),
    evaluations: Sequence[int] = (5, 10, 20, 50),
    baseline: str | None = "ddpm",
    num_images: int = 1000,
    reference: str | Path | None = None,
    extractor: str | None = None,
    weights: Path | None = None,
    seed: int = 0,
    guidance: float | str | Guidance | None = None,
    thresholding: str | None = None,
    ema: str | None = None,
    chunk: int | None = None,
    rounds: int = 3,
    out: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = False,
) -> Sweep:
    """Judge samplers at several costs by the Frechet distance of the images of the same seeds.

    Args:
        source: a run or checkpoint folder.
        samplers: specs; one without steps= is tried at each number of `evaluations`, one with steps= as it is.
        evaluations: network evaluations of an image that a sampler may take (without guidance's second one).
        baseline: a spec to compare with (steps left out: every timestep), or None.
        num_images: judged in each cell, of seeds `seed` on.
        rounds: in which every cell draws one chunk and is timed, after one round to warm up.
        out: folder for sweep.csv, sweep.json and sweep.png; None: `sweep` in the run's folder.
        reference, extractor, weights, guidance, thresholding, ema, chunk, device, precision: as for `ddpm evaluate`.

    Images already drawn for a cell, here or by `ddpm evaluate`, are not drawn again, so a killed sweep goes on. The setting
    recommended is written to the run's sampling.json, where `ddpm sample` finds it. Raises ConfigError, DataError,
    CheckpointError, MissingDependencyError.
    """
    with distributed.join() as world:
        say = Console(quiet=quiet or not world.is_main)
        _check_counts(num_images, rounds, evaluations)
        machine = runtime.resolve(device, precision, processes=world.size, local_rank=world.local_rank)
        subject = Subject(str(source), model=load(source, ema, say.warn if world.is_main else lambda text: None))
        model = subject.model
        assert model is not None
        against = reference_of(subject, reference)
        opened = open_extractor(subject, against, extractor, weights, machine.device)
        assert opened is not None
        if against.statistics is not None:
            check_comparable(expected(opened, model.diffusion.shape), against.statistics)
        planned, notes = study.plan(samplers, evaluations, model.diffusion.schedule)
        if baseline is not None:
            planned.append(_baseline(baseline, model))
        for note in notes:
            say.info(note)
        _, home = places(subject, out)
        folder = out or home.parent / "sweep"
        if world.is_main:
            check_writable(folder)
        recipe = Recipe.of(model, machine, planned[0][1], guidance, thresholding, chunk, None)
        bench = _Bench(model, recipe, range(seed, seed + num_images), opened, home, machine, world, say)
        if against.statistics is None:
            assert against.images is not None
            taken = cached_side(against.images, opened, world, say, "features of the reference")
            statistics = statistics_of(taken, opened)
        else:
            statistics = against.statistics
        cells = bench.cells(planned, statistics, rounds)
        standing = cells.pop() if baseline is not None else None
        found = Sweep(cells, standing, study.recommend(cells), folder)
        if world.is_main:
            _write(found, bench, against.facts, rounds, say)
        return found


def _check_counts(num_images: int, rounds: int, evaluations: Sequence[int]) -> None:
    if num_images < 2:
        raise ConfigError(f"--num-images={num_images} is wrong: a distance needs at least 2.")
    if rounds < 1:
        raise ConfigError(f"--rounds={rounds} is wrong: it must be at least 1.")
    if not evaluations or min(evaluations) < 1:
        raise ConfigError("--evaluations is wrong: give whole numbers of at least 1, such as 5,10,20,50.")


def _baseline(spec: str, model: Model) -> tuple[str, Sampler]:
    """The sampler to compare with, at every timestep unless it names its steps."""
    sampler = Sampler.parse(spec)
    sampler.path(model.diffusion.schedule)
    return spec, sampler


@dataclass(frozen=True, eq=False)
class _Bench:
    """All that the cells share."""

    model: Model
    recipe: Recipe
    seeds: range
    extractor: Features
    home: Path
    machine: runtime.Runtime
    world: World
    say: Console

    def cells(self, planned: Sequence[tuple[str, Sampler]], statistics: ReferenceStatistics, rounds: int) -> list[Cell]:
        """Draw, judge and time every sampler; processes other than the main one get distances of 0."""
        drawings = [
            Drawing(self.model.diffusion, replace(self.recipe, sampler=sampler), self.seeds) for _, sampler in planned
        ]
        for drawing in drawings:
            drawing.check()
        judged = [
            self._judge(label, drawing, statistics) for (label, _), drawing in zip(planned, drawings, strict=True)
        ]
        costs = self.world.broadcast(self._costs(drawings, rounds) if self.world.is_main else None)
        return [
            Cell(
                sampler.spec,
                label,
                sampler.count(self.model.diffusion.schedule),
                evaluations,
                quality,
                seconds,
                checksum,
            )
            for (label, sampler), (quality, checksum), (evaluations, seconds) in zip(
                planned, judged, cast(list[tuple[float, Estimate]], costs), strict=True
            )
        ]

    def _costs(self, drawings: Sequence[Drawing], rounds: int) -> list[tuple[float, Estimate]]:
        """Network evaluations and seconds of an image: by one process, while the others rest."""
        self.machine.place(self.model.diffusion)
        self.say.info(f"timing: {rounds} rounds of {self.recipe.chunk} images each, after one to warm up.")
        counts = [self._evaluations(drawing) for drawing in drawings]
        chunk_s = study.interleave({i: self._one_chunk(d) for i, d in enumerate(drawings)}, rounds)
        image_s = [Estimate(*(value / self.recipe.chunk for value in vars(chunk_s[i]).values())) for i in chunk_s]
        return list(zip(counts, image_s, strict=True))

    def _judge(self, label: str, drawing: Drawing, statistics: ReferenceStatistics) -> tuple[Estimate, str]:
        """The distance of the images, and their checksum."""
        self.say.info(f"{label}: {drawing.recipe.sampler.spec}")
        folder = drawn_folder(self.home, self.model, drawing)
        drawn, _ = drawing.draw(folder, self.machine, self.world, self.say)
        ours = side(folder / extractor_key(self.extractor), drawn, self.extractor, self.world, self.say, "features")
        if not self.world.is_main:
            return Estimate(0.0), ""
        scores = protocol.score(("fd",), self.extractor.name, ours, None, statistics, None)
        return next(iter(scores.values.values())), _checksum(drawn)

    def _one_chunk(self, drawing: Drawing) -> Callable[[], object]:
        """Draws the first chunk of seeds."""
        recipe = drawing.recipe

        def draw() -> None:
            parts = sampling.generate(
                drawing.diffusion,
                recipe.sampler,
                self.machine,
                seeds=range(recipe.chunk),
                guidance=recipe.guidance,
                chunk=recipe.chunk,
                thresholding=recipe.thresholding,
            )
            for _ in parts:
                pass

        return draw

    def _evaluations(self, drawing: Drawing) -> float:
        """Network evaluations of an image, counted while one chunk is drawn."""
        with _counted([drawing.diffusion.network, *drawing.recipe.guidance.networks]) as rows:
            self._one_chunk(drawing)()
        return sum(rows) / drawing.recipe.chunk


@contextmanager
def _counted(networks: Sequence[torch.nn.Module]) -> Iterator[list[int]]:
    """The batch size of every forward pass within."""
    rows: list[int] = []
    handles = [each.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))) for each in networks]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _checksum(drawn: ImageSet) -> str:
    found = hashlib.sha256()
    for start in range(0, len(drawn), 1024):
        found.update(drawn.images[start : start + 1024].tobytes())
    return found.hexdigest()


def _write(found: Sweep, bench: _Bench, reference: dict[str, Any], rounds: int, say: Console) -> None:
    """The table on the screen, sweep.csv, sweep.json, sweep.png, and the run's sampling.json."""
    everything = [*found.cells, *([found.baseline] if found.baseline else [])]
    metric = protocol.named("fd", bench.extractor.name)
    best = study.front(everything, lambda cell: cell.evaluations)
    _show(everything, best, found, metric, say)
    _write_csv(found.folder / "sweep.csv", everything, best)
    plots.fronts(found.folder / "sweep.png", _panels(everything), metric, bench.model.source.parent.parent.name)
    verdicts = [] if found.baseline is None else _verdicts(found.cells, found.baseline)
    for sentence in verdicts:
        say.info(sentence)
    record = _record(found, bench, reference, metric, rounds, verdicts)
    rundir.write_json(found.folder / "sweep.json", record)
    say.info(f"{found.folder}: sweep.csv, sweep.json and sweep.png written.")
    if bench.model.source.parent.name == "checkpoints":
        run = RunDir(bench.model.source.parent.parent)
        rundir.write_json(run.sampling, _recommendation(found.recommended, bench, metric))
        say.info(f"{run.sampling}: `ddpm sample {run.path}` draws by {found.recommended.sampler} from now on.")


def _verdicts(cells: Sequence[Cell], baseline: Cell) -> list[str]:
    budgets = sorted({cell.evaluations for cell in cells})
    sentences = [study.verdict(cells, baseline, int(budget)) for budget in budgets]
    return list(dict.fromkeys(sentence for sentence in sentences if sentence))


def _show(cells: Sequence[Cell], best: Sequence[Cell], found: Sweep, metric: str, say: Console) -> None:
    rows = [
        (
            cell.label,
            cell.steps,
            f"{cell.evaluations:g}",
            number(cell.quality.value),
            interval(vars(cell.quality)),
            f"{1000 * cell.seconds.value:.3g}",
            " ".join([*(["front"] if cell in best else []), *(["recommended"] if cell is found.recommended else [])]),
        )
        for cell in cells
    ]
    say.table("", ("sampler", "steps", "evaluations", metric, "95 % interval", "ms/image", ""), rows)


def _write_csv(path: Path, cells: Sequence[Cell], best: Sequence[Cell]) -> None:
    table = io.StringIO()
    rows = [{**cell.row(), "front": cell in best} for cell in cells]
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, table.getvalue())


def _panels(cells: Sequence[Cell]) -> list[plots.Panel]:
    """Quality against evaluations and against seconds, a line a sampler, with the front."""
    costs: list[tuple[str, Callable[[Cell], float]]] = [
        ("network evaluations an image", lambda cell: cell.evaluations),
        ("seconds an image", lambda cell: cell.seconds.value),
    ]
    panels = []
    for caption, cost in costs:
        series: dict[str, list[plots.Point]] = {cell.label: [] for cell in cells}  # one colour a label in every panel
        for cell in sorted(cells, key=cost):
            low, high = cell.quality.low, cell.quality.high
            value = cell.quality.value
            point = (cost(cell), value, value if low is None else low, value if high is None else high)
            series[cell.label].append(point)
        line = [(cost(cell), cell.quality.value) for cell in study.front(cells, cost)]
        panels.append(plots.Panel(caption, series, line))
    return panels


def _record(
    found: Sweep, bench: _Bench, reference: dict[str, Any], metric: str, rounds: int, verdicts: Sequence[str]
) -> dict[str, Any]:
    recipe = bench.recipe.written(bench.model)
    return {
        "date": rundir.now(),
        "ddpm": ddpm.__version__,
        "source": str(bench.model.source),
        "metric": metric,
        "num_images": len(bench.seeds),
        "seed": bench.seeds.start,
        "recipe": {key: value for key, value in recipe.items() if key != "sampler"},
        "extractor": bench.extractor.facts,
        "reference": reference,
        "machine": runtime.describe(bench.machine),
        "timing": {"rounds": rounds, "images": bench.recipe.chunk, "processes": 1},
        "cells": [cell.row() for cell in found.cells],
        "baseline": None if found.baseline is None else found.baseline.row(),
        "recommended": found.recommended.sampler,
        "verdicts": list(verdicts),
    }


def _recommendation(cell: Cell, bench: _Bench, metric: str) -> dict[str, Any]:
    """sampling.json: what to draw by, and why."""
    recipe = bench.recipe.written(bench.model)
    return {
        "sampler": cell.sampler,
        "guidance": absolute(bench.recipe.guidance.guidance).written,
        "thresholding": recipe["thresholding"],
        "evaluations": cell.evaluations,
        "metric": metric,
        **written(cell.quality),
        "num_images": len(bench.seeds),
        "step": bench.model.step,
        "weights_sha256": recipe["weights_sha256"],
        "date": rundir.now(),
    }
