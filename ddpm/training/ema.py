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


@dataclass(frozen=True, kw_only=True)
class EMADecay(Component, kind="ema"):
    """How fast an average forgets."""

    decay: Decay = 0.9999

    @abstractmethod
    def at(self, updates: int) -> float | None:
        """The decay of this update (counted from 0); None leaves the average as it is."""


@register("constant")
class Constant(EMADecay):
    """The same decay always (Ho et al. 2020, appendix B). Before update `start` the average is the weights themselves;
    with `every` = n only each n-th step counts (the ddpm package has start=2000)."""

    start: Annotated[int, Field(ge=0)] = 0
    every: Annotated[int, Field(ge=1)] = 1

    def at(self, updates: int) -> float | None:
        if (updates + 1) % self.every:
            return None
        return 0.0 if updates < self.start else self.decay


@register("warmup")
class Warmup(EMADecay):
    """min(decay, (1 + n) / (10 + n)) at update n: early averages are not stuck at the first weights (TensorFlow's rule)."""

    def at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates))


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

    `updates` counts the steps seen. `state()` and `load()` use the module's own state_dict keys.
    """

    def __init__(self, module: nn.Module, decay: EMADecay) -> None:
        self.decay, self.updates = decay, 0
        self._module = module
        self._names = [name for name, _ in module.named_parameters()]
        self._shadow = [p.detach().float().clone() for p in module.parameters()]

    @property
    def name(self) -> str:
        """What checkpoints call it: its decay, such as 0.9999."""
        return f"{self.decay.decay:g}"

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in: shadow = decay shadow + (1 - decay) weights."""
        decay = self.decay.at(self.updates)
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
    if len({f"{decay.decay:g}" for decay in decays}) != len(decays):
        raise ConfigError(f"--train.ema={' '.join(specs)}: two averages have the same decay; give each its own.")
    return decays
