"""Networks, a file each, and the diffusion model that holds one."""

import inspect
from typing import Any

import torch
from torch import nn

from ddpm.augmentation import Augmentation
from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import ConfigError
from ddpm.models.diffusion import NO_LABEL, GaussianDiffusion, Predictor
from ddpm.models.song_unet import SongUNet
from ddpm.models.unet import UNet
from ddpm.objectives import Objective
from ddpm.registry import import_object, nearest
from ddpm.schedules import Schedule
from ddpm.variances import Variance

__all__ = ["NETWORKS", "NO_LABEL", "GaussianDiffusion", "Predictor", "SongUNet", "UNet", "build_diffusion"]

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "song-unet": SongUNet}
"""Networks by name; each is made as Network(model_config, in_channels, out_channels, num_labels)."""


def build_diffusion(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    shape: tuple[int, int, int],
    num_classes: int,
    seed: int = 0,
    augment: str = "none",
) -> GaussianDiffusion:
    """The model that a config describes, for images (C, H, W), its weights drawn from `seed`.

    Raises ConfigError: an unknown component, an option out of range, conditioning without classes, an objective that
    its schedule leaves without an answer, a field or an augmentation that the network does not have.
    """
    if model.conditioning == "auto":
        model = model.model_copy(update={"conditioning": "global" if num_classes else "none"})
    conditional = model.conditioning != "none"
    if conditional and num_classes < 1:
        raise ConfigError(
            f"--model.conditioning={model.conditioning} needs a data set with classes; this one has none."
        )
    schedule, objective = Schedule.parse(diffusion.schedule), Objective.parse(diffusion.objective)
    augmentation, network_class = Augmentation.parse(augment), _network_class(model.network)
    model = _for_network(model, network_class, augmentation, shape)
    variance = Variance.parse(diffusion.variance)
    out_channels = shape[0] * (2 if variance.learned else 1)
    num_labels = (num_classes + (diffusion.label_drop > 0)) if conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = network_class(model, shape[0], out_channels, num_labels)
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
        augmentation=augmentation,
    )


def _for_network(
    model: ModelConfig, network_class: Any, augmentation: Augmentation, shape: tuple[int, int, int]
) -> ModelConfig:
    """The config with what data and augmentation decide filled in; raises ConfigError for what the network lacks."""
    for name in sorted(getattr(network_class, "UNUSED", ())):
        if getattr(model, name) != ModelConfig.model_fields[name].default:
            raise ConfigError(
                f"--model.{name.replace('_', '-')}={getattr(model, name)}: the network {model.network} has no such option."
            )
    if augmentation.num_labels and "augment" not in inspect.signature(network_class.forward).parameters:
        raise ConfigError(
            f"--data.augment={augmentation.name}: the network {model.network} cannot be told of it; its forward takes no augment."
        )
    if model.augment_labels and augmentation.num_labels not in (0, model.augment_labels):
        raise ConfigError(
            f"--model.augment-labels={model.augment_labels}: --data.augment={augmentation.name} gives {augmentation.num_labels}; leave it out."
        )
    found = {"augment_labels": augmentation.num_labels or model.augment_labels}
    return model.model_copy(update={**found, "resolution": model.resolution or shape[1]})


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
