"""Guidance by second models, from files and modules: what is drawn, what recipes hold, what is refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddpm
from ddpm import runs
from ddpm.cli import main
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.tiny_cnn import TinyCNN, load_classifier, save_classifier
from ddpm.files import sha256
from ddpm.guidance import CFG, Autoguidance, ClassifierGuidance
from ddpm.runs.guiding import absolute

DIGITS = tuple("0123456789")
OWN = '''
import torch


class Dark:
    """Likes dark images, all the more for higher labels: p(y | x) falls with y times the mean."""

    num_classes = 3

    def noisy_logits(self, x_t, level):
        return -torch.arange(3.0) * x_t.mean(dim=(1, 2, 3))[:, None] * 200


class Broken:
    num_classes = 3

    def __init__(self):
        raise OSError("no weights here")


class Net(torch.nn.Module):
    num_classes = 10

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(64, 10)

    def noisy_logits(self, x_t, level):
        return self.layer(x_t.flatten(1))
'''


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `ddpm features train digits --noisy`, by the front door."""
    folder = tmp_path_factory.mktemp("classifier")
    words = ["features", "train", "digits", "--noisy", "--steps=3", "--batch-size=16", "--precision=float32"]
    assert main([*words, f"--run-dir={folder / 'run'}", f"--out={folder / 'c.safetensors'}"]) == 0
    return folder / "c.safetensors"


