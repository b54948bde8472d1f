"""A trained model from a folder: the newest whole checkpoint, the average asked for, an error that helps otherwise."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import ddpm
from ddpm import checkpoint, cli, runs
from ddpm.errors import CheckpointError, ConfigError
from ddpm.runs import find_checkpoint
from ddpm.runs.loading import trusting


def test_the_model_is_that_of_the_newest_checkpoint(trained, tiny):
    model = ddpm.load(trained)
    assert (model.step, model.weights, model.source) == (6, "ema-0.9", trained / "checkpoints/step-00000006")
    assert model.classes == tuple("0123456789")
    assert model.config == tiny({"train.ema": ("0.9", "warmup:decay=0.5")})
    assert not model.diffusion.training
    assert not any(p.requires_grad for p in model.diffusion.parameters())


@pytest.mark.parametrize(("ema", "file"), [(None, "ema-0.9"), ("0.5", "ema-0.5"), ("none", "model")])
def test_the_weights_are_those_of_the_file(trained, ema, file):
    model = ddpm.load(trained, ema=ema)
    saved = load_file(trained / f"checkpoints/step-00000006/{file}.safetensors")
    found = model.diffusion.state_dict()
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_a_run_without_averages_gives_its_weights(tiny, tmp_path):
    runs.train(tiny({"train.ema": (), "train.steps": 1}), tmp_path / "run")
    assert ddpm.load(tmp_path / "run").weights == "model"
    with pytest.raises(ConfigError, match=r"--ema 0\.9: .* choose from none\.$"):
        ddpm.load(tmp_path / "run", ema="0.9")


def test_run_folder_checkpoints_folder_and_checkpoint(trained):
    places = {trained: 6, trained / "checkpoints": 6, trained / "checkpoints/step-00000003": 3}
    assert {place: find_checkpoint(place, pytest.fail).step for place in places} == places


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("", "holds no checkpoint"),
        ("x" * 300, "cannot be read"),
        ("a\0b", "does not exist"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):
        ddpm.load(tmp_path / name)


def test_a_damaged_checkpoint_is_told_of_once(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000006/state.json").write_text("{}")
    assert ddpm.load(tmp_path / "run").step == 3
    assert "state.json: is damaged" in capsys.readouterr().err
    told: list[str] = []
    assert runs.load(tmp_path / "run", warn=told.append).step == 3
    assert len(told) == 1
    with pytest.raises(CheckpointError, match=r"state\.json: is damaged"):
        ddpm.load(tmp_path / "run/checkpoints/step-00000006")
    (tmp_path / "run/checkpoints/step-00000003/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        ddpm.load(tmp_path / "run")


NETWORK = """
from pathlib import Path
from ddpm.models import UNet

Path("imported").touch()


class Their(UNet):
    pass
"""


@pytest.fixture
def naming_code(tiny, tmp_path, monkeypatch):
    """A run whose network is a class of the working folder; its module leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traced_network.py").write_text(NETWORK)
    runs.train(tiny({"model.network": "traced_network:Their", "train.steps": 1}), tmp_path / "run")
    forget(tmp_path)
    yield tmp_path
    sys.modules.pop("traced_network", None)


def forget(folder):
    sys.modules.pop("traced_network", None)
    (folder / "imported").unlink(missing_ok=True)


def test_code_from_outside_is_imported_only_when_trusted(naming_code):
    imported = naming_code / "imported"
    with pytest.raises(
        ConfigError, match=r"traced_network:Their, .* pass --trust-code \(from Python trust_code=True\)\.$"
    ):
        ddpm.load(naming_code / "run")
    assert not imported.exists()
    assert type(ddpm.load(naming_code / "run", trust_code=True).diffusion.network).__name__ == "Their"
    assert imported.exists()
    with trusting():
        assert ddpm.load(naming_code / "run").step == 1
    with pytest.raises(ConfigError, match="--trust-code"):
        ddpm.load(naming_code / "run")


def test_info_imports_nothing_unless_trusted(naming_code, capsys):
    runs.info(naming_code / "run")
    untrusted = capsys.readouterr().out
    assert not (naming_code / "imported").exists()
    runs.info(naming_code / "run", trust_code=True)
    assert capsys.readouterr().out == untrusted
    assert (naming_code / "imported").exists()


def test_the_command_takes_the_flag(naming_code, capsys):
    words = ["sample", "run", "--num-images", "1", "--no-gif", "--sampler", "ddim:steps=1", "--device", "cpu"]
    assert cli.main(words) == 2
    assert "--trust-code" in capsys.readouterr().err
    assert cli.main([*words, "--trust-code"]) == 0
    assert cli.main(["info", "run", "--trust-code"]) == 0


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("diffusion.schedule", "parts:Root:timesteps=9"),
        ("diffusion.objective", "parts:Aim"),
        ("diffusion.thresholding", "parts:Clip"),
        ("diffusion.variance", "parts:Wide"),
        ("diffusion.criterion", "parts:Both"),
        ("diffusion.weighting", "parts:Heavy:k=2"),
        ("diffusion.times", "parts:Late"),
        ("sample.sampler", "ddim:steps=5,thresholding=parts:Clip(low=1)"),
        ("sample.guidance", "classifier:model=parts:Net,base=0"),
        ("data.dataset", "parts:Stripes"),
        ("data.augment", "parts:Blur"),
        ("train.ema", ("0.9", "parts:Slow")),
        ("model.network", "parts-1:Net"),
    ],
)
def test_every_field_that_may_name_code_is_looked_at(trained, tiny, monkeypatch, field, spec):
    monkeypatch.setattr(checkpoint.Checkpoint, "config", lambda self: tiny({field: spec}))
    with pytest.raises(ConfigError, match="names code from outside ddpm, parts"):
        ddpm.load(trained)
