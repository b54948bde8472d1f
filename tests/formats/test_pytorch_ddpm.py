"""pytorch-ddpm's ckpt.pt: its network's outputs, its sampler's images, its optimizer, and a file it reads again."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import cli, runs
from ddpm.config import DiffusionConfig, ModelConfig, build, nest
from ddpm.errors import CheckpointError, ConfigError
from ddpm.formats import Format, Snapshot, Source, identify
from ddpm.models import UNet
from ddpm.runs.foreign import model_of, read, settings_of
from ddpm.samplers import Sampler, Thresholding
from tests.formats.filled import difference, filled, hostile, state, stored

TABLE = "time_embedding.timembedding.0.weight"


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return stored("pytorch_ddpm")


def network(tensors: dict[str, list[int]], timesteps: int) -> dict[str, Tensor]:
    """A state dict of its network in its own order: the table of sinusoids comes first."""
    channels = tensors["head.weight"][0]
    frequencies = torch.exp(-torch.arange(0, channels, step=2) / channels * math.log(10000))
    angles = torch.arange(timesteps).float()[:, None] * frequencies
    return {TABLE: torch.stack([angles.sin(), angles.cos()], -1).flatten(1), **state(tensors)}


def checkpoint(data: dict[str, Any]) -> dict[str, Any]:
    """What its main.py saves, after step 41."""
    net = network(data["tensors"], data["options"]["T"])
    ema = {name: value if name == TABLE else value * 0.5 for name, value in net.items()}
    moments = {
        k: {
            "step": torch.tensor(42.0),
            "exp_avg": filled(f"avg {name}", value.shape),
            "exp_avg_sq": filled(f"sq {name}", value.shape) ** 2,
        }
        for k, (name, value) in enumerate(net.items())
        if name != TABLE
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "initial_lr": 2e-4}
    optim = {"state": moments, "param_groups": [{**group, "params": list(range(len(net)))}]}
    x_T = torch.zeros(4, *data["shape"][1:])
    return {"net_model": net, "ema_model": ema, "sched": {}, "optim": optim, "step": 41, "x_T": x_T}


@pytest.fixture(scope="module")
def file(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pytorch-ddpm") / "ckpt.pt"
    torch.save(checkpoint(data), path)
    return path


def test_the_network_gives_its_outputs(data, file, exactness):
    _, snapshot = read(file)
    model = model_of(snapshot, settings_of(snapshot, file), snapshot.weights, file)
    found = model.network(filled("x", data["shape"]), torch.tensor(data["t"]), None)
    exactness("format pytorch-ddpm", "pytorch-ddpm's UNet", "exact", difference(found, data["output"]), 1e-5)


def test_the_cifar10_network_gives_its_outputs(data, tmp_path, exactness):
    full = data["full"]
    net = network(full["tensors"], full["options"]["T"])
    path = tmp_path / "ckpt.pt"
    group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8}
    torch.save({"net_model": net, "ema_model": net, "optim": {"state": {}, "param_groups": [group]}, "step": 0}, path)
    _, snapshot = read(path)
    assert snapshot.model == ModelConfig(time_embedding="interleaved", norm_groups_exact=True)
    assert sum(tensor.numel() for tensor in snapshot.weights.values()) == 35_746_307
    model = model_of(snapshot, settings_of(snapshot, path), snapshot.weights, path)
    found = model.network(filled("x", full["shape"]), torch.tensor(full["t"]), None).flatten()
    found = found[:: len(found) // 24][:24]
    exactness("format pytorch-ddpm, CIFAR-10", "pytorch-ddpm's UNet", "exact", difference(found, full["output"]), 1e-5)


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
@pytest.mark.parametrize("mean_type", ["epsilon", "xstart", "xprev"])
def test_its_sampler_gives_its_images(data, file, exactness, mean_type, var_type):
    _, snapshot = read(file, f"pytorch-ddpm:mean_type={mean_type},var_type={var_type}")
    model = model_of(snapshot, settings_of(snapshot, file), snapshot.weights, file)
    steps, shape = data["options"]["T"], data["shape"]
    found = Sampler.parse(snapshot.sampler).sample(
        model,
        filled("x_T", shape),
        None,
        lambda i: filled(f"noise {steps - 1 - i}", shape),
        Thresholding.parse(model.thresholding),
    )
    off = difference(found.clamp(-1, 1), data["sample"][f"{mean_type} {var_type}"])
    exactness(f"format pytorch-ddpm, {mean_type} {var_type}", "pytorch-ddpm's sampler", "exact", off, 1e-5)


def test_what_it_says_of_the_run(data, file):
    form, snapshot = read(file)
    assert form == identify(Source(file)) == Format.parse("pytorch-ddpm")
    assert (snapshot.step, snapshot.shape, snapshot.classes, list(snapshot.emas)) == (42, (3, 8, 8), (), ["0.9999"])
    assert (
        snapshot.diffusion.schedule,
        snapshot.diffusion.variance,
        snapshot.diffusion.thresholding,
        snapshot.sampler,
    ) == (
        "linear:timesteps=3,beta_start=0.0001,beta_end=0.02",
        "fixed-large",
        "none",
        "ddpm",
    )
    assert snapshot.train["lr"] == 2e-4
    assert "0.0001 to 0.02" in snapshot.notes[0]


def test_import_and_export_give_the_same_file(data, file, tmp_path):
    runs.import_checkpoint(file, tmp_path / "run")
    runs.export_checkpoint(tmp_path / "run", tmp_path / "back.pt", spec="pytorch-ddpm")
    before, after = checkpoint(data), torch.load(tmp_path / "back.pt", weights_only=True)
    assert after.keys() == before.keys()
    assert after["step"] == before["step"]
    for part in ("net_model", "ema_model"):
        assert list(after[part]) == list(before[part])  # the order is that of its parameters, by which Adam counts
        assert all(torch.equal(after[part][name], before[part][name]) for name in before[part] if name != TABLE)
        assert torch.allclose(after[part][TABLE], before[part][TABLE], atol=1e-6)
    assert after["optim"]["param_groups"][0]["params"] == before["optim"]["param_groups"][0]["params"]
    assert after["optim"]["state"].keys() == before["optim"]["state"].keys()
    for index, values in before["optim"]["state"].items():
        assert all(torch.equal(after["optim"]["state"][index][key], value) for key, value in values.items())
    with pytest.raises(Exception, match="is there already"):
        runs.export_checkpoint(tmp_path / "run", tmp_path / "back.pt", spec="pytorch-ddpm")


def test_training_goes_on_as_its_adam_would(data, file, tmp_path):
    """One step: gradients of ours on the digits' stand-in, the update by a torch Adam that loads the file's own state."""
    words = "--data.dataset shapes:num_images=16 --data.size 8 --data.channels 3 --batch-size 4 --train.micro-batch 4"
    run = tmp_path / "run"
    more = [
        "--train.preview-every",
        "0",
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--model.dropout",
        "0",
        "--train.grad-clip",
        "0",
    ]
    assert cli.main(["import", str(file), "--run-dir", str(run), *words.split(), *more]) == 0
    assert cli.main(["train", "--run-dir", str(run), "--steps", "43", "--device", "cpu", *more[:2]]) == 0
    saved = runs.find_checkpoint(run, pytest.fail)
    assert saved.step == 43
    before = runs.find_checkpoint(run / "checkpoints/step-00000042", pytest.fail)
    optimizer, start, after = saved.tensors("optimizer"), before.tensors("model"), saved.tensors("model")
    old = before.tensors("optimizer")
    lr = 2e-4 * 43 / 5000
    for name in ("network.stem.weight", "network.middle.0.attention.qkv.weight"):
        assert optimizer[f"{name}.step"] == 43
        gradient = (optimizer[f"{name}.exp_avg"] - 0.9 * old[f"{name}.exp_avg"]) / 0.1
        assert torch.allclose(
            optimizer[f"{name}.exp_avg_sq"], 0.999 * old[f"{name}.exp_avg_sq"] + 0.001 * gradient**2, atol=1e-6
        )
        m, v = optimizer[f"{name}.exp_avg"] / (1 - 0.9**43), optimizer[f"{name}.exp_avg_sq"] / (1 - 0.999**43)
        assert torch.allclose(after[name], start[name] - lr * m / (v.sqrt() + 1e-8), atol=1e-7)
    average = saved.tensors("ema-0.9999")["network.stem.weight"]
    expected = torch.lerp(before.tensors("ema-0.9999")["network.stem.weight"], after["network.stem.weight"], 1e-4)
    assert torch.allclose(average, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held["net_model"].pop("downblocks.0.block1.0.bias"), "downblocks.0.block1.0.bias is missing"),
        (lambda held: held["net_model"].update(extra=torch.zeros(1)), "the tensor extra is not known"),
        (lambda held: held["ema_model"].update({"tail.0.weight": torch.ones(7)}), "network.norm.weight is (7,)"),
        (lambda held: held["net_model"].pop("head.weight"), "'head.weight'"),
        (lambda held: held["net_model"].update({TABLE: torch.zeros(3, 32)}), "its table of sinusoids is not"),
        (lambda held: held.update(optim=[]), "its contents are not those of pytorch-ddpm"),
        (lambda held: held.update(ema_model=3), "ema_model are no tensors by name"),
    ],
)
def test_another_architecture_names_the_first_misfit(data, tmp_path, change, said):
    held = checkpoint(data)
    change(held)
    torch.save(held, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError) as caught:
        runs.load(tmp_path / "ckpt.pt")
    assert said in str(caught.value)
    assert str(tmp_path / "ckpt.pt") in str(caught.value)


def test_a_hostile_file_runs_nothing(data, tmp_path):
    hostile(tmp_path / "ckpt.pt", checkpoint(data), tmp_path / "ran")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"model.heads": 2}, "--model.heads=2"),
        ({"model.time_embedding": "cos-sin"}, "cos-sin"),
        ({"model.channels": 48}, "multiples of 32"),
        ({"model.channels": 32}, "fewer groups"),
        ({"diffusion.schedule": "cosine"}, "linear schedule alone"),
        ({"diffusion.objective": "v"}, "--diffusion.objective=v"),
        ({"diffusion.variance": "learned-range"}, "--diffusion.variance=learned-range"),
    ],
)
def test_what_it_cannot_hold_is_told(field, said, tmp_path):
    settings = build(nest(field))
    snapshot = Snapshot(model=settings.model, diffusion=settings.diffusion, shape=(3, 32, 32), weights={})
    with pytest.raises(ConfigError) as caught:
        Format.parse("pytorch-ddpm").save(snapshot, tmp_path / "ckpt.pt")
    assert said in str(caught.value)
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_network_of_ours_with_other_sinusoids_is_exported(tmp_path):
    """[sin | cos] columns become interleaved ones; the outputs stay."""
    config = ModelConfig(channels=32, channel_mults=(1, 2), blocks=1, norm_groups_exact=True)
    ours = UNet(config, 3, 3).eval()
    made = ours.state_dict()
    snapshot = Snapshot(model=config, diffusion=DiffusionConfig(), shape=(3, 8, 8), weights=made, step=5)
    Format.parse("pytorch-ddpm").save(snapshot, tmp_path / "ckpt.pt")
    _, back = read(tmp_path / "ckpt.pt")
    assert back.step == 5
    theirs = model_of(back, settings_of(back, tmp_path), back.weights, tmp_path).network
    x, t = filled("x", (2, 3, 8, 8)), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        assert torch.allclose(theirs(x, t), ours(x, t), atol=1e-5)