@pytest.fixture(scope="module")
def bare(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without classes."""
    folder = tmp_path_factory.mktemp("bare") / "run"
    runs.train(tiny({"model.conditioning": "none", "train.steps": 1}), folder)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with classifiers in the working folder."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


def noisy(path: Path, shape: tuple[int, int, int], classes: tuple[str, ...], *, clean: bool = False) -> Path:
    save_classifier(path, TinyCNN(shape[0], len(classes), noisy=not clean), shape, classes, {})
    return path


def test_a_classifier_draws_classes_from_a_model_that_knows_none(bare, classifier, tmp_path):
    words = ["sample", str(bare), "--num-images=4", "--labels=3,7", "--chunk=4", "--npz", "--device=cpu"]
    guidance = f"classifier:model={classifier},weight=40"
    assert main([*words, "--guidance", guidance, f"--out={tmp_path / 'out'}"]) == 0
    with np.load(tmp_path / "out/samples.npz") as archive:
        assert archive["arr_1"].tolist() == [3, 7, 3, 7]
        drawn = archive["arr_0"]
    assert (tmp_path / "out/images.csv").read_text().splitlines()[1] == "000000.png,0,3,3"
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    assert recipe["guidance"].startswith(f"classifier:model={classifier},weight=40.0,base=cfg(weight=1.0,")
    assert recipe["guidance_sha256"] == {str(classifier): sha256(classifier)}
    model = ddpm.load(bare)
    again = ddpm.sample(model, range(4), labels=[3, 7], guidance=guidance, chunk=4)
    np.testing.assert_array_equal(again.transpose(0, 2, 3, 1), drawn)
    plain = ddpm.sample(model, range(4), chunk=4)
    assert (again != plain).any()
    likes = load_classifier(classifier)
    level = model.diffusion.schedule.at(torch.tensor(0.0))
    shares = [
        likes.noisy_logits(torch.tensor(x) / 127.5 - 1, level).softmax(1)[range(4), [3, 7, 3, 7]]
        for x in (again, plain)
    ]
    assert shares[0].mean() > shares[1].mean()


def test_a_classifier_of_another_schedule_is_asked_by_log_snr(classifier):
    """Trained on `cosine`; beyond the levels that it saw the nearest one counts."""
    found = load_classifier(classifier)
    low, high = json.loads(found.facts["log_snr"])
    cosine = ddpm.Schedule.parse("cosine")
    assert [low, high] == [float(cosine.at(torch.tensor(t)).log_snr) for t in (999.0, 0.0)]
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    edm = ddpm.Schedule.parse("edm")
    cleaner = edm.at(edm.t_of(torch.tensor(high + 2.0)))
    here = edm.at(edm.t_of(torch.tensor(1.0)))
    same = cosine.at(cosine.t_of(here.log_snr))
    torch.testing.assert_close(
        found.noisy_logits(x * here.alpha.float(), here), found.noisy_logits(x * same.alpha.float(), same)
    )
    torch.testing.assert_close(
        found.noisy_logits(x, cleaner),
        found.network(x / (1 + cleaner.sigma**2).sqrt().float(), torch.tensor([high]))[1],
    )


def test_an_earlier_checkpoint_guides(trained, tmp_path):
    weak = trained / "checkpoints/step-00000003"
    spec = f"autoguidance:model={weak},weight=1,ema=0.5"
    out = runs.sample(trained, num_images=3, guidance=spec, chunk=4, out=tmp_path / "out", gif=False)
    assert out.recipe["guidance"] == f"autoguidance:model={weak},weight=1.0,ema=0.5"
    assert out.recipe["guidance_sha256"] == {str(weak): sha256(weak / "ema-0.5.safetensors")}
    model = ddpm.load(trained)

    def draw(guidance: Any) -> np.ndarray:
        return ddpm.sample(model, range(3), guidance=guidance, chunk=4)

    np.testing.assert_array_equal(draw(spec), draw(1))
    np.testing.assert_array_equal(draw(Autoguidance(model=str(weak), weight=0.0)), ddpm.sample(
        weak, range(3), guidance=1, chunk=4))  # fmt: skip
    assert (draw(f"autoguidance:model={weak},weight=9") != draw(1)).any()


def test_python_takes_a_number_a_spec_or_a_component(trained):
    found = [
        ddpm.sample(trained, range(2), guidance=each, chunk=2) for each in (3, "3", "cfg:weight=3", CFG(weight=3.0))
    ]
    assert all(np.array_equal(found[0], each) for each in found[1:])
    assert not np.array_equal(found[0], ddpm.sample(trained, range(2), guidance=1, chunk=2))


def test_a_class_of_ones_own_guides(bare, own):
    brightness = [
        ddpm.sample(bare, range(4), labels=[k], guidance=f"classifier:model={own}:Dark", chunk=4).mean()
        for k in (0, 1, 2)
    ]
    assert brightness[0] > brightness[1] > brightness[2]
    model = ddpm.load(bare)
    recipe = runs.sample(bare, num_images=1, guidance=f"classifier:model={own}:Dark", chunk=1, gif=False).recipe
    assert recipe["guidance_sha256"] == {f"{own}:Dark": None}
    assert model.diffusion.num_classes == 0


def test_a_module_of_ones_own_is_told_by_its_weights(trained, own):
    recipe = runs.sample(trained, num_images=1, guidance=f"classifier:model={own}:Net", chunk=1, gif=False).recipe
    assert len(recipe["guidance_sha256"][f"{own}:Net"]) == 64


def test_a_run_that_names_outside_code_for_guidance_is_not_trusted(tiny, tmp_path, own):
    settings = tiny({"train.steps": 1, "sample.guidance": f"classifier:model={own}:Net", "train.preview_every": 1})
    runs.train(settings, tmp_path / "run")
    assert (tmp_path / "run/samples/step-00000001.png").exists()
    with pytest.raises(ConfigError, match=f"names code from outside ddpm, {own}:Net"):
        runs.sample(tmp_path / "run", num_images=1)
    model = ddpm.load(tmp_path / "run", trust_code=True)
    assert ddpm.sample(model, [0], chunk=1).shape == (1, 1, 8, 8)


def test_previews_and_scores_of_training_are_guided_by_a_second_model(tiny, trained, tmp_path, monkeypatch):
    """The path is kept whole; a plain spec becomes its number again."""
    monkeypatch.chdir(trained.parent)
    changes = {"train.steps": 1, "train.preview_every": 1, "train.preview_images": 2}
    changes |= {"evaluate.every": 1, "evaluate.num_images": 12}
    spec = f"autoguidance:model={trained.name}/checkpoints/step-00000003"
    runs.train(tiny({**changes, "sample.guidance": spec}), tmp_path / "run")
    weak = trained / "checkpoints/step-00000003"
    assert ddpm.load(tmp_path / "run").config.sample.guidance == f"autoguidance:model={weak},weight=2.0,ema=first"
    line = json.loads((tmp_path / "run/evaluations.jsonl").read_text())
    assert line["recipe"]["guidance_sha256"] == {str(weak): sha256(weak / "ema-0.9.safetensors")}
    runs.train(tiny({"train.steps": 1, "sample.guidance": "cfg:weight=2"}), tmp_path / "plain")
    assert ddpm.load(tmp_path / "plain").config.sample.guidance == 2.0


def test_absolute_paths_in_every_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ClassifierGuidance(model="parts:Net", base=Autoguidance(model="runs/a"))
    assert absolute(given) == ClassifierGuidance(model="parts:Net", base=Autoguidance(model=str(tmp_path / "runs/a")))


def test_drawn_classes_are_judged_class_by_class(bare, classifier, tmp_path):
    guidance = f"classifier:model={classifier}"
    found = runs.evaluate(
        bare, num_images=30, guidance=guidance, metrics=["kid", "classes"], out=tmp_path / "out", chunk=10, quiet=True
    )
    assert set(found.record["classes"]["kid_tiny-cnn"]) == set(DIGITS)
    assert found.record["recipe"]["guidance_sha256"] == {str(classifier): sha256(classifier)}
    with pytest.raises(DataError, match="needs images with classes"):
        runs.evaluate(bare, num_images=20, metrics=["classes"], out=tmp_path / "out", quiet=True)


def test_second_models_that_do_not_fit_are_refused_in_a_sentence(trained, bare, own, tmp_path):
    noisy(tmp_path / "big.safetensors", (1, 9, 9), DIGITS)
    noisy(tmp_path / "letters.safetensors", (1, 8, 8), tuple("abcdefghij"))
    noisy(tmp_path / "clean.safetensors", (1, 8, 8), DIGITS, clean=True)
    (tmp_path / "text.safetensors").write_text("nothing")
    cases: list[tuple[Any, str, type[Exception], str]] = [
        (trained, "classifier:model=none.safetensors", DataError, "none.safetensors is no file; make one with `ddpm features"),
        (trained, "classifier:model=text.safetensors", DataError, "text.safetensors: cannot be read as safetensors"),
        (trained, "classifier:model=clean.safetensors", ConfigError, "clean.safetensors knows no noise levels; train one"),
        (trained, "classifier:model=big.safetensors", ConfigError, "has no gradient for an image of 1x8x8 (ConfigError: it was trained on images of 1x9x9)."),
        (trained, "classifier:model=letters.safetensors", ConfigError, "the classes a, b, c, ... (10), the guided model with 0, 1, 2, ... (10); they"),
        (trained, f"classifier:model={own}:Dark", ConfigError, "knows 3 classes, the model 10; choose"),
        (trained, f"classifier:model={own}:Broken", ConfigError, "cannot be made (OSError: no weights here); it needs a class"),
        (trained, f"classifier:model={own}:Missing", ConfigError, f"'{own}:Missing' cannot be imported: AttributeError"),
        (trained, "autoguidance:model=nowhere", ddpm.CheckpointError, "nowhere: does not exist"),
        (trained, f"autoguidance:model={trained},ema=0.7", ConfigError, "--ema 0.7: "),
        (bare, f"autoguidance:model={trained}", ConfigError, "the number of classes of"),
        (bare, "2", ConfigError, "--guidance=2: this model was trained without classes"),
    ]  # fmt: skip
    for source, spec, kind, said in cases:
        with pytest.raises(kind) as caught:
            runs.sample(source, num_images=1, guidance=spec, out=tmp_path / "out")
        assert said in str(caught.value), spec
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
