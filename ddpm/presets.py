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
            "diffusion.schedule": "cosine:timesteps=4000",
            "diffusion.objective": "eps:label_scale=0.25",  # the network hears times of 0 to 1000
            "diffusion.variance": "learned-range",
            "diffusion.criterion": "hybrid",
            "train.steps": 500_000,
            "train.lr": 1e-4,
            "train.warmup": 0,
            "train.grad_clip": 0.0,
            "train.checkpoint_every": 5000,
            "sample.sampler": "ddpm:steps=100",  # near the best FID, section 4
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
