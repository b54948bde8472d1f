"""`ddpm metrics`: only what was measured by one protocol stands in one table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ddpm.cli import main
from ddpm.images import read_image


def line(
    step: int, value: float, extractor: str = "tiny-cnn", count: int = 100, data: str = "digits", pixels: str = "uint8"
) -> dict[str, Any]:
    name = "FID" if extractor == "inception-tf" else f"fd_{extractor}"
    return {
        "step": step, "num_images": count, "quantisation": pixels, "source": "x",
        "extractor": {"extractor": extractor, "extractor_sha256": "abcdef0123"},
        "reference": {"name": data, "n": count, "fingerprint": "fedcba9876"},
        "recipe": {"sampler": "ddim:steps=50,eta=0.0", "guidance": 1.0},
        "values": {name: {"value": value, "low": value - 0.5, "high": value + 0.5}},
    }  # fmt: skip


def write(run: Path, evaluations: list[dict[str, Any]], losses: Sequence[float] = ()) -> None:
    run.mkdir(parents=True)
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    lines = [{"step": 10 * k, "images": 80 * k, "loss": loss} for k, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_stand_side_by_side(place, capsys):
    write(place / "one", [line(10, 9.0), line(20, 4.25)], [0.5, 0.25])
    write(place / "two", [line(10, 8.0)], [0.75, 0.125])
    assert main(["metrics", "one", "two", "--out", "pictures"]) == 0
    out = capsys.readouterr().out
    assert out.count("100 images against digits (fedcba98) by tiny-cnn (abcdef01)") == 1
    assert "one  20    ddim:steps=50  4.25 [3.75, 4.75]" in out and "two  10    ddim:steps=50  8 [7.5, 8.5]" in out
    assert sorted(path.name for path in (place / "pictures").iterdir()) == ["fd_tiny-cnn.png", "loss.png"]
    assert read_image(place / "pictures/loss.png").shape[0] == 3


def test_other_protocols_stand_apart(place, capsys):
    write(place / "one", [line(10, 9.0), line(10, 7.0, count=1000)])
    assert main(["metrics", "one"]) == 0
    out = capsys.readouterr().out
    assert "\n1,000 images against" in out and out.startswith("100 images against")
    assert "published" not in out and "Ho et al." not in out


def test_published_figures_stand_by_their_protocol(place, capsys):
    ho = "1000 evaluations (Ho et al. 2020, table 1)"  # of pixels that were not rounded
    for pixels, there in (("uint8", False), ("none", True)):
        write(place / pixels, [line(10, 5.0, "inception-tf", 50_000, "cifar10", pixels)])
        assert main(["metrics", pixels]) == 0
        out = capsys.readouterr().out
        assert ("3.17" in out and ho in out) is there
        assert ("13.36" in out) is not there, "DDIM's figures are of 8-bit files"


@pytest.mark.parametrize("make", [lambda place: None, lambda place: (place / "one").mkdir()])
def test_nothing_measured_is_one_sentence(place, capsys, make):
    make(place)
    assert main(["metrics", "one"]) == 3
    assert "one: holds no metrics.jsonl or evaluations.jsonl" in capsys.readouterr().err
