"""Samplers against diffusers' schedulers, step by step: the same levels, the same network, the same noise.

diffusers keeps its tables in float32 and names levels by whole times. What is compared are the formulas, so its tables
(compared in the tests of schedules) give way to ours in float64, and its times to real ones.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm.objectives import Prediction, eps_from_x0
from ddpm.samplers import Sampler, Thresholding
from ddpm.samplers.dpm_solver import between
from ddpm.schedules import Level, Schedule
from tests.samplers.known import CLIP, NONE, Wave, exact_flow, gaussian, noises, start, walk, wave_model
from tests.samplers.theirs import (
    SHAPE,
    float64_tables,
    largest,
    made,
    network,
    paths,
    prepared,
    rho,
    theirs,
    theirs_in_rho,
)

Record = Callable[[str, str, str, float, float], None]

pytestmark = [  # of diffusers' own code
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_types:FutureWarning"),
]


@pytest.fixture
def x() -> Tensor:
    return noises(SHAPE)(0)


# --- samplers on a table


def theirs_drawing(
    scheduler: Any, x: Tensor, noise: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Tensor]:
    """The loop of a scheduler that draws its own noise: it is given ours."""
    seen: list[Tensor] = []
    for module in ("ddpm", "ddim"):
        name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(name, lambda *args, **kwargs: noise(len(seen)))
    for t in scheduler.timesteps:
        x = scheduler.step(Wave()(x, t.float().expand(len(x))), t, x, **options).prev_sample
        seen.append(x)
    return seen


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [250, 20, 7])
def test_ddpm(
    variance: str, clip: bool, steps: int, x: Tensor, exactness: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = made("DDPMScheduler", variance_type=variance.replace("-", "_"), clip_sample=clip)
    float64_tables(scheduler).set_timesteps(steps)
    ours = walk(f"ddpm:steps={steps},grid=leading", wave_model(variance), x, CLIP if clip else NONE)
    difference = largest(ours, theirs_drawing(scheduler, x, noises(SHAPE, 1), monkeypatch))
    oracle = f"diffusers DDPMScheduler, {variance}, {steps} steps{', clipped' if clip else ''}"
    exactness("sampler ddpm", oracle, "exact", difference, 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("eps", ["derived", "predicted", "unclipped"])
@pytest.mark.parametrize(("steps", "grid"), [(50, "leading"), (7, "leading"), (10, "trailing")])
def test_ddim(
    eta: float, eps: str, steps: int, grid: str, x: Tensor, exactness: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eps is derived again from the clipped x0 (their use_clipped_model_output), or kept as predicted."""
    clip = eps != "unclipped"
    scheduler = made("DDIMScheduler", clip_sample=clip, timestep_spacing=grid)
    float64_tables(scheduler).set_timesteps(steps)
    kept = "predicted" if eps == "predicted" else "derived"
    ours = walk(f"ddim:steps={steps},eta={eta},grid={grid},eps={kept}", wave_model(), x, CLIP if clip else NONE)
    expected = theirs_drawing(
        scheduler, x, noises(SHAPE, 1), monkeypatch, eta=eta, use_clipped_model_output=eps == "derived"
    )
    oracle = f"diffusers DDIMScheduler, {grid}, {steps} steps, {f'clipped, eps {eps}' if clip else eps}"
    exactness(f"sampler ddim:eta={eta:g}", oracle, "exact", largest(ours, expected), 1e-9)


