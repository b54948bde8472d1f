"""Variances: exact between neighbours, right between any two levels where the data's own is known in closed form."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.errors import CheckpointError, ConfigError
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.schedules import DiscreteSchedule, Level, Schedule
from ddpm.variances import Variance

SCHEDULES = ["linear", "cosine:timesteps=4000"]
PAIRS = [(1, 0), (2, 0), (40, 12), (500, 499), (700, 20), (999, 998), (999, 0)]


def table(spec: str) -> DiscreteSchedule:
    found = Schedule.parse(spec)
    assert isinstance(found, DiscreteSchedule)
    return found


def prediction(x: Tensor, level: Level) -> Prediction:
    return Prediction(x / 2, eps_from_x0(x / 2, x, level))


def of_gaussian(level: Level, previous: Level, variance: float) -> Tensor:
    """Var(x_s | x_t) where pixels of x0 are N(0, variance), from the joint normal distribution of x_s and x_t."""
    ratio = level.alpha / previous.alpha
    of_s = previous.alpha**2 * variance + previous.sigma**2
    of_t = level.alpha**2 * variance + level.sigma**2
    return of_s - (ratio * of_s) ** 2 / of_t


@pytest.mark.parametrize("spec", SCHEDULES)
def test_a_learned_log_variance_is_that_of_neighbours(spec: str, exactness: Any) -> None:
    """For every timestep, the step to the clean image with its decoder too; above beta, between, and far below beta-tilde."""
    schedule = table(spec)
    t = torch.arange(schedule.timesteps, dtype=torch.float64)
    level, previous = schedule.at(t), schedule.at(t - 1)
    x = torch.zeros(len(t), 1, 1, 4, dtype=torch.float64)
    small = torch.from_numpy(np.log(np.maximum(1e-12, schedule.betas.numpy()))).reshape(-1, 1, 1, 1)
    values = small + torch.tensor([5.0, 0.0, -0.01, -8.0], dtype=torch.float64)
    found = Variance.parse("learned").attach(prediction(x, level), values, level, schedule)
    difference = (found.log_variance(level, previous, floor=schedule.floor_variance) - values).abs().max()
    exactness("variance learned, neighbours", f"what the network says, {spec.split(':')[0]}", "exact", difference, 1e-9)


def test_a_learned_variance_holds_between_any_two_levels(exactness: Any) -> None:
    """What the network says of neighbours is the variance of Gaussian data; then so is what follows for other pairs."""
    schedule, variance, worst = table("linear"), 0.3, 0.0
    for t, s in PAIRS:
        level, next_lower, previous = (schedule.at(torch.tensor(float(i))) for i in (t, t - 1, s))
        x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
        values = of_gaussian(level, next_lower, variance).log().expand_as(x)
        found = Variance.parse("learned").attach(prediction(x, level), values, level, schedule)
        expected = of_gaussian(level, previous, variance).log()
        worst = max(worst, float((found.log_variance(level, previous) - expected).abs().max()))
    exactness("variance learned, any levels", "Gaussian data in closed form", "exact", worst, 1e-6)


def test_a_learned_variance_below_what_data_can_have_stays_positive() -> None:
    schedule = table("linear")
    level = schedule.at(torch.tensor(999.0))
    x = torch.zeros(1, 1, 2, 2)
    found = Variance.parse("learned").attach(prediction(x, level), torch.full_like(x, -30.0), level, schedule)
    for s in (998.0, 500.0, 0.0):
        assert found.log_variance(level, schedule.at(torch.tensor(s))).isfinite().all()


@pytest.mark.parametrize("spec", SCHEDULES)
def test_a_learned_range_is_equation_15(spec: str, exactness: Any) -> None:
    """Nichol & Dhariwal (2021), with numpy's tables; the network's numbers may leave [-1, 1]."""
    schedule = table(spec)
    betas = schedule.betas.numpy()
    kept = np.cumprod(1 - betas)
    tilde = betas[1:] * (1 - kept[:-1]) / (1 - kept[1:])
    low, high = np.log(np.append(tilde[0], tilde)), np.log(betas)
    v = np.array([-1.5, -1.0, 0.25, 1.0])
    expected = (v + 1) / 2 * high[:, None] + (1 - v) / 2 * low[:, None]

    t = torch.arange(schedule.timesteps, dtype=torch.float64)
    level, x = schedule.at(t), torch.zeros(len(t), 1, 1, 4, dtype=torch.float64)
    values = torch.from_numpy(v).expand_as(x)
    found = Variance.parse("learned-range").attach(prediction(x, level), values, level, schedule)
    log_variance = found.log_variance(level, schedule.at(t - 1), floor=schedule.floor_variance)
    difference = np.abs(log_variance[:, 0, 0].numpy() - expected).max()
    exactness("variance learned-range", f"numpy tables of equation 15, {spec.split(':')[0]}", "exact", difference, 1e-9)


def test_fixed_variances_are_the_ends_of_the_range() -> None:
    schedule = table("linear")
    level, x = schedule.at(torch.tensor(5.0)), torch.zeros(1, 1, 2, 2)
    for name, fraction in (("fixed-large", 1.0), ("fixed-small", 0.0)):
        found = Variance.parse(name).attach(prediction(x, level), None, level, schedule)
        assert (found.variance_fraction, found.x0_variance) == (fraction, None)


def test_the_analytic_variance_is_the_best_for_gaussian_data(exactness: Any) -> None:
    """Their eps is known, sigma x_t / Var(x_t), so its mean square is; the variance of any step follows."""
    schedule, variance, worst = table("linear"), 0.3, 0.0
    every = schedule.at(torch.arange(1000, dtype=torch.float64))
    eps_square = every.sigma**2 / (every.alpha**2 * variance + every.sigma**2)
    for t, s in PAIRS:
        level, previous = schedule.at(torch.tensor(float(t))), schedule.at(torch.tensor(float(s)))
        x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
        found = Variance.parse("analytic").attach(prediction(x, level), eps_square, level, schedule)
        expected = of_gaussian(level, previous, variance).log()
        worst = max(worst, float((found.log_variance(level, previous) - expected).abs()))
    level = schedule.at(torch.tensor(0.0))
    found = Variance.parse("analytic").attach(prediction(x, level), eps_square, level, schedule)
    decoder = found.log_variance(level, schedule.clean, floor=schedule.floor_variance)
    expected = (level.sigma**2 * variance / (level.alpha**2 * variance + level.sigma**2)).log()
    worst = max(worst, float((decoder - expected).abs()))
    exactness("variance analytic", "Gaussian data in closed form", "exact", worst, 1e-9)

    several = schedule.at(torch.tensor([1.0, 700.0]))  # a level for each image
    found = Variance.parse("analytic").attach(prediction(x, several), eps_square, several, schedule)
    assert isinstance(found.x0_variance, Tensor) and found.x0_variance.shape == (2, 1, 1, 1)
    torch.testing.assert_close(
        found.x0_variance.flatten(), several.sigma**2 * variance / (several.alpha**2 * variance + several.sigma**2)
    )


def test_between_timesteps_the_estimate_is_interpolated_and_kept_to_what_pixels_can_have() -> None:
    schedule = table("linear:timesteps=4")
    values = torch.tensor([0.9, 0.7, 0.5, -80.0], dtype=torch.float64)
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)

    def of_x0(t: float, table_: Tensor = values) -> float:
        level = schedule.at(torch.tensor(t))
        found = Variance.parse("analytic").attach(prediction(x, level), table_, level, schedule).x0_variance
        return float(found) * float((level.alpha / level.sigma) ** 2)  # type: ignore[arg-type]

    assert of_x0(1.0) == pytest.approx(0.3)
    assert of_x0(1.25) == pytest.approx(0.35)
    level = schedule.at(torch.tensor(3.0))
    assert of_x0(3.0) == pytest.approx(float((level.alpha / level.sigma) ** 2))  # a variance of 1
    assert of_x0(0.0, values + 0.2) == 0.0  # a mean square above 1 is no variance


def test_without_an_estimate_only_what_needs_it_is_refused() -> None:
    schedule = table("linear")
    level, previous = schedule.at(torch.tensor(5.0)), schedule.at(torch.tensor(3.0))
    x, none = torch.zeros(1, 1, 2, 2), torch.full((1000,), torch.nan, dtype=torch.float64)
    found = Variance.parse("analytic").attach(prediction(x, level), none, level, schedule)
    assert torch.equal(found.x0, x / 2)
    with pytest.raises(
        CheckpointError, match=r"^these weights have no estimate of their variance yet .*fixed-small\.$"
    ):
        found.log_variance(level, previous)
    assert found.log_variance(level, previous, fraction=0.0).isfinite().all()


@pytest.mark.parametrize("name", ["learned", "analytic"])
def test_what_belongs_to_a_table_is_refused_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--diffusion.variance={name} needs a schedule of numbered steps.*'edm'"):
        Variance.parse(name).check(Schedule.parse("edm"))
    for other in ("fixed-large", "fixed-small", "learned-range"):
        Variance.parse(other).check(Schedule.parse("edm"))
