"""Every sampler with every objective, variance and guidance: finite samples with the right mean, or a refusal by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.errors import ConfigError
from ddpm.guidance import ClassifierFree
from ddpm.models import NO_LABEL, GaussianDiffusion
from ddpm.objectives import Objective, Prediction
from ddpm.samplers import Sampler, Thresholding
from ddpm.schedules import Level, Schedule, posterior_variance, step_variance
from ddpm.variances import Variance
from tests.samplers.known import NONE, SAMPLERS, Mixture, mixture, noises, start, stepping

SCHEDULE_OF = {"edm": "edm"}  # other objectives: the linear table


class Exact(nn.Module):
    """A network that says exactly what its objective should: of a mixture, and of its components where labels are given.

    Where it has to give a variance too, that lies halfway between beta-tilde and beta.
    """

    def __init__(self, model: Mixture, objective: Objective, variance: str) -> None:
        super().__init__()
        self.model, self.objective, self.variance = model, objective, variance
        self.at: tuple[Tensor, Level] | None = None

    def forward(self, x: Tensor, noise_label: Tensor, condition: Tensor | None, stream: Any = None) -> Tensor:
        assert self.at is not None
        (x_t, level), model = self.at, self.model
        found = model.predict(x_t, level)
        if condition is not None:
            for k in range(len(model.weights)):
                of_class = component(model, k).predict(x_t, level)
                mine = (condition == k).reshape(-1, 1, 1, 1)
                found = Prediction(torch.where(mine, of_class.x0, found.x0), torch.where(mine, of_class.eps, found.eps))
        output = self.objective.target(found.x0, found.eps, x_t, level, model.schedule)
        if self.variance == "learned-range":
            return torch.cat([output, torch.zeros_like(output)], dim=1)
        if self.variance == "learned":
            previous = model.schedule.at(level.t.floor().clamp(min=1) - 1)
            halfway = (posterior_variance(level, previous) * step_variance(level, previous)).log() / 2
            return torch.cat([output, halfway.expand_as(output)], dim=1)
        return output


def component(model: Mixture, k: int) -> Mixture:
    one = slice(k, k + 1)
    return Mixture(model.schedule, torch.ones(1).double(), model.means[one], model.covariances[one])


@dataclass
class Told:
    """The diffusion model, whose network is told x and the level themselves (it sees them scaled and in float32 else)."""

    inner: GaussianDiffusion

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        self.inner.network.at = (x_t, level)
        return self.inner.predict(x_t, level, condition)


def predictor(objective: str, variance: str, classes: int = 0, schedule: str = "linear") -> tuple[Mixture, Told]:
    model, parsed = mixture(SCHEDULE_OF.get(objective, schedule)), Objective.parse(objective)
    label_drop = 0.1 if classes else 0.0
    inner = GaussianDiffusion(
        Exact(model, parsed, variance),
        model.schedule,
        parsed,
        shape=(1, 1, 2),
        variance=variance,
        num_classes=classes,
        label_drop=label_drop,
    )
    if variance == "analytic":
        inner.eps_square.copy_(eps_square(model))
    return model, Told(inner)


def eps_square(model: Mixture) -> Tensor:
    """E |eps|^2 / d of the exact prediction at every time of the table: drawn at some, interpolated between."""
    times = np.linspace(0, 999, 40).round()
    levels = [model.schedule.at(torch.tensor(t)) for t in times]
    drawn = [float(model.predict(start(model, 500, level), level).eps.square().mean()) for level in levels]
    return torch.from_numpy(np.interp(np.arange(1000), times, drawn))


def z_of_mean(found: Tensor, model: Mixture) -> float:
    """By the samples' own spread, which with few steps and a fixed variance is not the data's."""
    points, (mean, _) = found.flatten(1), model.moments()
    return float(((points.mean(0) - mean) / (points.var(0) / len(points)).sqrt()).abs().max())


def combinations() -> Iterator[tuple[str, str]]:
    """Every objective, and every variance with one of them: they do not meet."""
    yield from ((objective, "fixed-large") for objective in Objective.names())
    yield from (("eps", variance) for variance in Variance.names() if variance != "fixed-large")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_combination_is_finite_and_has_the_right_mean(sampler: str) -> None:
    built, n = Sampler.parse(stepping(sampler, 25)), 300
    for objective, variance in combinations():
        model, plain = predictor(objective, variance)
        path = built.path(model.schedule)
        x, noise = start(model, n), noises((n, 1, 1, 2), 5)
        found = built.walk(plain, x, path, None, noise, NONE)
        assert z_of_mean(found, model) < 4, (objective, variance)  # a NaN is not either


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid", ["trailing", "log-snr"])
def test_zero_terminal_snr(sampler: str, grid: str) -> None:
    """On a table that ends in noise alone, by objectives that do not divide by alpha."""
    built, n = Sampler.parse(f"{stepping(sampler, 25)},grid={grid}"), 300
    for objective, variance in [("v", "fixed-large"), ("x0", "fixed-small"), ("v", "learned"), ("v", "analytic")]:
        model, plain = predictor(objective, variance, schedule="zero-snr")
        if sampler.startswith("pndm") and grid == "log-snr":
            with pytest.raises(ConfigError, match="needs equal strides in time"):
                built.path(model.schedule)
            return
        x, noise = noises((n, 1, 1, 2))(3), noises((n, 1, 1, 2), 5)
        assert z_of_mean(built.sample(plain, x, None, noise, NONE), model) < 4, (objective, variance)


@pytest.mark.parametrize("variance", Variance.names())
@pytest.mark.parametrize("sampler", ["ddim:analytic=true", "ddim:eta=1,analytic=true"])
def test_analytic_ddim_takes_what_knows_var_x0_and_refuses_the_rest(sampler: str, variance: str) -> None:
    built, n = Sampler.parse(stepping(sampler, 25)), 300
    model, plain = predictor("eps", variance)
    x, noise = start(model, n), noises((n, 1, 1, 2), 5)
    if variance in ("learned", "analytic"):
        assert z_of_mean(built.walk(plain, x, built.path(model.schedule), None, noise, NONE), model) < 4
    else:
        with pytest.raises(
            ConfigError, match=r"^sampler ddim:analytic=true: this model knows no analytic variance; .*\.$"
        ):
            built.walk(plain, x, built.path(model.schedule), None, noise, NONE)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_samples_are_finite_and_at_weight_1_those_of_the_class(sampler: str) -> None:
    built, n = Sampler.parse(stepping(sampler, 25)), 200
    model, plain = predictor("v", "fixed-large", classes=3)
    x, noise = start(model, n), noises((n, 1, 1, 2), 6)
    for label in (1, NO_LABEL):
        expected = model if label == NO_LABEL else component(model, label)
        condition = torch.full((n,), label)
        found = built.walk(
            ClassifierFree(plain, 1.0), start(expected, n), built.path(model.schedule), condition, noise, NONE
        )
        assert z_of_mean(found, expected) < 4, label
    for weight, rule in ((3.0, "none"), (9.0, "clip"), (9.0, "dynamic:percentile=0.9")):
        guided = ClassifierFree(plain, weight)
        condition = torch.arange(n) % 3
        found = built.walk(guided, x, built.path(model.schedule), condition, noise, Thresholding.parse(rule))
        assert found.isfinite().all(), (weight, rule)
