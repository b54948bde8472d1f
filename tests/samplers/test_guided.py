"""Guidance on data whose classes are mixtures of Gaussians: every guided field, and what is sampled by it, is known."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ddpm.guidance import Autoguided, ClassifierFree, ClassifierGuided
from ddpm.models import NO_LABEL
from ddpm.objectives import Prediction
from ddpm.samplers import Sampler, Thresholding
from ddpm.schedules import Level, Schedule
from tests.samplers.known import Mixture, mixture, noises
from tests.samplers.known import scores as deviation

CLASSES = ((0, 2), (1,))
"""Components of the three of `mixture` that make up each class."""
N = 40
LABELS = torch.arange(N) % 2


@dataclass
class Labelled:
    """The exact denoiser of a class, or of all data without a label, and the exact classifier of noisy points."""

    whole: Mixture

    @property
    def schedule(self) -> Schedule:
        return self.whole.schedule

    num_classes = len(CLASSES)

    def part(self, label: int) -> Mixture:
        """The mixture of one class; of all for no label."""
        if label == NO_LABEL:
            return self.whole
        rows = list(CLASSES[label])
        weights = self.whole.weights[rows]
        return replace(
            self.whole,
            weights=weights / weights.sum(),
            means=self.whole.means[rows],
            covariances=self.whole.covariances[rows],
        )

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        if condition is None:
            return self.whole.predict(x_t, level)
        of_label = [self.part(k).predict(x_t, level) for k in (NO_LABEL, 0, 1)]
        x0, eps = (
            torch.stack([getattr(found, name) for found in of_label])[condition + 1, torch.arange(len(x_t))]
            for name in ("x0", "eps")
        )
        return Prediction(x0, eps)

    def noisy_logits(self, x_t: Tensor, level: Level) -> Tensor:
        weights = [self.whole.weights[list(rows)].sum() for rows in CLASSES]
        return torch.stack([w.log() + log_density(self.part(k), x_t, level) for k, w in enumerate(weights)], dim=1)


@dataclass
class Unlabelled:
    """The exact denoiser of all data, which knows no labels."""

    whole: Mixture
    num_classes = 0

    @property
    def schedule(self) -> Schedule:
        return self.whole.schedule

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        return self.whole.predict(x_t, level)


MODELS = [Labelled(mixture(schedule)) for schedule in ("linear", "cosine", "edm", "jsd")]
"""The last has no signal at its noisiest level."""


def log_density(data: Mixture, x_t: Tensor, level: Level) -> Tensor:
    """log p(x_t) of noisy points (B, 1, 1, d), by torch.distributions."""
    covariances = level.alpha**2 * data.covariances + level.sigma**2 * torch.eye(2, dtype=torch.float64)
    parts = MultivariateNormal(level.alpha * data.means, covariances)
    return MixtureSameFamily(Categorical(data.weights), parts).log_prob(x_t.flatten(1))


def score(data: Mixture, x_t: Tensor, level: Level) -> Tensor:
    """grad log p(x_t), by automatic differentiation: no denoiser takes part."""
    x = x_t.clone().requires_grad_()
    return torch.autograd.grad(log_density(data, x, level).sum(), x)[0]


def scores(model: Labelled, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Of each point's class, and of all data."""
    of_class = torch.stack([score(model.part(k), x_t, level) for k in range(2)])
    return of_class[LABELS, torch.arange(len(x_t))], score(model.whole, x_t, level)


def levels(schedule: Schedule) -> list[Level]:
    times = torch.linspace(schedule.last, schedule.first, 9, dtype=torch.float64)
    return [schedule.at(t) for t in times]


def noisy(model: Labelled, level: Level) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x0 = model.whole.draw(N, generator)
    return level.alpha * x0 + level.sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


Field = Callable[[Labelled, Tensor, Level], Tensor]


