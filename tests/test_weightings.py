"""Weightings: one meaning for every objective, and the papers' formulas."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.models import GaussianDiffusion
from ddpm.objectives import Objective, eps_from_x0
from ddpm.randomness import Stream
from ddpm.schedules import Schedule
from ddpm.weightings import Weighting

SHAPE = (2, 3, 3)
OF_X0: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "snr": lambda snr: snr,
    "truncated-snr": lambda snr: np.maximum(snr, 1),
    "min-snr:gamma=3": lambda snr: np.minimum(snr, 3),
    "soft-min-snr:gamma=2": lambda snr: 1 / (1 / snr + 1 / 2),
    "p2:k=0.5,gamma=0.8": lambda snr: snr / (0.5 + snr) ** 0.8,
    "edm:sigma_data=0.4": lambda snr: (1 / snr + 0.16) / (0.16 / snr),
}
"""Weight of the squared error of x0 as the papers have it: edm with sigma^2 = 1 / SNR."""


class Same(nn.Module):
    """Of any objective, a network that says the same of an image: x0 is 0.3 tanh(x)."""

    def __init__(self, objective: Objective, schedule: Schedule) -> None:
        super().__init__()
        self.objective, self.schedule = objective, schedule

    def forward(self, x: Tensor, noise_label: Tensor, condition: Tensor | None = None, stream: Any = None) -> Tensor:
        level = self.schedule.at(noise_label.double())
        x0 = 0.3 * torch.tanh(x)
        return self.objective.target(x0, eps_from_x0(x0, x, level), x, level, self.schedule)


def losses(weighting: str, objective: str, schedule: Schedule, n: int = 64) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Of the same images: the weighted losses, the mean squared errors of x0, and the signal-to-noise ratios."""
    parsed = Objective.parse(objective)
    model = GaussianDiffusion(Same(parsed, schedule), schedule, parsed, shape=SHAPE, weighting=weighting)
    stream = Stream(3, torch.arange(n), step=1)
    x0 = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    found = model(x0, None, stream)
    level = schedule.at(schedule.draw(stream.at("time").uniform()))
    x_t = model.q_sample(x0, level, stream.at("noise").normal(*SHAPE).double())
    error = (x0 - 0.3 * torch.tanh(x_t)).square().flatten(1).mean(1)
    return found, error.numpy(), (level.alpha**2 / level.sigma**2).numpy()


@pytest.mark.parametrize("weighting", OF_X0)
def test_a_weighting_means_the_same_for_every_objective(weighting: str, exactness: Any) -> None:
    schedule = Schedule.parse(
        "cosine:timesteps=20"
    )  # in float32 the step before tells little of x0 where there are many
    for objective in ("eps", "x0", "v", "xprev"):
        found, error, snr = losses(weighting, objective, schedule)
        difference = np.abs(found.numpy() / (OF_X0[weighting](snr) * error) - 1).max()
        name = weighting.partition(":")[0]
        exactness(f"weighting {name}", f"the paper's weight of x0, {objective}", "exact", difference, 1e-5)


def test_every_weighting_is_tested() -> None:
    assert {spec.partition(":")[0] for spec in OF_X0} | {"uniform"} == set(Weighting.names())


def test_uniform_is_the_error_itself() -> None:
    schedule = Schedule.parse("linear")
    for objective in ("eps", "x0", "v"):
        found, error, snr = losses("uniform", objective, schedule)
        factor = {"eps": snr, "x0": np.ones_like(snr), "v": snr + 1}[objective]
        np.testing.assert_allclose(found.numpy(), factor * error, rtol=1e-5)
    assert Weighting.parse("uniform").of(Objective.parse("eps"), schedule.at(torch.tensor([1.0])), schedule) is None


@pytest.mark.parametrize("spec", ["linear", "cosine", "edm", "ve"])
@pytest.mark.parametrize("name", Objective.names())
def test_the_factor_of_x0_is_that_of_the_errors(name: str, spec: str) -> None:
    """Two outputs a unit apart say x0 that are so far apart; for one level and for many."""
    schedule, objective = Schedule.parse(spec), Objective.parse(name)
    t = torch.tensor([0.0, 1.0, 400.0, 999.0])
    if name == "xprev" and spec in ("edm", "ve"):
        return
    level = schedule.at(t)
    x_t = torch.full((4, 1, 1, 1), 0.7, dtype=torch.float64)
    far, near = (objective.to_prediction(x_t * c, x_t, level, schedule).x0 for c in (3.0, 1.0))
    expected = ((far - near) / 1.4).square().flatten()
    found = objective.x0_factor(level, schedule)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(objective.x0_factor(schedule.at(t[2]), schedule), found[2], rtol=1e-12, atol=0)
