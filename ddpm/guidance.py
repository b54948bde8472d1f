"""Guidance: a model made from another one, with the same interface.

A component holds the options, in the written form of every component, or as a bare number, the weight of classifier-free
guidance: `2`, `cfg:weight=2,rescale=0.7`, `autoguidance:model=PATH`, `classifier:model=FILE`. Its `wrap` makes the guided
model, and samplers take predictions from that as from any other.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from numbers import Real
from typing import Annotated, Protocol, Self, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.models.diffusion import NO_LABEL, GaussianDiffusion, Predictor
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.registry import Component, register
from ddpm.schedules import Level, Schedule, broadcast

V = TypeVar("V", float | Tensor, float | Tensor | None)
Weight = Annotated[float, Field(ge=0)]


class Drawable(Predictor, Protocol):
    """A predictor that says how many classes it draws, 0 without."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 to this number, without it; 0: there are none."""


class NoisyClassifier(Protocol):
    """p(y | x_t) of noisy images: what classifier guidance needs."""

    @property
    def num_classes(self) -> int:
        """K, the number of labels."""

    def noisy_logits(self, x_t: Tensor, level: Level) -> Tensor:
        """Logits (B, K) of images x_t = alpha x0 + sigma eps (B, C, H, W) at a level (B,) or (); gradients flow to x_t."""


class SecondModels(Protocol):
    """Where guidance gets its second model from: `ddpm.runs` reads files, `wrap` asks for them by their written names."""

    @property
    def device(self) -> torch.device:
        """Where the second models are."""

    def diffusion(self, source: str, ema: str | None) -> GaussianDiffusion:
        """The model of a run or checkpoint; raises ConfigError, CheckpointError."""

    def classifier(self, source: str) -> NoisyClassifier:
        """The classifier of a file or of `module:Class`; raises ConfigError, DataError."""


# --- guided models


@dataclass(frozen=True)
class _Guided:
    model: Drawable

    @property
    def schedule(self) -> Schedule:
        """The guided model's schedule."""
        return self.model.schedule

    @property
    def num_classes(self) -> int:
        """The guided model's classes."""
        return self.model.num_classes


@dataclass(frozen=True)
class ClassifierFree(_Guided):
    """Classifier-free guidance (Ho & Salimans 2022): eps = eps_none + weight (eps_label - eps_none), and x0 alike.

    weight 1 is the conditional model, 0 the unconditional one; the paper's w is weight - 1 (its equation 6).

    Only at noise levels sigma / alpha in (low, high] (Kynkaanniemi et al. 2024, whose alpha is 1); elsewhere the weight is 1.
    Then x0 is scaled towards the conditional one's standard deviation, by the share `rescale` (Lin et al. 2024, section
    3.4, there on the network's output; x0 is that of any objective, and their v where their signal ends, but for the sign).
    """

    weight: float
    rescale: float = 0.0
    low: float = 0.0
    high: float = math.inf

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """Both predictions in one batch; only the one that counts, where a single level's weight is 0 or 1."""
        if condition is None:
            return self.model.predict(x_t, level)
        none, weight = torch.full_like(condition, NO_LABEL), self._weight(x_t, level)
        if isinstance(weight, float) and (weight == 1.0 or (weight == 0.0 and not self.rescale)):
            return self.model.predict(x_t, level, condition if weight else none)
        both = self.model.predict(
            torch.cat([x_t, x_t]),
            level if level.t.ndim == 0 else Level(*(torch.cat([v, v]) for v in vars(level).values())),
            torch.cat([condition, none]),
        )
        (x0_label, x0_none), (eps_label, eps_none) = both.x0.chunk(2), both.eps.chunk(2)
        x0, eps = _between(x0_none, x0_label, weight), _between(eps_none, eps_label, weight)
        if self.rescale:
            x0 = x0 * (self.rescale * (_std(x0_label) / _std(x0)) + (1.0 - self.rescale))
            eps = eps_from_x0(x0, x_t, level)
        n = len(x_t)
        return Prediction(x0, eps, _first_half(both.variance_fraction, n), _first_half(both.x0_variance, n))

    def _weight(self, x_t: Tensor, level: Level) -> float | Tensor:
        """At a level: a number for one, a tensor (B, 1, 1, 1) for a level each."""
        noise = level.sigma / level.alpha
        inside = (self.low < noise) & (noise <= self.high)
        if noise.ndim == 0:
            return self.weight if inside else 1.0
        return broadcast(torch.full_like(noise, self.weight).where(inside, 1.0), x_t)


