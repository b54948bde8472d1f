"""`ddpm metrics`: runs side by side, by what their metrics.jsonl and evaluations.jsonl hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm import plots
from ddpm.console import Console, human_count
from ddpm.errors import DataError
from ddpm.evaluation.published import Published, published
from ddpm.guidance import shown
from ddpm.rundir import RunDir, read_jsonl
from ddpm.runs.recording import interval, number

_SHOWN = ("step", "images", "loss", "grad_norm", "lr", "images_per_s")
_TABLED = ("fid", "fd", "kid", "is", "precision", "recall", "copies", "bpd")


@dataclass(frozen=True)
class Held:
    """What a run has measured: its name, the lines of metrics.jsonl, those of evaluations.jsonl."""

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def metrics(runs: Sequence[str | Path], out: Path = Path("metrics"), *, quiet: bool = False) -> list[Path]:
    """Print runs side by side and draw their curves into `out`: loss.png, and a picture of each metric with several steps.

    Evaluations stand in one table where their protocol is one: extractor, number of images, reference. Published figures
    stand beside those of their protocol. Returns the pictures. Raises DataError where a run holds no measurement.
    """
    say = Console(quiet=quiet)
    names = _names([Path(run) for run in runs])
    held = [_read(name, Path(run)) for name, run in zip(names, runs, strict=True)]
    if trained := [run for run in held if run.metrics]:
        say.table(
            "training", ("run", *_SHOWN), [(run.name, *map(_cell, _SHOWN, [run.metrics[-1]] * 6)) for run in trained]
        )
    for protocol, lines in _by_protocol(held).items():
        _show(protocol, lines, say)
    pictures = _draw(held, out)
    for picture in pictures:
        say.info(f"drawn: {picture}")
    return pictures


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two are alike."""
    names = [path.name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _read(name: str, path: Path) -> Held:
    run = RunDir(path)
    try:
        found = Held(name, read_jsonl(run.metrics), read_jsonl(run.evaluations))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a run folder.") from None
    if not found.metrics and not found.evaluations:
        raise DataError(
            f"{path}: holds no metrics.jsonl or evaluations.jsonl with lines; give a run folder, such as runs/digits."
        )
    evaluations = [line for line in found.evaluations if {"values", "extractor", "reference"} <= set(line)]
    return Held(name, found.metrics, evaluations)


def _cell(name: str, line: dict[str, Any]) -> str:
    value = line.get(name)
    if value is None:
        return "-"
    return human_count(value) if name == "images" else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


Line = tuple[str, dict[str, Any]]
"""A run's name and a line of its evaluations.jsonl."""


def _by_protocol(held: Sequence[Held]) -> dict[str, list[Line]]:
    """Lines that may be compared, together."""
    groups: dict[str, list[Line]] = {}
    for run in held:
        for line in run.evaluations:
            groups.setdefault(_protocol(line), []).append((run.name, line))
    return groups


def _protocol(line: dict[str, Any]) -> str:
    extractor, reference = line["extractor"], line["reference"]
    which = reference.get("fingerprint") or reference.get("sha256") or ""
    count = "statistics" if line["num_images"] is None else f"{line['num_images']:,} images"
    count += ", pixels not rounded" if line.get("quantisation") == "none" else ""
    weights = f" ({str(extractor['extractor_sha256'])[:8]})" if "extractor_sha256" in extractor else ""
    return f"{count} against {reference['name']} ({which[:8]}) by {extractor['extractor']}{weights}"


def _show(protocol: str, lines: Sequence[Line], say: Console) -> None:
    """A row an evaluation, a column a metric; then what others have published."""
    found = dict.fromkeys(name for _, line in lines for name in line["values"])
    names = [name for name in found if name.partition("_")[0].lower() in _TABLED]
    rows: list[tuple[str, ...]] = []
    for run, line in lines:
        values = [line["values"].get(name) for name in names]
        cells = ["" if value is None else f"{number(value['value'])} {interval(value)}".rstrip() for value in values]
        rows.append((run, "-" if line["step"] is None else f"{line['step']:,}", _how(line), *cells))
    rows += [_published_row(figure, names) for figure in published(lines[0][1])]
    say.table(protocol, ("run", "step", "sampler", *names), rows)


def _how(line: dict[str, Any]) -> str:
    recipe = line.get("recipe")
    if not recipe or "sampler" not in recipe:
        return line["source"] if isinstance(line.get("source"), str) else ""
    guided = f", guidance {shown(recipe['guidance'])}" if recipe["guidance"] != 1.0 else ""
    return f"{_short(recipe['sampler'])}{guided}"


def _short(sampler: str) -> str:
    """'ddim:steps=50,grid=trailing,...' -> 'ddim:steps=50'."""
    head, _, options = sampler.partition(":")
    return f"{head}:{options.split(',')[0]}" if options else head


def _published_row(figure: Published, names: Sequence[str]) -> tuple[str, ...]:
    cells = [f"{figure.value:g}" if name == figure.metric else "" for name in names]
    return (figure.who, "-", f"{figure.evaluations} evaluations ({figure.source})", *cells)


def _draw(held: Sequence[Held], out: Path) -> list[Path]:
    """loss.png, and NAME.png of every metric that some run has at several steps of one protocol."""
    drawn: list[Path] = []
    losses = {
        run.name: _curve([(line["step"], line["loss"]) for line in run.metrics if "loss" in line]) for run in held
    }
    if any(len(xs) > 1 for xs, _ in losses.values()):
        drawn.append(out / "loss.png")
        plots.curves(
            drawn[-1],
            {name: curve for name, curve in losses.items() if curve[0]},
            "step",
            "loss",
            "training",
            logy=True,
        )
    for count, (protocol, lines) in enumerate(_by_protocol(held).items()):
        for name in dict.fromkeys(name for _, line in lines for name in line["values"]):
            series: dict[str, list[tuple[float, float]]] = {}
            for run, line in lines:
                if line["step"] is not None and name in line["values"]:
                    series.setdefault(f"{run}, {_how(line)}", []).append((line["step"], line["values"][name]["value"]))
            curves = {label: _curve(points) for label, points in series.items()}
            if any(len(set(xs)) > 1 for xs, _ in curves.values()):
                drawn.append(out / f"{name}{f'-{count + 1}' if count else ''}.png")
                plots.curves(drawn[-1], curves, "step", name, protocol)
    return drawn


def _curve(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """By rising step; the latest of two at one step."""
    latest = dict(points)
    return sorted(latest), [latest[step] for step in sorted(latest)]
