"""Denoising diffusion probabilistic models: data, training, sampling, evaluation, benchmarks.

    model = ddpm.load("runs/digits")
    images = ddpm.sample(model, seeds=range(10), sampler="ddim:steps=50")   # uint8 (10, C, H, W)

Nothing is imported until it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddpm.config import DataConfig, RunConfig
    from ddpm.data import Dataset, ImageSet, load_dataset
    from ddpm.errors import CheckpointError, ConfigError, DataError, DDPMError, DivergedError, MissingDependencyError
    from ddpm.guidance import Guidance
    from ddpm.models import GaussianDiffusion, UNet
    from ddpm.objectives import Objective, Prediction
    from ddpm.presets import PRESETS, preset
    from ddpm.registry import register
    from ddpm.runs import Evaluation, Model, editor, evaluate, likelihood, load, train
    from ddpm.runs import draw_images as sample
    from ddpm.samplers import Sampler
    from ddpm.schedules import Level, Schedule

_WHERE = {
    "PRESETS": "presets",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DDPMError": "errors",
    "DataConfig": "config",
    "DataError": "errors",
    "Dataset": "data",
    "DivergedError": "errors",
    "Evaluation": "runs",
    "GaussianDiffusion": "models",
    "Guidance": "guidance",
    "ImageSet": "data",
    "Level": "schedules",
    "MissingDependencyError": "errors",
    "Model": "runs",
    "Objective": "objectives",
    "Prediction": "objectives",
    "RunConfig": "config",
    "Sampler": "samplers",
    "Schedule": "schedules",
    "UNet": "models",
    "editor": "runs",
    "evaluate": "runs",
    "likelihood": "runs",
    "load": "runs",
    "load_dataset": "data",
    "preset": "presets",
    "register": "registry",
    "sample": "runs:draw_images",
    "train": "runs",
}
"""Public name -> the module that has it (and its name there, where it is another)."""

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ddpm' has no attribute {name!r}")
    module, _, other = _WHERE[name].partition(":")
    return getattr(importlib.import_module(f"ddpm.{module}"), other or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
