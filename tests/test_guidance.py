"""Guidance: lines through two predictions, gradients of classifiers, and what is refused when a model is wrapped."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import ConfigError
from ddpm.guidance import CFG, Autoguided, ClassifierFree, ClassifierGuided, Guidance, log_prob_gradient
from ddpm.models import NO_LABEL, GaussianDiffusion, build_diffusion
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.schedules import Level, Schedule


@dataclass
class Labelled:
    """Predicts x0 from the label; its calls are counted. The variance fraction is a tensor where asked."""

    schedule: Schedule
    tensor_fraction: bool = False
    calls: int = 0

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        assert condition is not None
        self.calls += 1
        x0 = torch.tanh(x_t + condition.reshape(-1, 1, 1, 1) / 3.0)
        fraction = x_t.sigmoid() * (condition.reshape(-1, 1, 1, 1) + 2) / 20 if self.tensor_fraction else 0.25
        return Prediction(x0, eps_from_x0(x0, x_t, level), fraction)


SCHEDULE = Schedule.parse("linear")
X = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 2])
LEVELS = [SCHEDULE.at(torch.tensor(400.0)), SCHEDULE.at(torch.tensor([0.0, 10.0, 500.0, 999.0]))]


def predictions(level: Level) -> tuple[Prediction, Prediction]:
    model = Labelled(SCHEDULE)
    return model.predict(X, level, LABELS), model.predict(X, level, torch.full_like(LABELS, NO_LABEL))


@pytest.mark.parametrize("level", LEVELS, ids=["one level", "a level each"])
def test_weight_1_is_the_conditional_model_and_0_the_unconditional(level: Level) -> None:
    conditional, none = predictions(level)
    for weight, expected in ((1.0, conditional), (0.0, none)):
        found = ClassifierFree(Labelled(SCHEDULE), weight).predict(X, level, LABELS)
        assert torch.equal(found.x0, expected.x0)
        assert torch.equal(found.eps, expected.eps)


@pytest.mark.parametrize("level", LEVELS, ids=["one level", "a level each"])
@pytest.mark.parametrize("weight", [0.3, 2.0, 7.5])
def test_other_weights_follow_the_formula(level: Level, weight: float) -> None:
    """Ho & Salimans (2022), equation 6: (1 + w) eps_label - w eps_none with w = weight - 1."""
    conditional, none = predictions(level)
    found = ClassifierFree(Labelled(SCHEDULE), weight).predict(X, level, LABELS)
    w = weight - 1
    torch.testing.assert_close(found.eps, (1 + w) * conditional.eps - w * none.eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.x0, (1 + w) * conditional.x0 - w * none.x0, rtol=0, atol=1e-12)
    at = level.like(X)
    torch.testing.assert_close(at.alpha * found.x0 + at.sigma * found.eps, X, rtol=0, atol=1e-12)


def test_the_variance_is_that_of_the_conditional_model() -> None:
    level = LEVELS[0]
    assert ClassifierFree(Labelled(SCHEDULE), 2.0).predict(X, level, LABELS).variance_fraction == 0.25
    found = ClassifierFree(Labelled(SCHEDULE, tensor_fraction=True), 2.0).predict(X, level, LABELS)
    expected = Labelled(SCHEDULE, tensor_fraction=True).predict(X, level, LABELS).variance_fraction
    assert isinstance(found.variance_fraction, Tensor)
    assert torch.equal(found.variance_fraction, expected)


def test_one_call_serves_both_and_no_label_stays_no_label() -> None:
    model = Labelled(SCHEDULE)
    guided = ClassifierFree(model, 5.0)
    labels = torch.full((4,), NO_LABEL)
    found = guided.predict(X, LEVELS[0], labels)
    assert model.calls == 1
    torch.testing.assert_close(found.x0, model.predict(X, LEVELS[0], labels).x0, rtol=0, atol=1e-12)
    assert guided.schedule is SCHEDULE


def test_guidance_can_be_guided_again() -> None:
    """A predictor is a predictor: weights of nested guidance multiply."""
    twice = ClassifierFree(ClassifierFree(Labelled(SCHEDULE), 2.0), 1.5)
    once = ClassifierFree(Labelled(SCHEDULE), 3.0)
    level = LEVELS[1]
    torch.testing.assert_close(
        twice.predict(X, level, LABELS).x0, once.predict(X, level, LABELS).x0, rtol=0, atol=1e-12
    )


# --- intervals and batches of levels


@pytest.mark.parametrize(("weight", "calls"), [(3.0, [4, 8, 8, 4]), (0.0, [4, 4, 4, 4])])
def test_outside_the_interval_only_the_conditional_half_is_evaluated(weight: float, calls: list[int]) -> None:
    @dataclass
    class Counted(Labelled):
        def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
            rows.append(len(x_t))
            return super().predict(x_t, level, condition)

    rows: list[int] = []
    levels = [SCHEDULE.at(torch.tensor(t)) for t in (900.0, 500.0, 200.0, 50.0)]
    noises = [float(level.sigma / level.alpha) for level in levels]
    guided = ClassifierFree(Counted(SCHEDULE), weight, low=noises[3], high=noises[1])
    found = [guided.predict(X, level, LABELS).x0 for level in levels]
    assert rows == calls
    plain, all_along = Labelled(SCHEDULE), ClassifierFree(Labelled(SCHEDULE), weight)
    for x0, level, model in zip(found, levels, (plain, all_along, all_along, plain), strict=True):
        assert torch.equal(x0, model.predict(X, level, LABELS).x0)


def test_of_a_batch_with_a_level_each_those_inside_are_guided() -> None:
    level = LEVELS[1]
    noise = level.sigma / level.alpha
    guided = ClassifierFree(Labelled(SCHEDULE), 2.5, 0.4, float(noise[1]), float(noise[2]))
    found, plain = (model.predict(X, level, LABELS) for model in (guided, Labelled(SCHEDULE)))
    inside = ClassifierFree(Labelled(SCHEDULE), 2.5, 0.4).predict(X, level, LABELS)
    assert torch.equal(found.x0[2], inside.x0[2])
    torch.testing.assert_close(found.x0[[0, 1, 3]], plain.x0[[0, 1, 3]], rtol=1e-14, atol=0)
    assert not torch.isclose(found.x0[2], plain.x0[2]).any()


def test_a_flat_image_is_rescaled_to_no_nan() -> None:
    @dataclass
    class Flat(Labelled):
        def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
            return Prediction(torch.ones_like(x_t), eps_from_x0(torch.ones_like(x_t), x_t, level))

    assert ClassifierFree(Flat(SCHEDULE), 2.0, 0.5).predict(X, LEVELS[0], LABELS).x0.isfinite().all()


def test_without_labels_nothing_is_guided() -> None:
    @dataclass
    class Free(Labelled):
        def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
            return super().predict(x_t, level, torch.full((len(x_t),), NO_LABEL) if condition is None else condition)

    model = Free(SCHEDULE)
    expected = model.predict(X, LEVELS[0]).x0
    for guided in (ClassifierFree(model, 3.0), ClassifierGuided(model, Nets(3), 2.0), Autoguided(model, model, 2.0)):
        assert torch.equal(guided.predict(X, LEVELS[0]).x0, expected)


# --- components


def test_a_number_is_the_weight_of_classifier_free_guidance() -> None:
    for spec in (2, 2.0, "2", " 2.0 ", "cfg:weight=2", CFG(weight=2.0), np.float32(2)):
        assert Guidance.parse(spec) == CFG(weight=2.0)
        assert Guidance.parse(spec).written == 2.0
    limited = Guidance.parse("cfg:weight=2,rescale=0.7,low=0.2,high=0.8")
    assert limited == CFG(weight=2.0, rescale=0.7, low=0.2, high=0.8)
    assert limited.written == limited.spec == "cfg:weight=2.0,rescale=0.7,low=0.2,high=0.8"


@pytest.mark.parametrize("spec", ["autoguidance:model=runs/a b/c-1", "classifier:model=parts:Net,base=cfg(weight=3)"])
def test_second_models_are_written_and_read_back(spec: str) -> None:
    built = Guidance.parse(spec)
    assert Guidance.parse(built.spec) == built
    assert built.written == built.spec
    assert str(built) == built.spec


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (-1, "--guidance=-1 is wrong: it must be a finite number of at least 0"),
        ("nan", "--guidance=nan is wrong"),
        (math.inf, "--guidance=inf is wrong"),
        (True, "found True"),
        (None, "found None"),
        ("cgf", "did you mean 'cfg'?"),
        ("cfg:weight=-2", "weight=-2 is wrong"),
        ("cfg:rescale=1.5", "rescale=1.5 is wrong"),
        ("cfg:low=2,high=1", "high=1 is wrong: it must be above low=2"),
        ("autoguidance", "guidance 'autoguidance' needs model=...; its options: model, weight, ema."),
        ("autoguidance:model=a,weight=-1", "weight=-1 is wrong"),
        ("classifier:weight=2", "guidance 'classifier' needs model=..."),
        ("classifier:model=a,weight=nan", "weight=nan is wrong"),
    ],
)
def test_mistakes_are_told_in_a_sentence(spec: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        Guidance.parse(spec)


class Nets(nn.Module):
    """A noisy classifier whose logits are a linear layer of the image."""

    def __init__(self, num_classes: int, size: int = 6) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layer = nn.Linear(size, num_classes, dtype=torch.float64)

    def noisy_logits(self, x_t: Tensor, level: Level) -> Tensor:
        return self.layer(x_t.flatten(1).double())


@dataclass
class Given:
    """Second models that were made beforehand."""

    model: GaussianDiffusion | None = None
    net: Any = None
    device = torch.device("cpu")

    def diffusion(self, source: str, ema: str | None) -> Any:
        return self.model

    def classifier(self, source: str) -> Any:
        return self.net


def diffusion(classes: int = 3, shape: tuple[int, int, int] = (1, 2, 3), **fields: Any) -> GaussianDiffusion:
    network = ModelConfig(
        channels=8,
        channel_mults=(1,),
        blocks=1,
        attention=(),
        conditioning="global" if classes else "none",
        norm_groups=2,
    )
    return build_diffusion(network, DiffusionConfig(**fields), shape, classes).eval()


def test_weight_1_is_the_model_itself() -> None:
    model = diffusion()
    assert Guidance.parse(1).wrap(model, Given()) is model
    bare = diffusion(0)
    assert Guidance.parse("cfg:weight=1,rescale=0.5").wrap(bare, Given()) is bare


def test_a_model_without_classes_takes_those_of_its_classifier() -> None:
    guided = Guidance.parse("classifier:model=x,weight=2").wrap(diffusion(0), Given(net=Nets(5)))
    assert guided == ClassifierGuided(guided.model, guided.classifier, 2.0)
    assert guided.num_classes == 5
    both = Guidance.parse("classifier:model=x,base=0").wrap(diffusion(), Given(net=Nets(3)))
    assert isinstance(both.model, ClassifierFree)
    assert both.model.weight == 0.0


def test_one_without_classes_may_guide_one_with_classes() -> None:
    """As a network of its own for the unconditional half of classifier-free guidance."""
    model, bare = diffusion(), diffusion(0)
    guided = Guidance.parse("autoguidance:model=x,weight=3").wrap(model, Given(bare))
    x, labels = X[:, :, :, :3].float(), LABELS % 3
    found, label, none = (each.predict(x, LEVELS[0], labels).eps for each in (guided, model, bare))
    torch.testing.assert_close(found, none + 3 * (label - none))


class NoGradient(Nets):
    def noisy_logits(self, x_t: Tensor, level: Level) -> Tensor:
        return super().noisy_logits(x_t, level).detach()


@pytest.mark.parametrize(
    ("spec", "model", "second", "said"),
    [
        (2, {"classes": 0}, {}, "--guidance=2: this model was trained without classes, so there is nothing to guide"),
        ("cfg:rescale=1", {"classes": 0}, {}, "--guidance=cfg:weight=2.0,rescale=1.0,"),
        (0, {"label_drop": 0.0}, {}, "--diffusion.label-drop=0, so it cannot draw without a label."),
        ("autoguidance:model=x", {}, {"model": {"shape": (1, 3, 3)}}, "the image size of x is 1x3x3, that of the model 1x2x3;"),
        ("autoguidance:model=x", {}, {"model": {"schedule": "cosine"}}, "the schedule of x is cosine:timesteps=1000"),
        ("autoguidance:model=x", {}, {"model": {"classes": 4}}, "the number of classes of x is 4, that of the model 3;"),
        ("autoguidance:model=x", {"classes": 0}, {"model": {}}, "the number of classes of x is 3, that of the model 0;"),
        ("classifier:model=x", {}, {"net": Nets(4)}, "x knows 4 classes, the model 3; choose"),
        ("classifier:model=x", {}, {"net": Nets(3, size=7)}, "x has no gradient for an image of 1x2x3 (RuntimeError: mat1"),
        ("classifier:model=x", {}, {"net": NoGradient(3)}, "x has no gradient for an image of 1x2x3 (RuntimeError: element 0"),
        ("classifier:model=x", {}, {"net": nn.Linear(6, 3)}, "(AttributeError: 'Linear' object has no attribute 'noisy_logits')."),
        ("classifier:model=x,base=2", {"classes": 0}, {"net": Nets(4)}, "--guidance=2: this model was trained without"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_when_wrapped(
    spec: Any, model: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    given = Given(diffusion(**second["model"]) if "model" in second else None, second.get("net"))
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        Guidance.parse(spec).wrap(diffusion(**model), given)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_gradient_is_had_in_inference_mode_and_leaves_no_trace() -> None:
    """grad log softmax of linear logits is W_y - sum_k p_k W_k."""
    net = Nets(3)
    with torch.inference_mode():
        level = SCHEDULE.at(torch.tensor(400.0))
        found = log_prob_gradient(net, X.clone(), level, LABELS % 3)
    share = net.noisy_logits(X, level).softmax(1)
    expected = net.layer.weight[LABELS % 3] - share @ net.layer.weight
    torch.testing.assert_close(found.flatten(1), expected.detach(), rtol=1e-12, atol=1e-15)
    assert not found.requires_grad
    assert net.layer.weight.grad is None
