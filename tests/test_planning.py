"""The plan of a run, against numbers counted elsewhere."""

import pytest
import torch

from ddpm import config, planning, presets, runtime
from ddpm.config import RunConfig
from ddpm.console import Console, human_bytes
from ddpm.data import load_dataset
from ddpm.distributed import World
from ddpm.models import GaussianDiffusion, build_diffusion


def model_of(settings: RunConfig, shape: tuple[int, int, int], classes: int) -> GaussianDiffusion:
    return build_diffusion(settings.model, settings.diffusion, shape, classes)


@pytest.fixture(scope="module")
def small() -> RunConfig:
    """The digits' preset, narrower."""
    changes = {"model": {"channels": 8}, "train": {"batch_size": 12, "ema": ("0.9", "0.99")}}
    return config.build(config.merge(presets.preset("digits"), changes))


def test_the_network_of_ho_et_al_is_counted_as_published():
    """35.7 M parameters (Ho et al. 2020, appendix B); 6.2 G multiply-adds an image."""
    model = model_of(config.build(presets.preset("cifar10")), (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    forward, backward, kept = planning.count(model)
    assert forward == pytest.approx(12.44e9, rel=0.02)
    assert forward + backward == pytest.approx(37.3e9, rel=0.02)
    assert 10e6 < kept < 400e6
    assert all(p.grad is None for p in model.parameters())


def test_arithmetic_of_a_layer_by_hand():
    """A 3x3 convolution from 4 to 6 channels on 8x8 pixels: 2 * 64 * 9 * 24 forward, twice that backward."""

    class One(torch.nn.Module):
        shape, num_classes = (4, 8, 8), 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(4, 6, 3, padding=1)

        def forward(self, x, labels, stream):
            return self.layer(x).square().mean((1, 2, 3))

    forward, backward, kept = planning.count(One())
    assert forward == 2 * 64 * 9 * 24
    assert backward == forward  # the input needs no gradient
    assert kept == 4 * 64 * (4 + 6)


def test_a_plan(small):
    data, machine = load_dataset(small.data), runtime.resolve("cpu", "float32", threads=1)
    model = model_of(small, data.shape, data.num_classes)
    found = planning.plan(small, model, data, machine, World())
    parameters = sum(p.numel() for p in model.parameters())
    assert found.parameters == parameters
    assert found.weights_bytes == 4 * parameters * (1 + 1 + 2 + 2)
    assert (found.micro_batch, found.processes, found.images) == (12, 1, 1442)
    assert found.epochs == pytest.approx(1500 * 12 / 1442)
    forward, backward, kept = planning.count(model)
    assert (found.forward_flops, found.training_flops) == (forward, forward + backward)
    assert found.activations_bytes == 12 * kept
    assert found.step_s > 0


@pytest.mark.parametrize(("room", "timed"), [(100, 12), (4 * 3 + 1, 3), (3.9, None)])
def test_a_quarter_of_the_free_memory_is_used_at_most(small, monkeypatch, room, timed):
    data, machine = load_dataset(small.data), runtime.resolve("cpu", "float32", threads=1)
    model = model_of(small, data.shape, data.num_classes)
    kept, seen = planning.count(model)[2], []
    monkeypatch.setattr(planning, "_free_bytes", lambda machine: int(room * kept))
    monkeypatch.setattr(planning, "_time_image", lambda model, machine, n: seen.append(n) or 2.0)
    found = planning.plan(small, model, data, machine, World())
    assert seen == ([timed] if timed else [])
    assert found.step_s == (24.0 if timed else None)
    if not timed:
        assert planning._time(found, 5) == f"not timed: one image needs {human_bytes(kept)}"


def test_the_plan_of_one_of_several_processes(small):
    data, machine = load_dataset(small.data), runtime.resolve("cpu", "float32", threads=1)
    model = model_of(small, data.shape, data.num_classes)
    found = planning.plan(small, model, data, machine, World(1, 4))
    assert (found.micro_batch, found.processes) == (3, 4)
    split = small.model_copy(update={"train": small.train.model_copy(update={"micro_batch": 2})})
    assert planning.plan(split, model, data, machine, World()).micro_batch == 2


def test_what_is_shown_is_the_config_and_the_plan(small, capsys):
    plan = planning.Plan(
        parameters=1234567, forward_flops=int(12.44e9), training_flops=int(37.3e9), weights_bytes=5 << 20,
        activations_bytes=3 << 30, micro_batch=16, processes=2, images=50000, epochs=2048.0, step_s=0.5,
    )  # fmt: skip
    planning.show(plan, small, "runs/x", Console())
    out = capsys.readouterr().out
    assert out.startswith(config.to_yaml(small).rstrip())
    for words in (
        "runs/x", "50,000, 2,048.0 epochs in 1,500 steps of 12", "1,234,567", "12.4 GFLOP an image forward",
        "37.3 GFLOP in training", "5.0 MiB", "3.0 GiB", "2 process(es), 16 images at a time", "0.5s a step, 12m 30s in all",
    ):  # fmt: skip
        assert words in out
