"""`ddpm features`: training, resuming, the file that comes of it, the list."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import config, rundir
from ddpm.cli import features as verb
from ddpm.cli import main
from ddpm.config import RunConfig
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation import tiny_cnn
from ddpm.runs import features


def settings(noisy: bool = False, **fields: object) -> RunConfig:
    typed = {"train.steps": 6, "train.batch_size": 16, "train.log_every": 2, "runtime.precision": "float32", **fields}
    return config.build(config.merge(features.recipe("digits", noisy), config.nest(typed)))


def test_training_writes_weights_and_says_how_good_they_are(tmp_path: Path) -> None:
    result = features.train_features(settings(), tmp_path / "run", out=tmp_path / "own" / "w.safetensors")
    assert (result.path, result.step, result.stopped) == (tmp_path / "own" / "w.safetensors", 6, False)
    found = tiny_cnn.load_classifier(result.path)
    assert json.loads(found.facts["test_accuracy"]) == result.test_accuracy
    assert found.facts["dataset"] == "digits"
    assert found.facts["command"] == "ddpm features train digits --steps 6 --seed 0"
    assert json.loads(found.facts["recipe"])["train"]["lr"] == 3e-3
    assert found.classes == tuple("0123456789")
    assert [record["step"] for record in rundir.read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [2, 4, 6]


def test_it_learns(tmp_path: Path) -> None:
    typed = {"train.steps": 60, "train.batch_size": 64, "train.warmup": 10, "train.log_every": 50}
    assert features.train_features(settings(**typed), tmp_path / "run").test_accuracy > 0.8


@pytest.mark.parametrize("noisy", [False, True])
def test_stop_and_resume_give_the_weights_of_one_run(noisy: bool, tmp_path: Path) -> None:
    whole = features.train_features(settings(noisy), tmp_path / "whole")
    half = features.train_features(settings(noisy), tmp_path / "halves", stop_after_s=1e-9)
    assert (half.path, half.step, half.stopped) == (None, 1, False)
    again = features.train_features(settings(noisy), tmp_path / "halves")
    first, second = (tiny_cnn.load_classifier(result.path).network.state_dict() for result in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.test_accuracy == again.test_accuracy


def test_a_finished_run_writes_its_weights_again(tmp_path: Path) -> None:
    first = features.train_features(settings(), tmp_path / "run")
    before = tiny_cnn.load_classifier(first.path).network.state_dict()
    first.path.unlink()
    second = features.train_features(settings(), tmp_path / "run")
    after = tiny_cnn.load_classifier(second.path).network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_noisy_classifier_tells_its_accuracy_by_level(tmp_path: Path) -> None:
    result = features.train_features(settings(noisy=True), tmp_path / "run")
    found = tiny_cnn.load_classifier(result.path)
    assert result.path.name == "tiny-cnn-noisy-digits.safetensors"
    assert found.network.noisy
    assert found.facts["schedule"].startswith("cosine:timesteps=1000")
    assert list(json.loads(found.facts["noisy_accuracy"])) == ["0", "249.75", "499.5", "749.25"]
    assert found.facts["command"].startswith("ddpm features train digits --noisy")


def test_another_recipe_is_not_mixed_in(tmp_path: Path) -> None:
    features.train_features(settings(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run with train\.lr=0\.003, not 0\.1; choose another --run-dir"):
        features.train_features(settings(**{"train.lr": 0.1}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.network=tiny-cnn, not tiny-cnn-noisy"):
        features.train_features(settings(noisy=True), tmp_path / "run")


def test_a_folder_without_a_test_part_holds_some_out(tmp_path: Path) -> None:
    for kind, level in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for k in range(10):
            noise = np.random.default_rng(k).integers(0, 30, (8, 8, 3))
            Image.fromarray((noise + level).astype(np.uint8)).save(tmp_path / "photos" / kind / f"{k}.png")
    own = config.merge(
        features.recipe("folder"),
        config.nest({"data.path": tmp_path / "photos", "data.split": "all", "train.steps": 20, "train.batch_size": 8}),
    )
    result = features.train_features(config.build(own), tmp_path / "run")
    found = tiny_cnn.load_classifier(result.path)
    assert (found.shape, found.classes) == ((3, 8, 8), ("dark", "light"))
    assert json.loads(found.facts["test_images"]) == 4


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    own = config.nest({"data.path": tmp_path / "photos", "data.split": "all"})
    with pytest.raises(DataError, match="has no labels; a classifier needs some"):
        features.train_features(config.build(config.merge(features.recipe("folder"), own)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.network=unet is no feature classifier"):
        features.train_features(settings(**{"model.network": "unet"}), tmp_path / "run")


def test_the_verb_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = "features train digits --steps 4 --batch-size 16 --seed 3"
    assert main(words.split()) == 0
    assert Path("runs/features-digits/tiny-cnn-digits.safetensors").is_file()
    assert "right on held-out images" in capsys.readouterr().out
    words = "features train digits --noisy --steps 4 --batch-size 16 --schedule linear --out own.safetensors"
    assert main(words.split()) == 0
    assert tiny_cnn.load_classifier(Path("own.safetensors")).facts["schedule"].startswith("linear")
    assert Path("runs/features-digits-noisy/config.yaml").is_file()


def test_the_verb_lists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["features", "list"]) == 0
    out = capsys.readouterr().out
    for name in ("clip", "dinov2", "exported", "inception-tf", "tiny-cnn", "torchscript"):
        assert f"\n{name} " in out
    assert "tiny-cnn:data=digits" in out
    assert "tiny-cnn:data=fashion-mnist" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("features", "train|list is missing"),
        ("features trian digits", "'trian' is not train or list (did you mean 'train'?)"),
        ("features train", "give a data set"),
        ("features train digitz", "'digitz'"),
        ("features train digits --steps 0", "--steps"),
    ],
)
def test_mistakes_are_one_sentence(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [command for command, _ in verb.EXAMPLES])
def test_the_examples_are_understood(command: str) -> None:
    assert verb._parsed(command.split()[2:]).action in verb.ACTIONS
