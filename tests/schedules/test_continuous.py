"""Continuous schedules against their formulas, the tables they are limits of, and the laws that all schedules obey."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.samplers import Sampler
from ddpm.schedules import Level, Linear, Schedule
from ddpm.schedules.laplace import Laplace

SPECS = ["edm", "edm:sigma_max=20,rho=3", "ve", "vp", "vp:beta_max=0.1,beta_min=12", "laplace:mu=1"]
Exactness = Callable[[str, str, str, float, float], None]


@pytest.fixture(params=SPECS)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return Schedule.parse(request.param)


def spread(n: int) -> Tensor:
    return torch.linspace(999, 0, n, dtype=torch.float64)


def test_edm_evenly_spaced_is_the_steps_of_karras_et_al(exactness: Exactness) -> None:
    """Equation 5 in their float64 code: rho 7, 0.002 to 80, 18 steps."""
    i = np.arange(18, dtype=np.float64)
    theirs = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    ours = Schedule.parse("edm").at(spread(18))
    exactness(
        "schedule edm", "Karras et al. 2022, eq. 5", "exact", np.abs(ours.sigma.numpy() / theirs - 1).max(), 1e-12
    )
    assert np.abs(ours.log_snr.numpy() + 2 * np.log(theirs)).max() < 1e-12
    assert (ours.alpha == 1).all()


def test_edm_is_that_of_diffusers(exactness: Exactness) -> None:
    from diffusers import EDMEulerScheduler

    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_schedule="karras", rho=7.0)
    theirs.set_timesteps(40)
    ours = torch.cat([Schedule.parse("edm").at(spread(40)).sigma, torch.zeros(1)])
    difference = ((ours - theirs.sigmas) / ours.clamp(min=1e-9)).abs().max()
    exactness("schedule edm", "diffusers EDMEulerScheduler", "exact", float(difference), 1e-6)


def test_ve_is_the_geometric_sequence_of_song_et_al(exactness: Exactness) -> None:
    theirs = np.geomspace(100, 0.02, 1000)
    ours = Schedule.parse("ve").at(spread(1000)).sigma.numpy()
    exactness("schedule ve", "geometric sequence", "exact", np.abs(ours / theirs - 1).max(), 1e-11)


def test_vp_is_the_integral_of_its_beta(exactness: Exactness) -> None:
    """alpha^2 = exp(-integral of beta), beta(u) = 0.1 + 19.9 u, by the trapezoid rule, exact for a straight line."""
    t = spread(401)
    edges = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None] * (t + 1) / 1000
    lost = torch.trapezoid(0.1 + 19.9 * edges, edges, dim=0)
    ours = Schedule.parse("vp").at(t)
    exactness("schedule vp", "trapezoid rule", "exact", float((ours.alpha**2 - torch.exp(-lost)).abs().max()), 1e-12)
    assert (ours.sigma**2 + torch.expm1(-lost)).abs().max() < 1e-12


def test_vp_is_the_limit_of_the_linear_table() -> None:
    """beta_t = beta(t/T)/T (Song et al. 2021b, appendix B): the finer the table the nearer, at first order."""
    t = torch.linspace(50, 950, 40, dtype=torch.float64)
    errors = []
    for timesteps in (1000, 10_000):
        table = Linear(timesteps=timesteps, beta_start=0.1 / timesteps, beta_end=20 / timesteps)
        found = table.at((t + 1) * timesteps / 1000 - 1).log_snr
        errors.append(float((found - Schedule.parse("vp").at(t).log_snr).abs().max()))
    assert errors[0] < 0.2
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


def test_times_beyond_the_ends_are_the_ends(schedule: Schedule) -> None:
    t = torch.tensor([999, 1500, 0], dtype=torch.float64)
    level = schedule.at(t)
    assert level.log_snr[0] == level.log_snr[1]
    assert schedule.t_of(torch.tensor([-math.inf, -1e4, 1e4, math.inf], dtype=torch.float64)).tolist() == [
        999,
        999,
        0,
        -1,
    ]
    assert (schedule.first, schedule.last) == (999, 0)


def test_a_negative_time_is_the_clean_image(schedule: Schedule) -> None:
    level = schedule.at(torch.tensor(-1.0))
    assert level.is_clean
    assert [float(value) for value in vars(level).values()] == [-1, 1, 0, math.inf]


def test_training_times_are_uniform(schedule: Schedule) -> None:
    u = torch.linspace(0, 1, 11)
    drawn = schedule.draw(u)
    assert drawn.dtype == torch.float64
    if not isinstance(schedule, Laplace):
        assert torch.allclose(drawn, u.double() * 999, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "spec", ["edm:sigma_min=90", "edm:sigma_min=80", "ve:sigma_min=2,sigma_max=1", "vp:beta_max=1e4"]
)
def test_levels_that_do_not_rise_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"its noise must rise and leave some signal; choose other options\.$"):
        Schedule.parse(spec)


@pytest.mark.parametrize(("spec", "std"), [("edm", 80), ("ve:sigma_max=50", 50), ("vp", 1), ("cosine", 1)])
def test_sampling_starts_from_noise_as_wide_as_the_first_level(spec: str, std: float) -> None:
    """Where variance explodes, a grid that leaves the noisiest times out starts from less noise."""
    schedule = Schedule.parse(spec)
    assert schedule.prior_std == pytest.approx(std, rel=1e-12)
    seen: list[Tensor] = []

    class Zero:
        def __init__(self) -> None:
            self.schedule = schedule

        def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
            seen.append(x_t)
            return Prediction(torch.zeros_like(x_t), eps_from_x0(torch.zeros_like(x_t), x_t, level))

    x = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    for grid in ("trailing", "leading"):
        sampler = Sampler.parse(f"ddim:steps=10,grid={grid},thresholding=none")
        sampler.sample(Zero(), x, None, lambda i: torch.zeros_like(x))
        (first, *_), level = seen, sampler.path(schedule)[0]
        assert (first == (level.sigma if schedule.prior_std != 1 else 1)).all()
        seen.clear()


@pytest.mark.parametrize("spec", ["laplace", "laplace:mu=-2,b=1", "laplace:log_snr_min=0.5", "laplace:log_snr_max=-1"])
def test_laplace_draws_from_that_distribution_between_its_ends(spec: str, exactness: Exactness) -> None:
    from scipy.stats import laplace

    schedule = Schedule.parse(spec)
    assert isinstance(schedule, Laplace)
    theirs = laplace(schedule.mu, schedule.b)
    u = np.linspace(0, 1, 1001)
    ends = theirs.sf(schedule.log_snr_max), theirs.sf(schedule.log_snr_min)
    wanted = theirs.isf(ends[0] + u * (ends[1] - ends[0]))
    found = schedule.at(schedule.draw(torch.from_numpy(u))).log_snr.numpy()
    exactness("schedule laplace", f"scipy.stats.laplace, {spec}", "exact", np.abs(found - wanted).max(), 1e-6)
    even = schedule.at(spread(101)).log_snr.diff()
    assert (even - even.mean()).abs().max() < 1e-12


@pytest.mark.parametrize("mu", [2.0, 12.0, 30.0, 300.0])
def test_laplace_far_to_either_side_is_its_mirror_image(mu: float) -> None:
    """Where the range holds next to nothing of the distribution, what it holds is an exponential one from an end of it."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    clean, noisy = (Schedule.parse(f"laplace:mu={value}") for value in (mu, -mu))
    found, mirrored = clean.at(clean.draw(u)).log_snr, noisy.at(noisy.draw(1 - u)).log_snr
    assert (found + mirrored).abs().max() < 1e-9
    if mu >= 12:
        assert (found - (10 + 0.5 * torch.log1p(-u))).abs().max() < 1e-6


def test_laplace_is_that_of_diffusers_where_that_follows_the_paper(exactness: Exactness) -> None:
    """Theirs takes alpha for alpha^2, adds 1e-6 inside the logarithm, and has float32 betas that start at 1 - alpha(0)."""
    from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

    betas = betas_for_alpha_bar(100, alpha_transform_type="laplace").double()
    lowest = 0.5 * math.log(1e-6)
    alpha = (torch.cumprod(1 - betas, 0) / math.sqrt(1 + math.exp(lowest)))[9:90]
    schedule = Schedule.parse("laplace:log_snr_min=-30,log_snr_max=30")
    u = torch.arange(10, 91, dtype=torch.float64) / 100
    guarded = torch.where(u < 0.5, u + 5e-7, u - 5e-7)
    found = schedule.at(schedule.draw(guarded)).alpha
    exactness("schedule laplace", "diffusers laplace", "exact", float((found - alpha).abs().max()), 1e-5)
