"""Curves as PNG files: matplotlib without a display, the same bytes for the same numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddpm.files import atomic_path


def curves(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    logy: bool = False,
) -> None:
    """Draw one line for each named (xs, ys) and write it whole or not at all; raises DataError."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log" if logy else "linear")
        for name, (xs, ys) in series.items():
            axes.plot(xs, ys, label=name, marker="o" if len(xs) <= 30 else None, markersize=4)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