@dataclass(frozen=True)
class Autoguided(_Guided):
    """Autoguidance (Karras et al. 2024): x0 = x0_weak + weight (x0_model - x0_weak), and eps alike.

    `weak` is a worse version of the model, given the same labels: smaller, or trained for less long.
    """

    weak: Predictor
    weight: float

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """The line through both predictions; variances are those of the model itself."""
        strong, weak = (each.predict(x_t, level, condition) for each in (self.model, self.weak))
        x0, eps = (_between(getattr(weak, name), getattr(strong, name), self.weight) for name in ("x0", "eps"))
        return replace(strong, x0=x0, eps=eps)


@dataclass(frozen=True)
class ClassifierGuided(_Guided):
    """Classifier guidance (Dhariwal & Nichol 2021, equation 14): eps = eps_model - sigma weight grad log p(y | x_t).

    x0 moves along, by sigma^2 / alpha weight grad log p(y | x_t), so it works with every sampler. An image without label
    (-1) is not guided.
    """

    classifier: NoisyClassifier
    weight: float

    @property
    def num_classes(self) -> int:
        """The classifier's classes: the model itself may have none."""
        return self.classifier.num_classes

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """One evaluation of the model, and one of the classifier with its gradient."""
        found, at = self.model.predict(x_t, level, condition), level.like(x_t)
        if condition is None:
            return found
        push = self.weight * at.sigma * log_prob_gradient(self.classifier, x_t, level, condition)
        push = torch.where(at.alpha > 0, push, 0.0)  # noise alone tells nothing of its label
        to_x0 = at.sigma / at.alpha.clamp(min=torch.finfo(push.dtype).tiny)
        return replace(found, x0=found.x0 + to_x0 * push, eps=found.eps - push)


@torch.inference_mode(mode=False)
@torch.enable_grad()
def log_prob_gradient(classifier: NoisyClassifier, x_t: Tensor, level: Level, labels: Tensor) -> Tensor:
    """grad log p(y | x_t) with respect to x_t (B, C, H, W), for labels (B,); 0 where the label is -1.

    What was made in inference mode cannot take part in a gradient: x_t and the level are copied, samplers stay in that mode.
    """
    x = x_t.clone().requires_grad_()
    logits = classifier.noisy_logits(x, Level(*(v.clone() for v in vars(level).values())))
    chosen = logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.autograd.grad(torch.where(labels >= 0, chosen, 0.0).sum(), x)[0]


