"""Networks, a file each, and the diffusion model that holds one."""

from typing import Any

import torch
from torch import nn

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import ConfigError
from ddpm.models.diffusion import NO_LABEL, GaussianDiffusion, Predictor
from ddpm.models.unet import UNet
from ddpm.objectives import Objective
from ddpm.registry import import_object, nearest
from ddpm.schedules import Schedule
from ddpm.variances import Variance

__all__ = ["NETWORKS", "NO_LABEL", "GaussianDiffusion", "Predictor", "UNet", "build_diffusion"]

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet}
"""Networks by name; each is made as Network(model_config, in_channels, out_channels, num_labels)."""


def build_diffusion(
    model: ModelConfig, diffusion: DiffusionConfig, shape: tuple[int, int, int], num_classes: int, seed: int = 0
) -> GaussianDiffusion:
    """The model that a config describes, for images (C, H, W), its weights drawn from `seed`.

    Raises ConfigError: an unknown component, an option out of range, conditioning without classes, or an objective that
    its schedule leaves without an answer.
    """
    if model.conditioning == "auto":
        model = model.model_copy(update={"conditioning": "global" if num_classes else "none"})
    conditional = model.conditioning != "none"
    if conditional and num_classes < 1:
        raise ConfigError(
            f"--model.conditioning={model.conditioning} needs a data set with classes; this one has none."
        )
    schedule, objective = Schedule.parse(diffusion.schedule), Objective.parse(diffusion.objective)
    variance = Variance.parse(diffusion.variance)
    out_channels = shape[0] * (2 if variance.learned else 1)
    num_labels = (num_classes + (diffusion.label_drop > 0)) if conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network_class(model.network)(model, shape[0], out_channels, num_labels)
    return GaussianDiffusion(
        network,
        schedule,
        objective,
        shape=shape,
        variance=variance,
        loss=diffusion.loss,
        criterion=diffusion.criterion,
        weighting=diffusion.weighting,
        times=diffusion.times,
        num_classes=num_classes if conditional else 0,
        label_drop=diffusion.label_drop if conditional else 0.0,
        thresholding=diffusion.thresholding,
    )


def _network_class(name: str) -> Any:
    if name in NETWORKS:
        return NETWORKS[name]
    if ":" not in name:
        raise ConfigError(
            f"--model.network={name} is not known{nearest(name, NETWORKS)}; choose from {', '.join(NETWORKS)}, or package.module:Class."
        )
    found = import_object(name, "--model.network")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"--model.network={name} is no network: name a class derived from torch.nn.Module.")
    return found
