"""Classifier-free guidance: a line through the unconditional and the conditional prediction."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ddpm.guidance import ClassifierFree
from ddpm.models.diffusion import NO_LABEL
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
