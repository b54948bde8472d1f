"""`ddpm demo` in eight steps: everything it promises to write, if not good digits."""

import json

import numpy as np
import pytest

from ddpm import cli, runs
from ddpm.checkpoint import latest
from ddpm.images import read_image
from ddpm.runs import demonstration


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The report of a demo of eight steps, and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return runs.demo(folder, steps=8, seed=3), folder


def test_demo_json_has_every_documented_key(shown):
    report, folder = shown
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(report))
    assert set(report) == {
        "judged_as_asked", "real_held_out", "copies", "copy_distance", "diversity", "num_samples", "train_seconds",
        "sample_seconds", "steps", "seed", "sampler", "recipe", "thresholds", "grid", "trajectory", "real",
    }  # fmt: skip
    assert (report["steps"], report["seed"], report["num_samples"]) == (8, 3, 100)
    assert report["real_held_out"] > 0.95
    assert 0 <= report["judged_as_asked"] <= 1 and 0 <= report["copies"] <= 100
    assert report["thresholds"].keys() == {"judged_as_asked", "copies", "diversity", "copy_distance"}
    assert latest(folder / "checkpoints", pytest.fail).config().seed == 3


def test_the_pictures_are_there(shown):
    report, _ = shown
    for name in ("grid", "real"):
        assert read_image(demonstration.Path(report[name])).shape == (1, 342, 342)
    assert demonstration.Path(report["trajectory"]).read_bytes().startswith(b"GIF89a")


def test_again_it_judges_the_same_images(shown, monkeypatch, capsys):
    report, folder = shown
    monkeypatch.setattr(demonstration, "train", lambda settings, run_dir: runs.TrainResult(run_dir, 8, stopped=False))
    again = runs.demo(folder, steps=8, seed=3)
    clock = ("train_seconds", "sample_seconds")
    assert {k: v for k, v in again.items() if k not in clock} == {k: v for k, v in report.items() if k not in clock}
    out = capsys.readouterr().out
    for line in ("judged as the digit asked for", "copies of training digits", "diversity within a digit"):
        assert line in out


def test_a_stopped_demo_is_exit_75(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demonstration, "train", lambda settings, run_dir: runs.TrainResult(run_dir, 3, stopped=True))
    assert cli.main(["demo", "--run-dir", str(tmp_path / "run")]) == 75
    assert capsys.readouterr().err == "warning: stopped and saved: `ddpm demo` again goes on.\n"


def test_the_judge_sees_the_held_out_digits_that_were_not_trained_on(digits):
    from ddpm.config import DataConfig
    from ddpm.data import load_dataset

    parts = [load_dataset(DataConfig(dataset="digits", split=part)).images for part in ("train", "test")]
    assert sum(map(len, parts)) == len(digits)
    together = np.concatenate(parts).reshape(len(digits), -1)
    order = np.lexsort(together.T)
    expected = digits.images.reshape(len(digits), -1)
    np.testing.assert_array_equal(together[order], expected[np.lexsort(expected.T)])
    assert not {image.tobytes() for image in parts[0]} & {image.tobytes() for image in parts[1]}
