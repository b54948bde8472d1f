"""A trained model from a folder: the newest whole checkpoint, the average asked for, an error that helps otherwise."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import ddpm
from ddpm import runs
from ddpm.errors import CheckpointError, ConfigError
from ddpm.runs import find_checkpoint


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
