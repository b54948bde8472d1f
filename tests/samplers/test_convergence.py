"""Samplers against exact answers: the order at which solvers reach the flow, and the moments that drawing samplers give."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.schedules import Level, Schedule
from tests.samplers.known import Mixture, exact_flow, gaussian, mixture, reference_flow, scores, start, walk

Record = Callable[[str, str, str, float, float], None]

ORDERS = {
    "ddim": 1,
    "euler": 1,
    "heun": 2,
    "dpm-solver:order=2": 2,
    "dpm-solver:order=3": 3,
    "dpm++2s": 2,
    "dpm++2m": 2,
    "dpm++3m": 3,
    # UniC raises the order p of UniP by one (Zhao et al. 2023, theorem 3.1 and corollary).
    "unipc:order=1": 2,
    "unipc:order=2": 3,
    "unipc:order=2,b=bh1": 3,
    "unipc:order=3": 4,
    "unipc:order=3,predicted=eps": 4,
    "deis:order=2": 2,
    "deis:order=3": 3,
    "deis:order=4": 4,
    "deis:order=3,variable=log-rho": 3,
    "lms:order=2": 2,
    "lms:order=3": 3,
    "lms:order=4": 4,
}


def levels(schedule: Schedule, steps: int, last: float) -> list[Level]:
    """From the noisiest time to `last`, even in log-SNR; the end stays noisy, so that every step is of full order."""
    ends = schedule.at(torch.tensor([schedule.first, last], dtype=torch.float64)).log_snr
    rows = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return [schedule.at(t) for t in schedule.t_of(rows)]


def slope(sampler: str, model: Mixture, x: Tensor, exact: Tensor, paths: list[list[Level]]) -> float:
    """Of the log of the error against the log of the number of steps."""
    errors = [float((walk(sampler, model, x, path=path)[-1] - exact).norm()) for path in paths]
    return float(np.polyfit([math.log(len(path) - 1) for path in paths], np.log(errors), 1)[0])


@pytest.fixture(scope="module", params=["gaussian", "mixture"])
def flow(request: pytest.FixtureRequest) -> tuple[str, Mixture, Tensor, Tensor, list[list[Level]]]:
    """The oracle's name, a model, points at the noisiest level, where the flow takes them, and paths."""
    if request.param == "gaussian":
        model = gaussian("vp")
        oracle, solve, last, counts = "exact flow of a Gaussian", exact_flow, 20.0, [40, 80, 160, 320]
    else:  # less smooth: higher orders show from more steps on
        model = mixture("vp")
        oracle, solve, last, counts = "flow of a mixture (DOP853)", reference_flow, 200.0, [60, 120, 240, 480]
    paths, x = [levels(model.schedule, steps, last) for steps in counts], start(model, 8)
    return oracle, model, x, solve(model, x, paths[0][0], paths[0][-1]), paths


def test_the_reference_flow_is_the_exact_one_of_a_gaussian() -> None:
    model = gaussian("vp")
    path, x = levels(model.schedule, 1, 20.0), start(model, 8)
    found, exact = (f(model, x, path[0], path[-1]) for f in (reference_flow, exact_flow))
    assert (found - exact).abs().max() < 1e-9


@pytest.mark.parametrize("sampler", ORDERS)
def test_solvers_reach_the_flow_at_their_order(
    sampler: str, flow: tuple[str, Mixture, Tensor, Tensor, list[list[Level]]], exactness: Record
) -> None:
    oracle, *case = flow
    difference = abs(slope(sampler, *case) + ORDERS[sampler])
    exactness(f"sampler {sampler}", f"{oracle}, order {ORDERS[sampler]}", "order", difference, 0.3)


@pytest.mark.parametrize("warm_up", ["runge-kutta", "euler"])
def test_pndm_reaches_the_flow_at_second_order(warm_up: str, exactness: Record) -> None:
    """Its weights are those of equal steps for an even integrand; rho is not even in time, which leaves second order.

    On a mixture its fourth-order error hides that until about a thousand steps.
    """
    model, x = gaussian("vp"), start(gaussian("vp"), 8)
    paths = [
        [model.schedule.at(t) for t in torch.linspace(999, 20, steps + 1, dtype=torch.float64)]
        for steps in (150, 300, 600, 1200)
    ]
    exact = exact_flow(model, x, paths[0][0], paths[0][-1])
    difference = abs(slope(f"pndm:warm_up={warm_up}", model, x, exact, paths) + 2)
    exactness(f"sampler pndm:warm_up={warm_up}", "exact flow of a Gaussian, order 2", "order", difference, 0.3)


MOMENTS = [
    "ddpm:variance=fixed-small",
    "ddpm:variance=fixed-large",
    "ddim:eta=1,steps=500",
    "ddim:eta=0.5,steps=500",
    "dpm++2m:eta=1,steps=100",
    "dpm++2m:eta=0.5,steps=100",
    "euler:s_churn=100,steps=500",
    "heun:s_churn=40,steps=100",
    "heun:s_churn=40,s_tmin=0.05,s_tmax=20,s_noise=1,steps=100",
]


@pytest.mark.parametrize("data", [gaussian, mixture], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("sampler", MOMENTS)
def test_samplers_that_draw_noise_reach_mean_and_covariance(
    sampler: str, data: Callable[[str], Mixture], exactness: Record
) -> None:
    model = data("linear")
    found = walk(sampler, model, start(model, 1500))[-1].flatten(1)
    name, _, steps = sampler.partition(",steps=")
    oracle = f"mean and covariance of a {data.__name__}, {steps or 1000} steps"
    exactness(f"sampler {name}", oracle, "statistical", scores(found, *model.moments()), 4.0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim:analytic=true", "ddim:eta=0.5,analytic=true"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_analytic_variance_is_exact_in_any_number_of_steps(sampler: str, steps: int, exactness: Record) -> None:
    """Of white Gaussian data the reverse step is Gaussian, so its best variance is the true one (Bao et al. 2022)."""
    model = gaussian("linear")
    model.covariances, model.analytic = 0.3 * torch.eye(2, dtype=torch.float64)[None], True
    schedule = model.schedule
    path = [schedule.at(t) for t in torch.linspace(999, 100, steps + 1, dtype=torch.float64).round()]
    found = walk(sampler, model, start(model, 4000), path=path)[-1].flatten(1)
    mean, covariance = path[-1].alpha * model.means[0], path[-1].alpha ** 2 * model.covariances[0]
    z = scores(found, mean, covariance + path[-1].sigma ** 2 * torch.eye(2))
    exactness(f"sampler {sampler}", f"white Gaussian, {steps} steps, analytic variance", "statistical", z, 4.0)
