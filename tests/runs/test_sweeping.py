"""`ddpm sweep`: the same numbers as `ddpm evaluate`, a setting that `ddpm sample` takes up, nothing drawn twice."""

import csv
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import ddpm
from ddpm import runs, sampling
from ddpm.cli import main
from ddpm.cli.sweep import EXAMPLES, parse_sweep
from ddpm.rundir import read_json
from ddpm.samplers import Sampler

ASKED = {"samplers": ("ddim", "ddpm:steps=3"), "evaluations": (2, 4), "num_images": 80, "rounds": 1, "quiet": True}


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run that may be written to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_cell_is_what_evaluate_and_sample_give(run, monkeypatch):
    found = runs.sweep(run, baseline="ddpm:steps=6", **ASKED)
    assert [(cell.label, cell.steps, cell.evaluations) for cell in found.cells] == [
        ("ddim", 2, 2.0), ("ddim", 4, 4.0), ("ddpm:steps=3", 3, 3.0),
    ]  # fmt: skip
    assert found.baseline is not None and found.baseline.evaluations == 6
    one = found.cells[1]
    judged = runs.evaluate(run, num_images=80, sampler=one.sampler, metrics=["fd"], quiet=True)
    assert judged.values["fd_tiny-cnn"] == one.quality
    images = ddpm.sample(runs.load(run), seeds=range(80), sampler=one.sampler)
    assert hashlib.sha256(np.ascontiguousarray(images)).hexdigest() == one.images_sha256
    rows = list(csv.DictReader((run / "sweep/sweep.csv").read_text().splitlines()))
    assert [float(row["value"]) for row in rows] == [c.quality.value for c in [*found.cells, found.baseline]]
    record = read_json(run / "sweep/sweep.json")
    assert record["metric"] == "fd_tiny-cnn" and record["reference"]["n"] == 1442 and record["num_images"] == 80
    assert (run / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    timed: list[int] = []
    draw = sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda *given: (timed.append(len(given[4])), draw(*given))[1])
    again = runs.sweep(run, baseline="ddpm:steps=6", **ASKED)
    assert [c.quality for c in again.cells] == [c.quality for c in found.cells]
    assert len(timed) == 4 * 3, "a chunk to count, one to warm up and one round for each cell; none to judge"


def test_sample_draws_by_what_was_recommended_and_says_so(run, capsys):
    found = runs.sweep(run, baseline=None, **ASKED)
    held = read_json(run / "sampling.json")
    assert held["sampler"] == found.recommended.sampler and held["metric"] == "fd_tiny-cnn"
    assert main(["sample", str(run), "--num-images", "2", "--no-gif"]) == 0
    said = capsys.readouterr().out
    assert found.recommended.sampler in said and "sampling.json" in said
    written = next(iter((run / "samples").glob("*/recipe.json")))
    assert json.loads(written.read_text())["sampler"] == found.recommended.sampler
    assert main(["sample", str(run), "--num-images", "2", "--no-gif", "--sampler", "ddim:steps=7"]) == 0
    assert "sampling.json" not in capsys.readouterr().out


def test_what_was_recommended_is_drawn_with_the_thresholding_it_was_judged_with(run):
    runs.sweep(run, baseline=None, thresholding="dynamic:percentile=0.9", **{**ASKED, "samplers": ("ddim:steps=2",)})
    judged = read_json(run / "sampling.json")["thresholding"]
    how = {"num_images": 1, "chunk": 1, "gif": False, "quiet": True}
    assert runs.sample(run, **how).recipe["thresholding"] == judged == "dynamic:percentile=0.9,max=none"
    for asked in ({"sampler": "ddim:steps=2"}, {"thresholding": "model"}):
        assert runs.sample(run, **how, **asked).recipe["thresholding"] == "clip"


def test_two_processes_judge_as_one_does(run, zygote, tmp_path):
    words = ["sweep", run, "--samplers=ddim", "--evaluations=2", "--baseline=none", "--num-images=12", "--rounds=1"]
    rows = []
    for count in (1, 2):
        ended = zygote.run(
            *words, "--chunk=4", f"--out={tmp_path / str(count)}", "--device=cpu", cwd=tmp_path, processes=count
        )
        assert ended.code == 0
        (row,) = csv.DictReader((tmp_path / str(count) / "sweep.csv").read_text().splitlines())
        rows.append({name: value for name, value in row.items() if not name.startswith("seconds")})
        assert float(row["seconds"]) > 0
    assert rows[0] == rows[1]


def test_a_second_model_is_counted_and_its_path_recommended_for_every_working_folder(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    spec = "autoguidance:model=run/checkpoints/step-00000003,weight=1"
    found = runs.sweep(run, baseline=None, guidance=spec, **{**ASKED, "samplers": ("ddim:steps=2",)})
    assert [cell.evaluations for cell in found.cells] == [4.0]
    recommended = read_json(run / "sampling.json")["guidance"]
    assert recommended == f"autoguidance:model={run}/checkpoints/step-00000003,weight=1.0,ema=first"
    monkeypatch.chdir("/")
    assert runs.sample(run, num_images=1, chunk=1, gif=False).recipe["guidance"] == recommended


@pytest.mark.parametrize("command", [command for command, _ in EXAMPLES])
def test_the_examples_name_samplers_that_there_are(command):
    options, _ = parse_sweep(shlex.split(command)[2:])
    for spec in options.samplers:
        Sampler.parse(spec)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "sampling.json: cannot be read"),
        ('{"guidance": 1}', "sampling.json: has no 'sampler'"),
        ('{"sampler": "evil:Sampler"}', "sampling.json names code from outside ddpm"),
        ('{"sampler": "ddim", "guidance": "classifier:model=evil:Net"}', "names code from outside ddpm, evil:Net"),
        ('{"sampler": "ddim", "thresholding": "evil:Clip"}', "names code from outside ddpm, evil:Clip"),
    ],
)
def test_a_recommendation_that_cannot_be_used_is_told(run, capsys, content, sentence):
    (run / "sampling.json").write_text(content)
    assert main(["sample", str(run), "--num-images", "1"]) in (2, 4)
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--samplers", "dim"], "did you mean 'ddim'?"),
        (["--samplers", ""], "--samplers is empty"),
        (["--evaluations", "5,x"], "--evaluations='5,x' is wrong"),
        (["--evaluations", "0"], "--evaluations is wrong"),
        (["--samplers", "heun", "--evaluations", "0,-1"], "--evaluations is wrong"),
        (["--baseline", "ddpm:steps=2000"], "timesteps"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_drawn(run, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(sampling, "draw", lambda *given: pytest.fail("an image was drawn"))
    assert main(["sweep", str(run), *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (run / "sampling.json").exists()
