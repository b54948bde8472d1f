"""Presets: one table of recipes. Fields that are not named have the defaults of `ddpm.config`."""

from dataclasses import dataclass
from typing import Any

from ddpm.config import nest
from ddpm.errors import ConfigError
from ddpm.registry import nearest


@dataclass(frozen=True)
class Preset:
    """A recipe: a line about it, and the fields it sets, by dotted name."""

    summary: str
    fields: dict[str, Any]


_SMALL = {
    "diffusion.schedule": "cosine",
    "diffusion.objective": "v",
    "diffusion.variance": "fixed-small",
    "model.dropout": 0.0,
    "model.norm_groups": 8,  # one channel a group would take the time embedding's shift out again
    "model.conditioning": "global",
    "train.optimizer": "adamw",
    "train.ema": ("warmup:decay=0.999",),
}

_CLOTHES = {
    **_SMALL,
    "model.channels": 32,
    "model.channel_mults": (1, 2, 2),
    "model.blocks": 1,
    "model.attention": (2,),
    "train.batch_size": 64,
    "train.steps": 100_000,
    "train.lr": 1e-3,
    "train.warmup": 200,
    "sample.guidance": 2.0,
}

_HO = {  # Ho et al. (2020), appendix B: 35.7 M parameters, linear schedule, 800,000 steps
    "data.dataset": "cifar10",
    "data.flip": True,
    "train.steps": 800_000,
    "train.checkpoint_every": 5000,
}

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "8x8 handwritten digits, ten classes, embedded: minutes on a laptop's CPU",
        {
            **_SMALL,
            "data.dataset": "digits",
            "model.channels": 32,
            "model.channel_mults": (1, 2),
            "model.blocks": 1,
            "train.steps": 1500,
            "train.lr": 1e-3,
            "train.warmup": 100,
            "train.checkpoint_every": 500,
            "train.preview_every": 500,
            "sample.sampler": "ddpm:steps=50",
        },
    ),
    "fashion-mnist": Preset(
        "28x28 clothes, ten classes: recognisable in twenty minutes on two cores",
        {**_CLOTHES, "data.dataset": "fashion-mnist", "data.flip": True},
    ),
    "mnist": Preset("28x28 handwritten digits, ten classes", {**_CLOTHES, "data.dataset": "mnist"}),
    "cifar10": Preset(
        "32x32 colour photos, unconditional: Ho et al. (2020), 35.7 M parameters, 800,000 steps", {**_HO}
    ),
    "cifar10-cond": Preset(
        "the same, class-conditional, with labels dropped for classifier-free guidance",
        {**_HO, "model.conditioning": "global"},
    ),
    "cifar10-improved": Preset(
        "32x32 colour photos, cosine schedule and learned variance: Nichol & Dhariwal (2021), 52.5 M, 500,000 steps",
        {
            "data.dataset": "cifar10",
            "model.blocks": 3,
            "model.attention": (1, 2),
            "model.heads": 4,
            "model.dropout": 0.3,
            "model.scale_shift": True,
            "model.time_embedding": "cos-sin",
            "model.initialisation": "zero",
            "diffusion.schedule": "cosine:timesteps=4000",
            "diffusion.objective": "eps:label_scale=0.25",  # the network hears times of 0 to 1000
            "diffusion.variance": "learned-range",
            "diffusion.criterion": "hybrid",
            "train.steps": 500_000,
            "train.lr": 1e-4,
            "train.warmup": 0,
            "train.grad_clip": 0.0,
            "train.checkpoint_every": 5000,
            "sample.sampler": "ddpm:steps=100,grid=linspace",  # near the best FID, on their strides, section 4
        },
    ),
    "cifar10-edm": Preset(
        "32x32 colour photos, as EDM, the unconditional DDPM++ of Karras et al. (2022): 55.7 M, 390,625 steps of 512",
        {  # their code: train.py with --cond=0 --arch=ddpmpp, and generate.py
            "data.dataset": "cifar10",
            "data.augment": "edm:probability=0.12",
            "model.network": "song-unet",
            "model.channel_mults": (2, 2, 2),
            "model.blocks": 4,
            "model.dropout": 0.13,
            "diffusion.schedule": "edm",
            "diffusion.objective": "edm:sigma_data=0.5",
            "diffusion.times": "log-normal:mean=-1.2,std=1.2",
            "diffusion.weighting": "edm:sigma_data=0.5",
            "diffusion.thresholding": "none",
            "train.steps": 390_625,  # 200 million images
            "train.batch_size": 512,
            "train.lr": 1e-3,
            "train.adam_eps": 1e-8 / (3 * 32 * 32),  # the loss is a mean over pixels, theirs a sum
            "train.warmup": 19_531,  # 10 million images
            "train.grad_clip": 0.0,
            "train.ema": ("half-life:images=500000,rampup=0.05",),
            "train.checkpoint_every": 5000,
            "sample.sampler": "heun:steps=18,grid=karras",
        },
    ),
    "folder": Preset(
        "your own images: --data.path DIR; subfolders are classes",
        {
            "data.dataset": "folder",
            "data.flip": True,
            "model.channels": 64,
            "model.norm_groups": 16,
            "model.conditioning": "auto",
            "diffusion.schedule": "cosine",
            "diffusion.objective": "v",
            "train.ema": ("warmup:decay=0.9995",),
            "train.warmup": 500,
            "train.batch_size": 32,
        },
    ),
}


def preset(name: str) -> dict[str, Any]:
    """The nested fields of a preset; raises ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}.")
    return nest(PRESETS[name].fields)
