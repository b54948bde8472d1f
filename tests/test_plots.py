"""Curves: a picture of the asked size, the same bytes for the same numbers, nothing left of a failure."""

from pathlib import Path

import numpy as np
import pytest

from ddpm.errors import DataError
from ddpm.images import read_image
from ddpm.plots import Graph, curves, graphs

SERIES = {"ddim": ([10, 20, 50], [9.0, 5.0, 3.0]), "ddpm": ([10, 50, 1000], [90.0, 30.0, 3.1])}


@pytest.mark.parametrize("logy", [False, True])
def test_curves_are_deterministic_png(tmp_path: Path, logy):
    for name in ("a.png", "b.png"):
        curves(tmp_path / name, SERIES, "steps", "FID", "quality", logy)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_image(tmp_path / "a.png").shape == (3, 540, 840)


def test_curves_show_their_numbers(tmp_path: Path):
    curves(tmp_path / "a.png", {"x": ([0, 1], [0.0, 1.0])}, "x", "y", "t")
    curves(tmp_path / "b.png", {"x": ([0, 1], [1.0, 0.0])}, "x", "y", "t")
    assert not np.array_equal(read_image(tmp_path / "a.png"), read_image(tmp_path / "b.png"))


def test_graphs_stand_side_by_side_with_axes_of_their_own(tmp_path: Path):
    falling, rising = (
        Graph("a", "t", "bits", [0, 1], [1.0, 0.1], logy=True),
        Graph("b", "t", "error", [0, 1], [0.0, 5.0]),
    )
    for name, shown in (("a.png", [falling, rising]), ("b.png", [falling, rising]), ("c.png", [rising, falling])):
        graphs(tmp_path / name, shown)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    assert read_image(tmp_path / "a.png").shape == (3, 480, 1080)


def test_the_users_style_changes_nothing(tmp_path: Path):
    import matplotlib as mpl

    curves(tmp_path / "a.png", SERIES, "x", "y", "t")
    with mpl.rc_context({"axes.facecolor": "black", "lines.linewidth": 9}):
        curves(tmp_path / "b.png", SERIES, "x", "y", "t")
        assert mpl.rcParams["lines.linewidth"] == 9
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_cannot_be_written_is_a_data_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError):
        curves(tmp_path / "file" / "a.png", SERIES, "x", "y", "t")
