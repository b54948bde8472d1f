"""The parts of EDM together: a run that learns, draws and resumes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ddpm
from ddpm import checkpoint, config, presets, runs
from ddpm.config import RunConfig
from ddpm.images import to_float
from ddpm.randomness import Stream
from ddpm.samplers import Sampler
from ddpm.samplers.thresholding import Unbounded

EDM: dict[str, Any] = {
    "data.augment": "edm:probability=0.12",
    "model.network": "song-unet",
    "model.channels": 8,
    "model.dropout": 0.13,
    "diffusion.schedule": "edm",
    "diffusion.objective": "edm:sigma_data=0.75",
    "diffusion.times": "log-normal:mean=-0.5,std=1.2",
    "diffusion.thresholding": "none",
    "train.optimizer": "adam",
    "train.ema": ("half-life:images=1000",),
    "train.batch_size": 16,
    "train.lr": 3e-3,
    "train.grad_clip": 0,
}


@pytest.fixture(scope="module")
def learnt(tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edm") / "run"
    runs.train(tiny({**EDM, "train.steps": 120, "train.log_every": 20, "train.checkpoint_every": 1000}), folder)
    return folder


def test_the_loss_falls(learnt: Path) -> None:
    """From that of a network that says nothing, which is 1 where the data's deviation is sigma_data."""
    losses = [json.loads(line)["loss"] for line in (learnt / "metrics.jsonl").read_text().splitlines()]
    assert 0.5 < losses[0] < 1.5
    assert losses[-1] < 0.85 * losses[0]


def test_samples_are_nearer_to_the_digits_than_noise(learnt: Path, digits: Any) -> None:
    """Mean and deviation over all pixels of 64 samples by the average of the weights, from noise of deviation 80."""
    model = ddpm.load(learnt)
    assert model.weights == "ema-1000-images"
    diffusion, stream = model.diffusion, Stream(0, torch.arange(64))
    labels = torch.arange(64) % 10
    found = Sampler.parse("heun:steps=8,grid=karras").sample(
        diffusion, stream.normal(1, 8, 8), labels, lambda i: stream.normal(1, 8, 8), Unbounded()
    )
    pixels = to_float(torch.tensor(digits.images))
    assert found.isfinite().all()
    assert float(found.mean()) == pytest.approx(float(pixels.mean()), abs=0.2)
    assert float(found.std()) == pytest.approx(float(pixels.std()), rel=0.3)


def test_the_preset_trains_and_draws(tmp_path: Path) -> None:
    """All but its sizes."""
    small = {
        "data.dataset": "shapes:num_images=30,size=16",
        "model.channels": 8,
        "model.channel_mults": (1, 2),
        "model.blocks": 1,
        "train.batch_size": 4,
        "train.steps": 2,
        "train.preview_images": 4,
        "runtime.device": "cpu",
        "runtime.threads": 1,
    }
    settings = config.build(config.merge(presets.preset("cifar10-edm"), config.nest(small)))
    assert runs.train(settings, tmp_path / "run").step == 2
    model = ddpm.load(tmp_path / "run")
    assert model.weights == "ema-500000-images"
    assert ddpm.sample(model, seeds=[5]).shape == (1, 3, 16, 16)


def test_it_resumes_bit_for_bit(zygote: Any, words: Any, lines: Any, tmp_path: Path) -> None:
    changes = {**EDM, "train.steps": 20, "train.log_every": 7, "train.checkpoint_every": 1000, "train.micro_batch": 20}
    given = ("train", "digits", *words(changes))
    straight = zygote.run(*given, "--run-dir=straight", cwd=tmp_path)
    parts = [zygote.run(*given, "--run-dir=parts", cwd=tmp_path, **how) for how in ({"stop_at": 9}, {})]
    assert [command.wait() for command in (straight, *parts)] == [0, 0, 0]
    ends = [checkpoint.listing(tmp_path / run / "checkpoints")[0] for run in ("straight", "parts")]
    for name in ("model", "ema-1000-images", "optimizer"):
        one, two = (load_file(end / f"{name}.safetensors") for end in ends)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert lines(tmp_path / "parts") == lines(tmp_path / "straight")
