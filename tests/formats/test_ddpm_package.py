"""The ddpm package's model files, plain and conditional: its network's outputs, its sampler's images, its Adam, and the way back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import runs
from ddpm.config import ModelConfig, build, nest
from ddpm.errors import CheckpointError, ConfigError
from ddpm.formats import Format, Snapshot, Source, identify
from ddpm.runs.foreign import model_of, read, settings_of
from ddpm.samplers import Sampler, Thresholding
from tests.formats.filled import difference, filled, hostile, state, stored

KINDS = ["plain", "conditional"]


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return stored("ddpm_package")


def checkpoint(held: dict[str, Any]) -> dict[str, Tensor]:
    """What its scripts save: buffers, the network, its average."""
    betas = torch.tensor(held["betas"], dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    tables = [
        betas,
        1 - betas,
        kept,
        kept**0.5,
        (1 - kept) ** 0.5,
        (1 - betas) ** -0.5,
        betas / (1 - kept) ** 0.5,
        betas**0.5,
    ]
    buffers = {name: table.float() for name, table in zip(held["buffers"], tables, strict=True)}
    return {**buffers, **state(held["tensors"])}


def write(folder: Path, held: dict[str, Any]) -> Path:
    path = folder / "ddpm-run-iteration-9000-model.pth"
    torch.save(checkpoint(held), path)
    return path


def optimizer(held: dict[str, Any]) -> dict[str, Any]:
    """Adam over both networks, of which the average has no state."""
    moments = {
        k: {
            "step": torch.tensor(41.0),
            "exp_avg": filled(f"avg {name}", shape),
            "exp_avg_sq": filled(f"sq {name}", shape) ** 2,
        }
        for k, (name, shape) in enumerate(held["tensors"].items())
        if name.startswith("model.")
    }
    group = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    return {"state": moments, "param_groups": [{**group, "params": list(range(len(held["tensors"])))}]}


def opened(held: dict[str, Any], path: Path, average: bool = True) -> tuple[Snapshot, Any, Tensor | None]:
    _, snapshot = read(path, f"ddpm-package:activation={held['activation']},img_size=8")
    weights = snapshot.emas["0.9999"] if average else snapshot.weights
    labels = None if held["y"] is None else torch.tensor(held["y"])
    return snapshot, model_of(snapshot, settings_of(snapshot, path), weights, path), labels


@pytest.mark.parametrize("kind", KINDS)
def test_the_networks_give_their_outputs(data, tmp_path, exactness, kind):
    held = data[kind]
    path = write(tmp_path, held)
    for average, wanted in ((True, "output"), (False, "raw")):
        _, model, labels = opened(held, path, average)
        found = model.network(filled("x", held["shape"]), torch.tensor(held["t"]), labels)
        off = difference(found, held[wanted])
        exactness(f"format ddpm-package, {kind} {wanted}", "the ddpm package's UNet", "exact", off, 1e-5)


def test_the_cifar10_network_gives_its_outputs(data, tmp_path, exactness):
    full = data["full"]
    average = state({f"ema_{name}": shape for name, shape in full["tensors"].items()})
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float()
    held = {name.removeprefix("ema_"): value for name, value in average.items()} | average
    torch.save({"betas": betas, "remove_noise_coeff": betas, **held}, tmp_path / "a.pth")
    _, snapshot = read(tmp_path / "a.pth")
    assert snapshot.model == ModelConfig(norm_groups_exact=True)
    assert snapshot.diffusion.schedule == "linear:timesteps=1000,beta_start=0.0001,beta_end=0.02"
    model = model_of(snapshot, settings_of(snapshot, tmp_path), snapshot.emas["0.9999"], tmp_path)
    found = model.network(filled("x", full["shape"]), torch.tensor(full["t"]), None).flatten()
    found = found[:: len(found) // 24][:24]
    off = difference(found, full["output"])
    exactness("format ddpm-package, CIFAR-10", "the ddpm package's UNet", "exact", off, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_its_sampler_gives_its_images(data, tmp_path, exactness, kind):
    held = data[kind]
    snapshot, model, labels = opened(held, write(tmp_path, held))
    assert snapshot.diffusion.schedule.startswith({"plain": "linear:timesteps=3,", "conditional": "cosine"}[kind])
    found = Sampler.parse(snapshot.sampler).sample(
        model,
        filled("x_T", held["shape"]),
        labels,
        lambda i: filled(f"noise {2 - i}", held["shape"]),
        Thresholding.parse(model.thresholding),
    )
    off = difference(found, held["sample"])
    exactness(f"format ddpm-package, {kind} samples", "the ddpm package's sampler", "exact", off, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_give_the_same_files(data, tmp_path, kind):
    held = data[kind]
    path = write(tmp_path, held)
    beside = tmp_path / "ddpm-run-iteration-9000-optim.pth"
    torch.save(optimizer(held), beside)
    runs.import_checkpoint(path, tmp_path / "run", spec=f"ddpm-package:activation={held['activation']}")
    assert runs.find_checkpoint(tmp_path / "run", pytest.fail).step == 41
    runs.export_checkpoint(tmp_path / "run", tmp_path / "back-model.pth", spec="ddpm-package")
    before, after = (torch.load(file, weights_only=True) for file in (path, tmp_path / "back-model.pth"))
    assert list(after) == list(before)
    for name, value in before.items():
        if name in held["buffers"]:
            assert torch.allclose(after[name], value, rtol=1e-6)
        else:
            assert torch.equal(after[name], value), name
    before, after = (torch.load(file, weights_only=True) for file in (beside, tmp_path / "back-optim.pth"))
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, values in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in values.items())
    with pytest.raises(ConfigError, match=r"must end in -model\.pth"):
        runs.export_checkpoint(tmp_path / "run", tmp_path / "back.pth", spec="ddpm-package")


def test_the_step_is_the_optimizers_or_the_names(data, tmp_path):
    path = write(tmp_path, data["plain"])
    form, snapshot = read(path)
    assert form == identify(Source(path)) == Format.parse("ddpm-package")
    assert (snapshot.step, snapshot.optimizer, snapshot.classes) == (9000, {}, ())
    torch.save(optimizer(data["plain"]), tmp_path / "ddpm-run-iteration-9000-optim.pth")
    _, snapshot = read(path)
    assert (snapshot.step, snapshot.train["lr"]) == (41, 3e-4)


def test_the_conditional_network_has_ten_classes(data, tmp_path):
    _, snapshot = read(write(tmp_path, data["conditional"]))
    assert snapshot.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("model.ups.0.norm_1.bias"), "ups.0.norm_1.bias is missing"),
        (lambda held: held.update({"model.extra": torch.zeros(1)}), "the tensor extra is not known"),
        (lambda held: held.update({"ema_model.out_norm.weight": torch.ones(7)}), "network.norm.weight is (7,)"),
        (lambda held: held.update({"model.mid.0.norm_1.running_mean": torch.ones(7)}), "batch norm"),
        (lambda held: held.update(betas=torch.tensor([0.1, 0.3, 0.2])), "neither linear nor cosine"),
        (lambda held: held.update(betas=3), "are no tensors by name"),
    ],
)
def test_another_architecture_names_the_first_misfit(data, tmp_path, change, said):
    held = checkpoint(data["plain"])
    change(held)
    torch.save(held, tmp_path / "a-model.pth")
    with pytest.raises(CheckpointError) as caught:
        runs.load(tmp_path / "a-model.pth")
    assert said in str(caught.value)
    assert str(tmp_path / "a-model.pth") in str(caught.value)


def test_a_hostile_file_runs_nothing(data, tmp_path):
    hostile(tmp_path / "a-model.pth", checkpoint(data["plain"]), tmp_path / "ran")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"model.heads": 2}, "--model.heads=2"),
        ({"model.conditioning": "global"}, "global conditioning"),
        ({"model.conditioning": "block"}, "label-drop must be 0"),
        ({"diffusion.objective": "x0"}, "eps alone"),
        ({"diffusion.variance": "fixed-small"}, "fixed-large"),
        ({"diffusion.schedule": "vp"}, "vp"),
    ],
)
def test_what_it_cannot_hold_is_told(field, said, tmp_path):
    settings = build(nest(field))
    snapshot = Snapshot(model=settings.model, diffusion=settings.diffusion, shape=(3, 8, 8), weights={})
    with pytest.raises(ConfigError) as caught:
        Format.parse("ddpm-package").save(snapshot, tmp_path / "a-model.pth")
    assert said in str(caught.value)
    assert [*tmp_path.iterdir()] == []
