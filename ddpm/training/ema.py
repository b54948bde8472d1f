"""Exponential moving averages of the weights, kept outside the model."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ddpm.errors import CheckpointError, ConfigError
from ddpm.registry import Component, register

Decay = Annotated[float, Field(ge=0, lt=1)]


class EMADecay(Component, kind="ema"):
    """How fast an average forgets."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What checkpoints and --ema call the average; a run has one of each."""

    @abstractmethod
    def at(self, updates: int, batch_size: int) -> float | None:
        """The decay of this update (counted from 0) by a batch of so many images; None leaves the average as it is."""


@dataclass(frozen=True, kw_only=True)
class FixedDecay(EMADecay):
    """A rule that ends at a decay, by which it is called: 0.9999."""

    decay: Decay = 0.9999

    @property
    def label(self) -> str:
        return f"{self.decay:g}"


@register("constant")
class Constant(FixedDecay):
    """The same decay always (Ho et al. 2020, appendix B). Before update `start` the average is the weights themselves;
    with `every` = n only each n-th step counts (the ddpm package has start=2000)."""

    start: Annotated[int, Field(ge=0)] = 0
    every: Annotated[int, Field(ge=1)] = 1

    def at(self, updates: int, batch_size: int) -> float | None:
        if (updates + 1) % self.every:
            return None
        return 0.0 if updates < self.start else self.decay


@register("warmup")
class Warmup(FixedDecay):
    """min(decay, (1 + n) / (10 + n)) at update n: early averages are not stuck at the first weights (TensorFlow's rule)."""

    def at(self, updates: int, batch_size: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates))


@register("half-life")
class HalfLife(EMADecay):
    """A step's weight halves every so many images, whatever the batch; at the start every `rampup` of the images seen, so
    that the first weights are soon forgotten (Karras et al. 2022, code: 500,000 images and 0.05)."""

    images: Annotated[int, Field(ge=1)] = 500_000
    rampup: Annotated[float, Field(gt=0)] | None = 0.05

    @property
    def label(self) -> str:
        return f"{self.images}-images"

    def at(self, updates: int, batch_size: int) -> float:
        """2^(-batch / half-life); 0 at the first update of a ramp."""
        images = self.images if self.rampup is None else min(self.images, self.rampup * updates * batch_size)
        return 0.5 ** (batch_size / images) if images else 0.0


def parse_decay(text: str) -> EMADecay:
    """A spec, or a bare number for a constant decay; raises ConfigError."""
    try:
        return Constant(decay=float(text))
    except ValueError:
        return EMADecay.parse(text)


class EMA:
    """One average of a module's parameters.

    Args:
        module: its parameters are averaged in float32; its buffers are copied.
        decay: the rule.
        batch_size: images per update.

    `updates` counts the steps seen. `state()` and `load()` use the module's own state_dict keys.
    """

    def __init__(self, module: nn.Module, decay: EMADecay, batch_size: int = 1) -> None:
        self.decay, self.batch_size, self.updates = decay, batch_size, 0
        self._module = module
        self._names = [name for name, _ in module.named_parameters()]
        self._shadow = [p.detach().float().clone() for p in module.parameters()]

    @property
    def name(self) -> str:
        """What checkpoints call it, such as 0.9999."""
        return self.decay.label

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in: shadow = decay shadow + (1 - decay) weights."""
        decay = self.decay.at(self.updates, self.batch_size)
        self.updates += 1
        if decay is not None:
            torch._foreach_lerp_(self._shadow, [p.detach().float() for p in self._module.parameters()], 1.0 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights, with the module's present buffers, by state_dict key."""
        return {**self._module.state_dict(), **dict(zip(self._names, self._shadow, strict=True))}

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Go on from saved weights; raises CheckpointError when a parameter is missing or of another shape."""
        for name, shadow in zip(self._names, self._shadow, strict=True):
            if name not in state or state[name].shape != shadow.shape:
                raise CheckpointError(f"the moving average {self.name} does not fit the model at {name}.")
            shadow.copy_(state[name])
        self.updates = updates


def parse_decays(specs: tuple[str, ...]) -> list[EMADecay]:
    """The rules that a config names; raises ConfigError, also when two averages would have one name."""
    decays = [parse_decay(spec) for spec in specs]
    if len({decay.label for decay in decays}) != len(decays):
        raise ConfigError(f"--train.ema={' '.join(specs)}: two averages have the same decay; give each its own.")
    return decays