def largest(guide: Callable[[Labelled], Any], expected: Field) -> float:
    """Largest difference of eps from -sigma times the expected score, over schedules and levels; x0 must agree with eps."""
    found = 0.0
    for model in MODELS:
        guided = guide(model)
        for level in levels(model.schedule):
            x_t = noisy(model, level)
            prediction = guided.predict(x_t, level, LABELS)
            consistent(prediction, x_t, level)
            found = max(found, float((prediction.eps + level.sigma * expected(model, x_t, level)).abs().max()))
    return found


def consistent(prediction: Prediction, x_t: Tensor, level: Level) -> None:
    again = level.alpha * prediction.x0 + level.sigma * prediction.eps
    torch.testing.assert_close(again, x_t, rtol=1e-12, atol=1e-12)


def tilted(weight: float) -> Field:
    """s_none + weight (s_label - s_none) = grad log p(x) + weight grad log p(y | x)."""

    def field(model: Labelled, x_t: Tensor, level: Level) -> Tensor:
        of_class, of_all = scores(model, x_t, level)
        return of_class if weight == 1.0 else of_all + weight * (of_class - of_all)

    return field


def worse(model: Labelled) -> Labelled:
    """A blurred version of the model."""
    return Labelled(replace(model.whole, covariances=model.whole.covariances + 0.3 * torch.eye(2, dtype=torch.float64)))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_classifier_free_guidance_is_its_formula_at_every_level(weight: float, exactness: Any) -> None:
    """Ho & Salimans (2022), equation 6, in scores."""
    difference = largest(lambda model: ClassifierFree(model, weight), tilted(weight))
    exactness("guidance cfg", f"scores of a mixture with classes, weight {weight:g}", "exact", difference, 1e-9)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_classifier_guidance_is_its_formula_at_every_level(weight: float, exactness: Any) -> None:
    """At weight 1 on the unconditional model this is the exact conditional field, by Bayes' rule."""
    difference = largest(lambda model: ClassifierGuided(Unlabelled(model.whole), model, weight), tilted(weight))
    exactness("guidance classifier", f"scores of a mixture with classes, weight {weight:g}", "exact", difference, 1e-9)


def test_a_classifier_adds_to_classifier_free_guidance(exactness: Any) -> None:
    """Both push along grad log p(y | x_t)."""
    difference = largest(lambda model: ClassifierGuided(ClassifierFree(model, 2.0), model, 0.5), tilted(2.5))
    exactness("guidance classifier", "on top of guidance cfg, on a mixture with classes", "exact", difference, 1e-9)


def test_autoguidance_is_its_formula_at_every_level(exactness: Any) -> None:
    def expected(model: Labelled, x_t: Tensor, level: Level) -> Tensor:
        return 1.7 * scores(model, x_t, level)[0] - 0.7 * scores(worse(model), x_t, level)[0]

    difference = largest(lambda model: Autoguided(model, worse(model), 1.7), expected)
    exactness("guidance autoguidance", "scores of two mixtures with classes", "exact", difference, 1e-9)


def test_an_image_without_label_is_not_guided() -> None:
    for model in MODELS:
        level = levels(model.schedule)[4]
        x_t, labels = noisy(model, level), torch.where(torch.arange(N) < 5, NO_LABEL, LABELS)
        found, plain = (each.predict(x_t, level, labels) for each in (ClassifierGuided(model, model, 2.0), model))
        assert torch.equal(found.x0[:5], plain.x0[:5])
        assert not torch.isclose(found.x0[5:], plain.x0[5:]).any()


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_has_the_deviation_of_the_conditional(rescale: float, exactness: Any) -> None:
    """Lin et al. (2024), section 3.4."""
    difference = 0.0
    for model in MODELS:
        for level in levels(model.schedule):
            x_t = noisy(model, level)
            plain, found = (ClassifierFree(model, 3.0, share).predict(x_t, level, LABELS) for share in (0.0, rescale))
            conditional = model.predict(x_t, level, LABELS).x0
            expected = rescale_noise_cfg(plain.x0, conditional, rescale)
            difference = max(difference, float(((found.x0 - expected).abs() / expected.abs().max()).max()))
            consistent(found, x_t, level)
            if rescale == 1.0:
                torch.testing.assert_close(found.x0.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-9, atol=0)
    exactness("guidance cfg, rescaled", f"diffusers rescale_noise_cfg of x0, {rescale:g}", "exact", difference, 1e-12)