def test_diffusers_ddim_goes_to_another_time_than_it_visits_next(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its previous time is t - T // S, which on a trailing grid with S no divisor of T is not the next one of the grid."""
    scheduler = made("DDIMScheduler", clip_sample=False, timestep_spacing="trailing")
    float64_tables(scheduler).set_timesteps(7)
    times = scheduler.timesteps.tolist()
    assert [int(level.t) for level in paths(7, clean=False)] == times
    assert times[0] - 1000 // 7 != times[1]
    expected = theirs_drawing(scheduler, x, noises(SHAPE, 1), monkeypatch)
    level, reached = (wave_model().schedule.at(torch.tensor(float(t))) for t in (times[0], times[0] - 1000 // 7))
    there = walk("ddim", wave_model(), x, path=[level, reached])
    assert largest(there, expected[:1]) < 1e-9
    assert largest(walk("ddim:steps=7", wave_model(), x)[:1], expected[:1]) > 1e-4


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_inversion(steps: int, x: Tensor, exactness: Record) -> None:
    """The pipelines of diffusers ask the network with the label of the level they go to; Song et al. (2021, section 4.3)
    where x stands, and so do we. The scheduler is given that. The first step, from the clean image, is the same on both sides.
    """
    scheduler = float64_tables(made("DDIMInverseScheduler", clip_sample=False))
    scheduler.set_timesteps(steps)
    path = paths(steps, clean=True, grid="leading")[::-1]
    y, expected = x, []
    for level, t in zip(path, scheduler.timesteps, strict=False):
        y = scheduler.step(network(y, path[1] if level.is_clean else level), t, y).prev_sample
        expected.append(y)
    difference = largest(walk("ddim", wave_model(), x, path=path), expected)
    exactness("sampler ddim, inversion", f"diffusers DDIMInverseScheduler, {steps} steps", "exact", difference, 1e-9)


@pytest.mark.parametrize("warm_up", ["runge-kutta", "euler"])
@pytest.mark.parametrize(("steps", "grid"), [(10, "trailing"), (50, "leading")])
def test_pndm(warm_up: str, steps: int, grid: str, x: Tensor, exactness: Record) -> None:
    """Theirs counts every evaluation of the warm-up as a step: what it holds after the last of each is compared."""
    scheduler = made("PNDMScheduler", skip_prk_steps=warm_up == "euler", set_alpha_to_one=True, timestep_spacing=grid)
    float64_tables(scheduler).set_timesteps(steps)
    seen = []
    y = x
    for t in scheduler.timesteps:
        y = scheduler.step(Wave()(y, t.float().expand(len(y))), int(t), y).prev_sample
        seen.append(y)
    expected = [*seen[3:12:4], *seen[12:]] if warm_up == "runge-kutta" else seen[1:]
    difference = largest(walk(f"pndm:steps={steps},grid={grid},warm_up={warm_up}", wave_model(), x), expected)
    oracle = f"diffusers PNDMScheduler, {grid}, {steps} steps"
    exactness(f"sampler pndm:warm_up={warm_up}", oracle, "exact", difference, 1e-9)


# --- multistep solvers

NOISY = {"lower_order_final": False}  # a path that ends at a noisy level keeps its order on both sides
DPM_NOISY = {**NOISY, "final_sigmas_type": "sigma_min"}
MULTISTEP = [  # sampler, scheduler, its options, whether the path goes to the clean image, tolerance
    ("dpm++2m", "DPMSolverMultistepScheduler", {}, True, 1e-5),  # theirs rounds x to float32 in every step
    ("dpm++2m", "DPMSolverMultistepScheduler", DPM_NOISY, False, 1e-5),
    ("unipc:order=1", "UniPCMultistepScheduler", {"solver_order": 1}, True, 1e-9),
    ("unipc:order=2", "UniPCMultistepScheduler", {"solver_order": 2}, True, 1e-9),
    ("unipc:order=3", "UniPCMultistepScheduler", {"solver_order": 3}, True, 1e-9),
    ("unipc:order=2,b=bh1", "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, True, 1e-9),
    ("unipc:order=3,b=bh1", "UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}, True, 1e-9),
    (
        "unipc:order=2,predicted=eps",
        "UniPCMultistepScheduler",
        {"solver_order": 2, "predict_x0": False, **NOISY},
        False,
        1e-9,
    ),
    (
        "unipc:order=3,predicted=eps,b=bh1",
        "UniPCMultistepScheduler",
        {"solver_order": 3, "predict_x0": False, "solver_type": "bh1", **NOISY},
        False,
        1e-9,
    ),
    ("deis:order=1,variable=log-rho", "DEISMultistepScheduler", {"solver_order": 1, **NOISY}, False, 1e-9),
    ("deis:order=2,variable=log-rho", "DEISMultistepScheduler", {"solver_order": 2, **NOISY}, False, 1e-9),
    ("deis:order=3,variable=log-rho", "DEISMultistepScheduler", {"solver_order": 3, **NOISY}, False, 1e-9),
    (  # the multistep DPM-Solver-2 with its line integrated exactly is DEIS in ln(rho)
        "deis:order=2,variable=log-rho",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_type": "heun", **DPM_NOISY},
        False,
        1e-5,
    ),
]


@pytest.mark.parametrize(("sampler", "name", "options", "clean", "tolerance"), MULTISTEP)
@pytest.mark.parametrize("steps", [5, 40])
def test_multistep_solvers(
    sampler: str,
    name: str,
    options: dict[str, Any],
    clean: bool,
    tolerance: float,
    steps: int,
    x: Tensor,
    exactness: Record,
) -> None:
    path = paths(steps, clean)
    scheduler = prepared(made(name, **options), path)
    difference = largest(walk(sampler, wave_model(), x, path=path), theirs(scheduler, path, x))
    end = "to the clean image" if clean else "to a noisy level"
    exactness(f"sampler {sampler}", f"diffusers {name}, {steps} steps {end}", "exact", difference, tolerance)


def whole_curvature(scheduler: Any) -> Any:
    """diffusers' 3M with the whole second difference.

    Its D2 is (D1_0 - D1_1) / (r0 + r1), the coefficient of tau^2, where the series with phi_3 needs the second derivative,
    twice that; its single-step solver has the factor. With half of it the method is of second order.
    """
    original = scheduler.multistep_dpm_solver_third_order_update

    def update(outputs: list[Tensor], sample: Tensor, **options: Any) -> Tensor:
        sigmas = scheduler.sigmas[scheduler.step_index - 2 : scheduler.step_index + 2].flip(0)
        alphas, lambdas = 1 / (sigmas**2 + 1).sqrt(), -sigmas.log()
        h, h0, h1 = (lambdas[:3] - lambdas[1:]).unbind()
        first, second = (outputs[-1] - outputs[-2]) * h / h0, (outputs[-2] - outputs[-3]) * h / h1
        curvature = (first - second) * h / (h0 + h1)
        x: Tensor = original(outputs, sample=sample, **options)
        return x - alphas[0] * ((torch.exp(-h) - 1 + h) / h**2 - 0.5) * curvature

    scheduler.multistep_dpm_solver_third_order_update = update
    return scheduler


@pytest.mark.parametrize("steps", [6, 12])
def test_dpm_solver_pp_3m(steps: int, x: Tensor, exactness: Record) -> None:
    """Fewer than 15 steps, where diffusers lowers the order towards the end as we do; its second-order steps: `heun`."""
    path = paths(steps, clean=True)
    plain = prepared(made("DPMSolverMultistepScheduler", solver_order=3, solver_type="heun"), path)
    whole = whole_curvature(prepared(made("DPMSolverMultistepScheduler", solver_order=3, solver_type="heun"), path))
    ours = walk("dpm++3m", wave_model(), x, path=path)
    difference = largest(ours, theirs(whole, path, x))
    oracle = f"diffusers DPMSolverMultistepScheduler with whole curvature, {steps} steps"
    exactness("sampler dpm++3m", oracle, "exact", difference, 1e-5)
    assert largest(ours[:3], theirs(plain, path, x)[:3]) > 1e-4


def test_diffusers_3m_is_of_second_order() -> None:
    """Why we do not follow it: of a Gaussian its error falls by 4 where the steps double, ours by 8 (see ORDERS)."""
    model, errors = gaussian("vp"), []
    x = start(model, 8)
    for steps in (40, 80, 160):
        ends = model.schedule.at(torch.tensor([999.0, 20.0], dtype=torch.float64)).log_snr
        rows = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        path = [model.schedule.at(t) for t in model.schedule.t_of(rows)]
        scheduler, y = prepared(made("DPMSolverMultistepScheduler", solver_order=3, **DPM_NOISY), path), x
        for level in path[:-1]:
            y = scheduler.step(model.predict(y, level).eps, level.t, y).prev_sample
        errors.append(float((y - exact_flow(model, x, path[0], path[-1])).norm()))
    assert [round(math.log2(a / b)) for a, b in pairwise(errors)] == [2, 2]


@pytest.mark.parametrize("steps", [5, 40])
def test_sde_dpm_solver_pp_2m(steps: int, x: Tensor, exactness: Record) -> None:
    path, noise = paths(steps, clean=True), noises(SHAPE, 1)
    scheduler = prepared(made("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"), path)
    expected, y = [], x
    for i, level in enumerate(path[:-1]):
        y = scheduler.step(network(y, level), level.t, y, variance_noise=noise(i)).prev_sample
        expected.append(y)
    difference = largest(walk("dpm++2m:eta=1", wave_model(), x, path=path), expected)
    oracle = f"diffusers DPMSolverMultistepScheduler sde-dpmsolver++, {steps} steps"
    exactness("sampler dpm++2m:eta=1", oracle, "exact", difference, 1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [5, 40])
def test_adams_bashforth(order: int, steps: int, x: Tensor, exactness: Record) -> None:
    """Theirs integrates the polynomials numerically (scipy's quad), which is exact for polynomials."""
    path = paths(steps, clean=True)
    scheduler = prepared(made("LMSDiscreteScheduler"), path)
    difference = largest(
        walk(f"lms:order={order}", wave_model(), x, path=path), theirs_in_rho(scheduler, path, x, order=order)
    )
    exactness(f"sampler lms:order={order}", f"diffusers LMSDiscreteScheduler, {steps} steps", "exact", difference, 1e-9)


# --- single-step solvers


def single_step_levels(path: Sequence[Level], shares: Sequence[float]) -> list[Level]:
    """Every level that a single-step solver visits: those between two steps too."""
    schedule, seen = wave_model().schedule, [path[0]]
    for level, following in pairwise(path):
        if not following.is_clean:
            seen += [between(level, following, share, schedule) for share in shares]
        seen.append(following)
    return seen


@pytest.mark.parametrize(
    ("sampler", "algorithm", "order", "clean"),
    [
        ("dpm-solver:order=2", "dpmsolver", 2, False),
        ("dpm-solver:order=3", "dpmsolver", 3, False),
        ("dpm++2s", "dpmsolver++", 2, False),
        ("dpm++2s", "dpmsolver++", 2, True),
    ],
)
def test_single_step_solvers(
    sampler: str, algorithm: str, order: int, clean: bool, x: Tensor, exactness: Record
) -> None:
    """Theirs takes the next times of its grid for those in between, so it is given ours.

    Of order 3 the paper's u2 is what theirs calls solver_type heun, and the step's end what it calls midpoint.
    """
    path = paths(10, clean)
    visited = single_step_levels(path, [0.5] if order == 2 else [1 / 3, 2 / 3])
    ends = {"lower_order_final": clean, "final_sigmas_type": "zero" if clean else "sigma_min"}
    scheduler = made("DPMSolverSinglestepScheduler", algorithm_type=algorithm, solver_order=order, **ends)
    prepared(scheduler, visited)
    y, expected = x, []
    for i, level in enumerate(visited[:-1]):
        scheduler.register_to_config(solver_type="heun" if order == 3 and i % 3 == 1 else "midpoint")
        y = scheduler.step(network(y, level), level.t, y).prev_sample
        if i % order == order - 1 or i == len(visited) - 2:
            expected.append(y)
    end = "to the clean image" if clean else "to a noisy level"
    difference = largest(walk(sampler, wave_model(), x, path=path), expected)
    exactness(f"sampler {sampler}", f"diffusers DPMSolverSinglestepScheduler, {end}", "exact", difference, 1e-9)


@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.parametrize("clip", [True, False])
def test_heun(clip: bool, steps: int, x: Tensor, exactness: Record) -> None:
    path = paths(steps, clean=True)
    scheduler = prepared(made("HeunDiscreteScheduler", clip_sample=clip), path)
    sigmas = scheduler.sigmas
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    expected, y = [], x / path[0].alpha
    for level, following in pairwise(path):
        for at in [level] if following.is_clean else [level, following]:
            y = scheduler.step(network(at.alpha * y, at), at.t, y).prev_sample
        expected.append(following.alpha * y)
    difference = largest(walk("heun", wave_model(), x, CLIP if clip else NONE, path=path), expected)
    oracle = f"diffusers HeunDiscreteScheduler, {steps} steps{', clipped' if clip else ''}"
    exactness("sampler heun", oracle, "exact", difference, 1e-9)


@pytest.mark.parametrize("steps", [5, 40])
def test_euler(steps: int, x: Tensor, exactness: Record) -> None:
    """Theirs works in float32."""
    path = paths(steps, clean=True)
    scheduler = prepared(made("EulerDiscreteScheduler"), path)
    difference = largest(walk("euler", wave_model(), x, path=path), theirs_in_rho(scheduler, path, x))
    exactness("sampler euler", f"diffusers EulerDiscreteScheduler, {steps} steps", "exact", difference, 1e-5)


@pytest.mark.parametrize(("churn", "low", "high"), [(5.0, 0.0, float("inf")), (100.0, 0.1, 30.0)])
def test_euler_with_churn(
    churn: float, low: float, high: float, x: Tensor, exactness: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs asks the network before the noise is added; algorithm 2 of the paper, and we, after it. It is given ours."""
    path, noise, schedule = paths(20, clean=True)[2:], noises(SHAPE, 1), wave_model().schedule
    scheduler = prepared(made("EulerDiscreteScheduler"), path)
    scheduler.is_scale_input_called = True
    expected, y, raised_at = [], x / path[0].alpha, 0
    for i, (level, following) in enumerate(pairwise(path)):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_euler_discrete.randn_tensor", lambda *a, i=i, **k: 1.1 * noise(i)
        )
        gamma = min(churn / (len(path) - 1), 2**0.5 - 1) if low <= rho(level) <= high else 0.0
        raised = schedule.at(schedule.t_of(-2 * (rho(level) * (1 + gamma)).log())) if gamma else level
        y_hat = y + 1.1 * noise(i) * (rho(raised) ** 2 - rho(level) ** 2).clamp(min=0).sqrt()
        output = network(raised.alpha * y_hat, raised)
        y = scheduler.step(output, level.t, y, s_churn=churn, s_tmin=low, s_tmax=high).prev_sample
        expected.append(following.alpha * y)
        raised_at += gamma > 0
    limits = f",s_tmin={low},s_tmax={high}" if high < 1e9 else ""
    difference = largest(
        walk(f"euler:steps=18,s_churn={churn},s_noise=1.1{limits}", wave_model(), x, path=path), expected
    )
    oracle = "diffusers EulerDiscreteScheduler, asked after the churn"
    exactness(f"sampler euler:s_churn={churn:g}{limits}", oracle, "exact", difference, 1e-5)
    assert raised_at == (len(path) - 1 if not limits else sum(low <= rho(level) <= high for level in path[:-1]))


@pytest.mark.parametrize("steps", [5, 40])
def test_euler_ancestral_is_ddim_with_eta_1(
    steps: int, x: Tensor, exactness: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sigma_down and sigma_up of k-diffusion are, times alpha, the weights of eps and noise in DDIM. Theirs: float32."""
    path, noise = paths(steps, clean=True), noises(SHAPE, 1)
    scheduler = prepared(made("EulerAncestralDiscreteScheduler"), path)
    count = iter(range(steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *a, **k: noise(next(count))
    )
    difference = largest(walk("ddim:eta=1", wave_model(), x, path=path), theirs_in_rho(scheduler, path, x))
    exactness(
        "sampler ddim:eta=1", f"diffusers EulerAncestralDiscreteScheduler, {steps} steps", "exact", difference, 1e-5
    )


# --- on EDM's levels


class Preconditioned:
    """The wave as EDM's F: x0 = c_skip x + c_out F(x), sigma_data = 0.5 (Karras et al. 2022, equation 7)."""

    schedule = Schedule.parse("edm")

    def output(self, x: Tensor, level: Level) -> Tensor:
        return torch.sin(2 * x / (level.sigma**2 + 0.25).sqrt() + level.t / 50)

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        variance = level.sigma**2 + 0.25
        x0 = 0.25 / variance * x_t + level.sigma * 0.5 / variance.sqrt() * self.output(x_t, level)
        return Prediction(x0, eps_from_x0(x0, x_t, level))


@pytest.mark.parametrize(
    ("sampler", "name", "options"),
    [
        ("euler", "EDMEulerScheduler", {}),
        ("dpm++2m", "EDMDPMSolverMultistepScheduler", {}),
        ("dpm++2m:eta=1", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
@pytest.mark.parametrize("steps", [5, 20])
def test_schedulers_of_edm(
    sampler: str,
    name: str,
    options: dict[str, Any],
    steps: int,
    x: Tensor,
    exactness: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import diffusers

    model, noise = Preconditioned(), noises(SHAPE, 1)
    path = Sampler.parse(f"ddim:steps={steps},grid=linspace").path(model.schedule)
    scheduler = prepared(getattr(diffusers, name)(**options), path)
    scheduler.is_scale_input_called = True
    y = x * path[0].sigma
    expected: list[Tensor] = []
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_edm_dpmsolver_multistep.randn_tensor", lambda *a, **k: noise(len(expected))
    )
    for level in path[:-1]:
        y = scheduler.step(model.output(y, level), level.t, y).prev_sample
        expected.append(y)
    difference = largest(walk(sampler, model, x * path[0].sigma, path=path), expected)
    exactness(f"sampler {sampler}", f"diffusers {name}, {steps} steps", "exact", difference, 1e-5)


@pytest.mark.parametrize(("percentile", "limit"), [(0.995, 1.5), (0.7, 2.0), (1.0, 1.0)])
def test_dynamic_thresholding(percentile: float, limit: float, exactness: Record) -> None:
    """diffusers' sample_max_value is our max; left at its default of 1 it makes theirs the static one."""
    scheduler = made("DDPMScheduler", thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=limit)
    x0 = noises((5, 3, 4, 4))(0) * torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64).reshape(5, 1, 1, 1)
    ours = Thresholding.parse(f"dynamic:percentile={percentile},max={limit}").apply(x0)
    difference = float((ours - scheduler._threshold_sample(x0)).abs().max())
    exactness(f"thresholding dynamic:max={limit}", f"diffusers, percentile {percentile}", "exact", difference, 1e-12)
