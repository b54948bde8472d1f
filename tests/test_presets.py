"""Presets: every recipe is valid, builds its network, and is what the documents say of it."""

import re
from pathlib import Path

import pytest
import torch

from ddpm.config import build, fields, flatten
from ddpm.data import Dataset
from ddpm.errors import ConfigError
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.objectives import Objective
from ddpm.presets import PRESETS, preset
from ddpm.samplers import Sampler, Thresholding
from ddpm.schedules import DiscreteSchedule, Schedule
from ddpm.training.ema import parse_decay

TRAINING = (Path(__file__).parent.parent / "docs/training.md").read_text(encoding="utf-8")
SHAPES = {  # images and classes that each preset is meant for
    "digits": ((1, 8, 8), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar10-cond": ((3, 32, 32), 10),
    "cifar10-improved": ((3, 32, 32), 10),
    "cifar10-edm": ((3, 32, 32), 10),
    "folder": ((3, 64, 64), 0),
}
MILLIONS = {
    "digits": 0.7,
    "fashion-mnist": 1.1,
    "mnist": 1.1,
    "cifar10": 35.7,
    "cifar10-cond": 35.8,
    "cifar10-improved": 52.5,
    "cifar10-edm": 55.7,
}


def meta_model(name: str) -> GaussianDiffusion:
    settings = build(preset(name))
    with torch.device("meta"):
        return build_diffusion(settings.model, settings.diffusion, *SHAPES[name], augment=settings.data.augment)


def test_every_preset_is_tested() -> None:
    assert set(SHAPES) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_recipe(name: str) -> None:
    settings = build(preset(name))
    assert set(PRESETS[name].fields) <= set(fields())
    assert flatten(preset(name)) == PRESETS[name].fields
    assert PRESETS[name].summary
    schedule = Schedule.parse(settings.diffusion.schedule)
    assert isinstance(schedule, DiscreteSchedule) or name == "cifar10-edm"
    Objective.parse(settings.diffusion.objective)
    Thresholding.parse(settings.diffusion.thresholding)
    Dataset.parse(settings.data.dataset)
    assert [parse_decay(text).label for text in settings.train.ema]
    sampler = Sampler.parse(settings.sample.sampler)
    assert sampler.steps is not None and len(sampler.path(schedule)) == sampler.steps + 1
    assert settings.train.warmup < settings.train.steps


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_its_network(name: str) -> None:
    model = meta_model(name)
    settings, (shape, classes) = build(preset(name)), SHAPES[name]
    assert model.shape == shape
    assert model.num_classes == (0 if settings.model.conditioning == "none" else classes)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert name not in MILLIONS or round(millions, 1) == MILLIONS[name]


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "folder"])
def test_a_preset_of_a_small_network_takes_a_step(name: str) -> None:
    from ddpm.randomness import Stream

    settings, (shape, classes) = build(preset(name)), SHAPES[name]
    shape = (shape[0], min(shape[1], 28), min(shape[2], 28))
    model = build_diffusion(settings.model, settings.diffusion, shape, classes)
    labels = torch.arange(2) if classes else None
    loss = model(torch.zeros(2, *shape), labels, Stream(0, torch.arange(2)))
    loss.mean().backward()
    assert loss.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_cifar10_is_the_recipe_of_ho_et_al() -> None:
    """Appendix B: linear schedule, eps, Adam at 2e-4, batch 128, 800,000 steps, EMA 0.9999, dropout 0.1, flips."""
    settings = build(preset("cifar10"))
    assert (settings.train.steps, settings.train.batch_size, settings.train.lr) == (800_000, 128, 2e-4)
    assert (settings.train.optimizer, settings.train.ema, settings.train.warmup) == ("adam", ("0.9999",), 5000)
    assert (settings.model.dropout, settings.data.flip, settings.diffusion.objective) == (0.1, True, "eps")
    assert Schedule.parse(settings.diffusion.schedule) == Schedule.parse("linear")
    assert sum(parameter.numel() for parameter in meta_model("cifar10").parameters()) == 35_746_307


def test_cifar10_improved_is_the_recipe_of_nichol_and_dhariwal() -> None:
    """Their repository's flags and defaults for CIFAR-10 with L_hybrid, and the parameters that its layers add up to."""
    settings = build(preset("cifar10-improved"))
    assert (settings.train.steps, settings.train.batch_size, settings.train.lr) == (500_000, 128, 1e-4)
    assert (settings.train.warmup, settings.train.grad_clip, settings.train.ema) == (0, 0.0, ("0.9999",))
    assert (settings.model.dropout, settings.model.blocks, settings.model.heads) == (0.3, 3, 4)
    assert (settings.model.attention, settings.model.scale_shift, settings.data.flip) == ((1, 2), True, False)
    assert settings.model.initialisation == "zero"
    path = Sampler.parse(settings.sample.sampler).path(Schedule.parse(settings.diffusion.schedule))
    assert [int(level.t) for level in path] == [round(i * 3999 / 99) for i in range(99, -1, -1)] + [-1]
    model = meta_model("cifar10-improved")
    model.check_training()
    assert model.schedule == Schedule.parse("cosine:timesteps=4000")
    assert (model.variance.name, model.criterion.spec) == ("learned-range", "hybrid:weight=0.001")
    assert model.objective == Objective.parse("eps:label_scale=0.25")
    assert sum(parameter.numel() for parameter in model.parameters()) == 52_546_438


def test_cifar10_edm_is_the_recipe_of_karras_et_al() -> None:
    """As its code has it: 200 million images, half-life and warm-up in images, and the parameters of its file."""
    settings = build(preset("cifar10-edm"))
    assert settings.train.steps * settings.train.batch_size == 200e6
    assert settings.train.warmup == 10e6 // 512
    assert settings.train.adam_eps * 3 * 32 * 32 == pytest.approx(1e-8)
    assert sum(parameter.numel() for parameter in meta_model("cifar10-edm").parameters()) == 55_733_891
    assert len(Sampler.parse(settings.sample.sampler).path(Schedule.parse("edm"))) == 19


def test_the_documents_list_the_presets_in_order() -> None:
    table = TRAINING.split("## Presets")[1].split("##")[0]
    listed = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)]
    assert listed == list(PRESETS)


def test_presets_are_given_out_as_copies() -> None:
    preset("digits")["train"]["lr"] = 99
    assert build(preset("digits")).train.lr == 1e-3


def test_a_misspelt_preset_is_told_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"preset 'digts' is not known \(did you mean 'digits'\?\); presets: digits, "
    ):
        preset("digts")