def _between(start: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """start + weight (end - start), which is `start` itself at 0 and `end` itself at 1."""
    return torch.lerp(start, end, weight)


def _first_half(value: V, n: int) -> V:
    """The conditional part of what was predicted for 2 n images together."""
    return value[:n] if isinstance(value, Tensor) and value.ndim and len(value) == 2 * n else value


def _std(x: Tensor) -> Tensor:
    """Standard deviation of each image, shaped to divide images; above 0."""
    return x.std(dim=tuple(range(1, x.ndim)), correction=0, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


# --- components


class Guidance(Component, kind="guidance"):
    """How predictions are steered."""

    @abstractmethod
    def wrap(self, model: GaussianDiffusion, second: SecondModels) -> Drawable:
        """The guided model. Raises ConfigError where it cannot be, and what reading a second model raises."""

    @classmethod
    def parse(cls, spec: "str | float | Self") -> Self:
        """From the written form; a number, or one as text, is the weight of classifier-free guidance. Raises ConfigError."""
        weight = _number(spec)
        if weight is None:
            return super().parse(cast("str | Self", spec))
        if not 0 <= weight < math.inf:
            raise ConfigError(f"--guidance={spec} is wrong: it must be a finite number of at least 0, or a spec.")
        return super().parse(f"cfg:weight={weight!r}")

    @property
    def by_label(self) -> bool:
        """Whether it does nothing without labels."""
        return True

    @property
    def written(self) -> float | str:
        """As recipes hold it: the spec, or the weight alone where that is all."""
        return self.spec


def shown(written: float | str) -> str:
    """`written` for a sentence."""
    return written if isinstance(written, str) else f"{written:g}"


def _number(spec: object) -> float | None:
    if isinstance(spec, Real) and not isinstance(spec, bool):
        return float(spec)
    try:
        return float(spec) if isinstance(spec, str) else None
    except ValueError:
        return None


@register("cfg")
class CFG(Guidance):
    """Classifier-free: away from the prediction without label; on noise levels sigma / alpha in (low, high] alone."""

    weight: Weight = 2.0
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    low: Annotated[float, Field(ge=0)] = 0.0
    high: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high is not None and self.high <= self.low:
            raise ConfigError(f"guidance 'cfg': high={self.high:g} is wrong: it must be above low={self.low:g}.")

    def wrap(self, model: GaussianDiffusion, second: SecondModels) -> Drawable:
        if self.weight == 1.0:
            return model
        if not model.num_classes:
            raise ConfigError(
                f"--guidance={shown(self.written)}: this model was trained without classes, so there is nothing to guide by."
            )
        if not model.label_drop:
            raise ConfigError(
                "--guidance: this model was trained with --diffusion.label-drop=0, so it cannot draw without a label."
            )
        return ClassifierFree(model, self.weight, self.rescale, self.low, math.inf if self.high is None else self.high)

    @property
    def by_label(self) -> bool:
        return self.weight != 1.0

    @property
    def written(self) -> float | str:
        return self.weight if self == CFG(weight=self.weight) else self.spec


@register("autoguidance")
class Autoguidance(Guidance):
    """Away from a worse version of the model: a run or checkpoint folder, such as an earlier one of the same run.

    ema: which of its moving averages, `none` the weights themselves, `first` as sampling from it would choose.
    """

    model: str
    weight: Weight = 2.0
    ema: str = "first"

    def wrap(self, model: GaussianDiffusion, second: SecondModels) -> Drawable:
        weak = second.diffusion(self.model, None if self.ema == "first" else self.ema)
        for what, theirs, ours in (
            ("image size", _size(weak.shape), _size(model.shape)),
            ("schedule", weak.schedule.spec, model.schedule.spec),
            ("number of classes", weak.num_classes or model.num_classes, model.num_classes),
        ):  # one without classes guides as the unconditional half of classifier-free guidance does
            if theirs != ours:
                raise ConfigError(
                    f"--guidance autoguidance: the {what} of {self.model} is {theirs}, that of the model {ours}; "
                    "choose an earlier or smaller one of its kind."
                )
        return Autoguided(model, weak, self.weight)

    @property
    def by_label(self) -> bool:
        return False


@register("classifier")
class ClassifierGuidance(Guidance):
    """Along the gradient of a noisy classifier: a file of `ddpm features train --noisy`, or package.module:Class.

    What is so guided is the model with guidance `base`: 1 the conditional model, 0 the unconditional one, or any other.
    """

    model: str
    weight: Weight = 1.0
    base: Guidance = CFG(weight=1.0)

    def wrap(self, model: GaussianDiffusion, second: SecondModels) -> Drawable:
        base, classifier = self.base.wrap(model, second), second.classifier(self.model)
        self._try(classifier, model, second.device)
        if model.num_classes not in (0, classifier.num_classes):
            raise ConfigError(
                f"--guidance classifier: {self.model} knows {classifier.num_classes} classes, the model "
                f"{model.num_classes}; choose a classifier of the same classes."
            )
        return ClassifierGuided(base, classifier, self.weight)

    def _try(self, classifier: NoisyClassifier, model: GaussianDiffusion, device: torch.device) -> None:
        """Ask for one gradient, so that what does not fit is told before any work."""
        x_t, label = torch.zeros(1, *model.shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        level = model.schedule.at(torch.tensor(model.schedule.first))
        try:
            shape, wanted = classifier.noisy_logits(x_t, level).shape, (1, classifier.num_classes)
            if shape != wanted:
                raise ValueError(f"its logits are {_size(shape)}, not {_size(wanted)}")
            log_prob_gradient(classifier, x_t, level, label)
        except Exception as error:  # whatever outside code raises
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
            raise ConfigError(
                f"--guidance classifier: {self.model} has no gradient for an image of {_size(model.shape)} ({problem})."
            ) from error


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