def test_an_interval_of_noise_levels_is_guided_alone(exactness: Any) -> None:
    """Kynkaanniemi et al. (2024): sigma / alpha in (low, high]."""
    difference = 0.0
    for model in MODELS:
        middle = levels(model.schedule)[3:6]
        low, high = (float(level.sigma / level.alpha) for level in (middle[0], middle[-1]))
        limited, plain = ClassifierFree(model, 2.0, 0.5, low, high), ClassifierFree(model, 2.0, 0.5)
        inside = [low < float(level.sigma / level.alpha) <= high for level in levels(model.schedule)]
        assert sum(inside) == 2
        for level, guided in zip(levels(model.schedule), inside, strict=True):
            x_t = noisy(model, level)
            found, expected = (each.predict(x_t, level, LABELS) for each in (limited, plain if guided else model))
            difference = max(difference, float((found.eps - expected.eps).abs().max()))
    exactness("guidance cfg, interval", "the unguided field outside, the guided inside", "exact", difference, 0.0)


def test_the_formulas_are_those_of_diffusers(exactness: Any) -> None:
    free = ClassifierFreeGuidance(guidance_scale=2.5)
    auto = AutoGuidance(guidance_scale=2.5, auto_guidance_layers=["a layer"], dropout=0.1)
    differences = [0.0, 0.0]
    for model in MODELS:
        for level in levels(model.schedule):
            x_t = noisy(model, level)
            label, none = (model.predict(x_t, level, labels).eps for labels in (LABELS, None))
            weak = worse(model).predict(x_t, level, LABELS).eps
            theirs = free.forward(label, none).pred, auto.forward(label, weak).pred
            for k, ours in enumerate((ClassifierFree(model, 2.5), Autoguided(model, worse(model), 2.5))):
                off = (ours.predict(x_t, level, LABELS).eps - theirs[k]).abs().max()
                differences[k] = max(differences[k], float(off))
    exactness("guidance cfg", "diffusers ClassifierFreeGuidance", "exact", differences[0], 1e-12)
    exactness("guidance autoguidance", "diffusers AutoGuidance", "exact", differences[1], 1e-12)


@pytest.mark.parametrize("how", ["cfg", "classifier"])
def test_sampling_at_weight_1_reaches_mean_and_covariance_of_the_class(how: str, exactness: Any) -> None:
    model, label, n = Labelled(mixture("linear:timesteps=500,scaled=true")), 0, 1000
    wanted = model.part(label)
    guided = (
        ClassifierGuided(Unlabelled(model.whole), model, 1.0) if how == "classifier" else ClassifierFree(model, 1.0)
    )
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64)
    found = Sampler.parse("ddpm:variance=fixed-small").sample(
        guided,
        start,
        torch.full((n,), label),
        noises(start.shape),
        Thresholding.parse("none"),
    )
    mean, covariance = wanted.moments()
    z = deviation(found.flatten(1), mean, covariance)
    exactness(f"guidance {how}", "mean and covariance of the class", "statistical", z, 4)


@pytest.mark.parametrize("sampler", Sampler.names())
def test_every_sampler_takes_every_guidance(sampler: str) -> None:
    """Also the gradient of a classifier, within the inference mode of the loop."""
    model = Labelled(mixture("linear"))
    weak = Labelled(replace(model.whole, means=model.whole.means * 0.5))
    start = torch.randn(N, 1, 1, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for guided in (
        ClassifierFree(model, 1.5, 0.5, 0.1, 5.0),
        Autoguided(model, weak, 1.5),
        ClassifierGuided(model, model, 0.5),
    ):
        found = Sampler.parse(f"{sampler}:steps=20").sample(guided, start, LABELS, lambda i: start.flip(0))
        assert found.isfinite().all()
        right = model.noisy_logits(found, model.schedule.at(torch.tensor(0.0))).argmax(1) == LABELS
        assert right.float().mean() > 0.9
