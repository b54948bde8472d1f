"""Curves and pictures in PNG files: matplotlib without a display, the same bytes for the same numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.files import atomic_path


@dataclass(frozen=True)
class Curves:
    """A line for each named (xs, ys)."""

    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    xlabel: str
    ylabel: str
    title: str
    logy: bool = False

    def draw(self, axes: Any) -> None:
        """Onto matplotlib's axes."""
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, title=self.title, yscale="log" if self.logy else "linear")
        for name, (xs, ys) in self.series.items():
            axes.plot(xs, ys, label=name, marker="o" if len(xs) <= 30 else None, markersize=4)
        axes.grid(alpha=0.3)
        if len(self.series) > 1:
            axes.legend()


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture, uint8 (C, H, W), under a title."""

    picture: NDArray[np.uint8]
    title: str

    def draw(self, axes: Any) -> None:
        """Onto matplotlib's axes."""
        axes.imshow(self.picture.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(self.title)
        axes.set_axis_off()


def curves(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    logy: bool = False,
) -> None:
    """Draw one line for each named (xs, ys) and write it whole or not at all; raises DataError."""
    panel(path, [Curves(series, xlabel, ylabel, title, logy)], columns=1)


def panel(path: Path, parts: Sequence[Curves | Shown], columns: int, size: tuple[float, float] = (7, 4.5)) -> None:
    """Draw the parts row by row, each of this width and height in inches of 120 pixels; raises DataError."""
    import matplotlib.style
    from matplotlib.figure import Figure

    rows = -(-len(parts) // columns)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(columns * size[0], rows * size[1]), dpi=120, layout="constrained")
        for place, part in enumerate(parts, start=1):
            part.draw(figure.add_subplot(rows, columns, place))
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


Point = tuple[float, float, float, float]
"""A cost, a value, and the ends of the value's interval."""


@dataclass(frozen=True)
class Panel:
    """Values against a cost: the cost's caption, points by name, and the line of the best (cost, value)."""

    xlabel: str
    series: Mapping[str, Sequence[Point]]
    front: Sequence[tuple[float, float]]


def fronts(path: Path, panels: Sequence[Panel], ylabel: str, title: str) -> None:
    """Draw panels side by side, both axes logarithmic, intervals as bars, and write the picture whole or not at all."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(6 * len(panels), 4.5), dpi=120, layout="constrained")
        figure.suptitle(title)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1, xlabel=panel.xlabel, ylabel=ylabel)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.plot(*zip(*panel.front, strict=True), color="0.6", linewidth=6, alpha=0.4, label="front")
            for name, points in panel.series.items():
                xs, ys, low, high = zip(*points, strict=True)
                bars = [[y - a for y, a in zip(ys, low, strict=True)], [b - y for y, b in zip(ys, high, strict=True)]]
                axes.errorbar(xs, ys, yerr=bars, label=name, marker="o", markersize=4, capsize=3, linewidth=1.2)
            costs = [point[0] for points in panel.series.values() for point in points]
            if min(costs) == max(costs):  # a logarithmic axis cannot be fitted to one value
                axes.set_xlim(min(costs) / 2, max(costs) * 2)
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=8)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


@dataclass(frozen=True)
class Graph:
    """One line and its captions."""

    title: str
    xlabel: str
    ylabel: str
    xs: Sequence[float]
    ys: Sequence[float]
    logy: bool = False


def graphs(path: Path, shown: Sequence[Graph]) -> None:
    """Draw lines side by side, each with axes of its own, and write the picture whole or not at all; raises DataError."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(4.5 * len(shown), 4), dpi=120, layout="constrained")
        for place, graph in enumerate(shown, 1):
            axes = figure.add_subplot(1, len(shown), place, title=graph.title, xlabel=graph.xlabel, ylabel=graph.ylabel)
            axes.set_yscale("log" if graph.logy else "linear")
            axes.plot(graph.xs, graph.ys, marker="o" if len(graph.xs) <= 30 else None, markersize=4)
            axes.grid(alpha=0.3)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
