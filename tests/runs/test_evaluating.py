"""`ddpm evaluate` and `ddpm stats`: the protocol on every number, nothing drawn before it is checked, nothing done twice."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm import checkpoint, images, runs, sampling
from ddpm.cli import main
from ddpm.config import DataConfig
from ddpm.data import load_dataset
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.features import FeatureExtractor
from ddpm.evaluation.frechet import frechet_distance, frechet_estimate
from ddpm.evaluation.published import CIFAR10, published
from ddpm.evaluation.statistics import load_npz
from ddpm.files import sha256
from ddpm.images import read_image
from ddpm.rundir import read_json, read_jsonl
from ddpm.runs.scoring import finite_at
from ddpm.runtime import resolve
from ddpm.samplers import Sampler

TINY = "tiny-cnn:data=digits"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run that may be written to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders a and b of 120 real digits each, to be read."""
    root, data = tmp_path_factory.mktemp("folders"), load_dataset(DataConfig(dataset="digits", split="test"))
    for k in range(240):
        path = root / "ab"[k // 120] / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(data.images[k, 0]).save(path)
    return root


@pytest.fixture
def place(folders, tmp_path, monkeypatch) -> Path:
    """A working folder with these."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).symlink_to(folders / name)
    return tmp_path


def values(result: runs.Evaluation) -> dict[str, float]:
    return {name: estimate.value for name, estimate in result.values.items()}


def test_the_record_says_how_it_was_made(run):
    result = runs.evaluate(run, num_images=40, seed=3, guidance=1.5, quiet=True)
    assert read_jsonl(run / "evaluations.jsonl") == [result.record] and result.path == run / "evaluations.jsonl"
    record, newest = result.record, checkpoint.listing(run / "checkpoints")[0]
    assert record["recipe"]["weights_sha256"] == sha256(newest / "ema-0.9.safetensors")
    assert record["recipe"]["sampler"].startswith("ddim:steps=3") and record["recipe"]["guidance"] == 1.5
    assert (record["step"], record["num_images"], record["seed"], record["quantisation"]) == (6, 40, 3, "uint8")
    assert record["extractor"]["extractor"] == "tiny-cnn" and len(record["extractor"]["extractor_sha256"]) == 64
    assert record["reference"] == {
        "name": "digits", "split": "train", "n": 1442,
        "fingerprint": load_dataset(DataConfig(dataset="digits")).fingerprint,
    }  # fmt: skip
    assert record["ddpm"] == ddpm.__version__ and record["seconds"] > 0
    assert {"fd_tiny-cnn", "kid_tiny-cnn", "is_tiny-cnn", "copies", "nearest_held_out"} <= set(record["values"])
    assert all(value["low"] <= value["value"] <= value["high"] for value in record["values"].values())
    assert set(record["classes"]["kid_tiny-cnn"]) == set("0123456789")
    assert read_image(result.picture).ndim == 3


def test_what_is_scored_is_what_is_saved(run, tmp_path):
    """The run, its PNG files, its archive: one number."""
    drawn = runs.sample(run, num_images=30, npz=True, out=tmp_path / "drawn", quiet=True)
    asked = {
        "reference": "digits",
        "metrics": ["fd", "kid", "is", "classes", "pr"],
        "quiet": True,
        "out": tmp_path / "o",
    }
    by_run = runs.evaluate(run, num_images=30, **asked)
    by_folder = runs.evaluate(drawn.out, **asked)
    by_archive = runs.evaluate(drawn.out / "samples.npz", **asked)
    assert values(by_run) == values(by_folder) == values(by_archive)
    assert by_run.record["classes"] == by_folder.record["classes"] == by_archive.record["classes"]


def test_it_goes_on_where_it_was_stopped(run, monkeypatch):
    whole = runs.evaluate(run, num_images=64, out=run / "elsewhere", quiet=True)
    drawn: list[int] = []
    draw = sampling.draw

    def counted(model, predictor, sampler, runtime, seeds, *more):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(int(seeds[0]))
        return draw(model, predictor, sampler, runtime, seeds, *more)

    monkeypatch.setattr(sampling, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        runs.evaluate(run, num_images=64, quiet=True)
    drawn.clear()
    assert not (run / "evaluations.jsonl").exists()
    again = runs.evaluate(run, num_images=64, quiet=True)
    assert drawn == [32, 48]
    drawn.clear()
    assert values(again) == values(whole) == values(runs.evaluate(run, num_images=64, quiet=True))
    assert drawn == []


def test_unrounded_pixels_are_scored_where_they_are_asked_for(run):
    """By hand: the sampler's own output, clamped, in 0..255, through the classifier; rounded it is what is drawn otherwise."""
    asked = {"reference": "digits", "num_images": 40, "metrics": ["fd", "memorisation"], "quiet": True}
    found = runs.evaluate(run, quantise=False, **asked)
    rounded = runs.evaluate(run, **asked)
    assert (found.record["quantisation"], rounded.record["quantisation"]) == ("none", "uint8")
    assert found.values["copies"] == rounded.values["copies"]
    model = runs.load(run)
    sampler, machine = Sampler.parse(model.config.sample.sampler), resolve("auto", "auto")
    parts = sampling.generate(model.diffusion, sampler, machine, seeds=range(40), pixels=True)
    pixels = np.concatenate([part.pixels for part in parts])
    assert np.array_equal(pixels.round().astype(np.uint8), ddpm.sample(model, seeds=range(40)))
    extractor = FeatureExtractor.parse(TINY).open()
    features = extractor.features(torch.from_numpy(pixels))[0].numpy()
    digits = (
        extractor.features(torch.from_numpy(load_dataset(DataConfig(dataset="digits")).images.copy()))[0]
        .double()
        .numpy()
    )
    expected = frechet_estimate(features, digits.mean(0), np.cov(digits, rowvar=False))
    assert found.values["fd_tiny-cnn"].value == pytest.approx(expected.value, rel=1e-9)
    assert found.values["fd_tiny-cnn"].value != rounded.values["fd_tiny-cnn"].value


def test_two_processes_give_the_same_numbers(run, zygote, tmp_path):
    words = ["evaluate", run, "--num-images=50", "--metrics=fd,kid,is", "--device=cpu"]
    for count in (1, 2):
        assert zygote.run(*words, f"--out={tmp_path / str(count)}", cwd=tmp_path, processes=count).code == 0
    one, two = (read_jsonl(tmp_path / str(count) / "evaluations.jsonl")[0] for count in (1, 2))
    assert one["values"] == two["values"]


def test_a_folder_against_itself_is_0(place, capsys):
    assert main(["evaluate", "a", "--reference", "a", "--extractor", TINY]) == 0
    record = read_jsonl(place / "evaluations/evaluations.jsonl")[0]
    for name in ("fd_tiny-cnn", "kid_tiny-cnn", "nearest_train"):
        assert record["values"][name] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert record["values"]["precision_tiny-cnn"]["value"] == record["values"]["recall_tiny-cnn"]["value"] == 1.0
    assert "fd_tiny-cnn         0      [0, 0]" in capsys.readouterr().out


def test_statistics_stand_for_their_images(place):
    made = runs.stats(DataConfig(dataset="folder", path=Path("b")), Path("b.npz"), extractor=TINY, quiet=True)
    held = load_npz("b.npz")
    assert (held.n, held.extractor, held.image_size, held.quantisation) == (120, "tiny-cnn", (8, 8), "uint8")
    assert np.array_equal(held.mu, made.mu) and np.array_equal(held.sigma, made.sigma)
    by_images = runs.evaluate("a", reference="b", extractor=TINY, quiet=True)
    by_statistics = runs.evaluate("a", reference="b.npz", extractor=TINY, quiet=True)
    assert by_images.values["fd_tiny-cnn"] == by_statistics.values["fd_tiny-cnn"]
    ours = runs.stats(DataConfig(dataset="folder", path=Path("a")), Path("a.npz"), extractor=TINY, quiet=True)
    both = runs.evaluate("a.npz", reference="b.npz", quiet=True).values["fd_tiny-cnn"]
    assert both.value == frechet_distance(ours.mu, ours.sigma, held.mu, held.sigma) and both.low is None
    assert both.value == pytest.approx(by_images.values["fd_tiny-cnn"].value, rel=1e-9)


def test_real_images_are_nearer_than_a_barely_trained_model(place, run):
    real = runs.evaluate("a", reference="digits", quiet=True).values
    drawn = runs.evaluate(run, num_images=120, quiet=True).values
    assert real["fd_tiny-cnn"].high < drawn["fd_tiny-cnn"].low
    assert real["nearest_train"].value < drawn["nearest_train"].value


def spoil(place: Path) -> None:
    images.save_png(place / "mixed/a.png", np.zeros((1, 8, 8), np.uint8))
    images.save_png(place / "mixed/b.png", np.zeros((1, 9, 8), np.uint8))
    for k in range(3):
        pixels = np.stack([np.full((8, 8), level, np.uint8) for level in (k, 90, 200)])
        images.save_png(place / f"rgb/{k}.png", pixels)
    np.savez(place / "no-sigma.npz", mu=np.zeros(64))
    np.savez(place / "nan.npz", arr_0=np.full((20, 8, 8, 1), np.nan))
    np.savez(place / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    np.savez(place / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (place / "damaged.npz").write_bytes(b"PK\x03\x04")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["nope"], 3, "nope: is no run, checkpoint, folder of images or .npz file"),
        (["a"], 2, "--reference is missing"),
        (["a", "--reference", "mixed"], 3, "several sizes (a.png is 8x8, b.png 9x8)"),
        (["a", "--reference", "rgb", "--extractor", TINY], 3, "images of 1 channels, found 3"),
        (["run", "--reference", "rgb"], 3, "channels"),
        (["a", "--reference", "no-sigma.npz", "--extractor", TINY], 3, "has no sigma"),
        (["a", "--reference", "pickled.npz", "--extractor", TINY], 3, "pickled.npz"),
        (["a", "--reference", "damaged.npz", "--extractor", TINY], 3, "damaged.npz"),
        (["a", "--reference", "wide.npz", "--extractor", TINY], 3, "statistics of 64 and 2048 features"),
        (["nan.npz", "--reference", "digits"], 3, "float64"),
        (["a", "--reference", "digits", "--num-images", "500"], 3, "holds 120 images"),
        (["run", "--num-images", "1"], 3, "the metric fd needs at least 2 images, and there are 1"),
        (["run", "--num-images", "5", "--metrics", "pr"], 3, "the metric pr needs at least 6 images"),
        (["run", "--num-images", "5", "--metrics", "is"], 3, "the metric is needs at least 10 images"),
        (["run", "--metrics", "fdd"], 2, "did you mean 'fd'?"),
        (["run", "--metrics", "fd,,is"], 2, "--metrics='fd,,is' is wrong"),
        (["run", "--extractor", "tiny-cn"], 2, "did you mean 'tiny-cnn'?"),
        (["run", "--weights", "none.safetensors"], 3, "none.safetensors"),
        (["a", "--reference", "digits", "--no-quantise"], 2, "--no-quantise: a draws nothing"),
        (["run", "--sampler", "dim"], 2, "did you mean 'ddim'?"),
        (["run", "--out", "a/1.png/x"], 3, "a/1.png"),
        (["a", "--reference", "digits", "--metrics", "classes"], 3, "the metric classes needs images with classes"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_drawn(place, run, monkeypatch, capsys, words, code, sentence):
    spoil(place)
    monkeypatch.setattr(sampling, "draw", lambda *given: pytest.fail("an image was drawn"))
    assert main(["evaluate", *words]) == code
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (place / "run/evaluations.jsonl").exists()


def test_images_that_are_not_finite_are_refused():
    check = finite_at(4)
    check(3, torch.tensor([torch.nan]), torch.zeros(1))
    check(4, torch.zeros(1), torch.zeros(1))
    with pytest.raises(DataError, match="NaN"):
        check(4, torch.tensor([0.0, torch.nan]), torch.zeros(1))


def test_published_figures_need_the_very_protocol():
    record = {
        "extractor": {"extractor": "inception-tf"}, "num_images": 50_000, "quantisation": "uint8",
        "reference": {"name": "cifar10", "n": 50_000},
    }  # fmt: skip
    rounded, unrounded = published(record), published({**record, "quantisation": "none"})
    assert {figure.who for figure in unrounded} == {"DDPM", "pytorch-ddpm"}
    assert set(rounded) | set(unrounded) == set(CIFAR10) and not set(rounded) & set(unrounded)
    for change in ({"num_images": 10_000}, {"extractor": {"extractor": "tiny-cnn"}}, {"reference": {"name": "digits"}}):
        assert published({**record, **change}) == ()


SCORED = {"evaluate.every": 2, "evaluate.num_images": 24, "train.steps": 8, "train.checkpoint_every": 3}


def test_training_is_the_same_with_scoring(tiny, tmp_path):
    plain = {**SCORED, "evaluate.every": 0}
    runs.train(tiny(plain), tmp_path / "plain")
    runs.train(tiny(SCORED), tmp_path / "scored")
    for name in ("model", "ema-0.9", "optimizer", "state"):
        files = [tmp_path / run / f"checkpoints/step-00000008/{name}.safetensors" for run in ("plain", "scored")]
        assert sha256(files[0]) == sha256(files[1])


def test_the_best_checkpoint_is_kept(tiny, tmp_path):
    run = tmp_path / "run"
    runs.train(tiny({**SCORED, "train.keep_last": 1}), run)
    lines = read_jsonl(run / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    best = read_json(run / "best.json")
    lowest = min(lines, key=lambda line: line["values"]["fd_tiny-cnn"]["value"])
    assert best == {"step": lowest["step"], "metric": "fd_tiny-cnn", "value": lowest["values"]["fd_tiny-cnn"]["value"]}
    weights = checkpoint.step_folder(run / "checkpoints", best["step"]) / "ema-0.9.safetensors"
    assert lowest["recipe"]["weights_sha256"] == sha256(weights)
    assert not list((run / "evaluations").iterdir())


def test_a_resumed_run_scores_no_step_twice(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.train(tiny(SCORED), whole)
    runs.train(tiny({**SCORED, "train.steps": 5}), parts)
    torn = {**read_jsonl(parts / "evaluations.jsonl")[0], "step": 6}
    with (parts / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(torn) + "\n" + json.dumps({**torn, "by": "ddpm evaluate"}) + "\n")
    runs.train(tiny(SCORED), parts)
    of_training = [line for line in read_jsonl(parts / "evaluations.jsonl") if line["by"] == "ddpm train"]
    assert [line["step"] for line in of_training] == [2, 4, 5, 6, 8]
    by_step = {line["step"]: line["values"] for line in of_training}
    assert {line["step"]: line["values"] for line in read_jsonl(whole / "evaluations.jsonl")} == {
        step: by_step[step] for step in (2, 4, 6, 8)
    }


def test_scoring_that_cannot_be_is_told_before_a_step(tiny, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'tiny-cnn'"):
        runs.train(tiny({**SCORED, "evaluate.extractor": "tiny-cn"}), tmp_path / "run")
    with pytest.raises(DataError, match="the metric is needs at least 10 images"):
        runs.train(tiny({**SCORED, "evaluate.num_images": 5, "evaluate.metric": "is"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
