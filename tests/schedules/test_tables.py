"""Noise schedules against diffusers' tables, the papers' formulas and the laws that any two levels obey."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.schedules import (
    Cosine,
    DiscreteSchedule,
    Level,
    Linear,
    Schedule,
    posterior,
    posterior_coefficients,
    posterior_variance,
    step_variance,
)

SPECS = [
    "linear",
    "linear:timesteps=50",
    "linear:timesteps=100,scaled=true",
    "linear:beta_start=0.02,beta_end=0.0001",
    "cosine",
    "cosine:timesteps=50,s=0.02",
    "cosine:timesteps=4000",
    "quadratic",
    "scaled-linear",
    "sigmoid",
    "sigmoid:start=0,end=3,tau=0.3",
    "sigmoid-beta",
    "constant",
    "warmup",
    "warmup:fraction=0.5",
]
Exactness = Callable[[str, str, str, float, float], None]
PAIRS = [(1, 0), (999, 998), (999, 0), (500, 20), (3, 1), (17, -1), (0, -1), (999, -1)]


@pytest.fixture(params=SPECS)
def schedule(request: pytest.FixtureRequest) -> DiscreteSchedule:
    found = Schedule.parse(request.param)
    assert isinstance(found, DiscreteSchedule)
    return found


def t64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every(schedule: DiscreteSchedule) -> Level:
    return schedule.at(torch.arange(schedule.timesteps))


def table(spec: str) -> DiscreteSchedule:
    found = Schedule.parse(spec)
    assert isinstance(found, DiscreteSchedule)
    return found


def furthest(ours: Tensor, theirs: Tensor | np.ndarray) -> float:
    """The largest relative difference."""
    return float((ours / torch.as_tensor(theirs).double() - 1).abs().max())


@pytest.mark.parametrize(
    ("spec", "name", "ends"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled-linear", "scaled_linear", (0.00085, 0.012)),
        ("quadratic", "scaled_linear", (1e-4, 0.02)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
        ("sigmoid-beta", "sigmoid", (1e-4, 0.02)),
    ],
)
def test_tables_are_those_of_diffusers(spec: str, name: str, ends: tuple[float, float], exactness: Exactness) -> None:
    """Theirs are float32."""
    from diffusers import DDPMScheduler

    worst = 0.0
    for timesteps in (50, 1000):
        theirs = DDPMScheduler(timesteps, beta_schedule=name, beta_start=ends[0], beta_end=ends[1])
        worst = max(worst, furthest(table(f"{spec}:timesteps={timesteps}").betas, theirs.betas))
        kept = table(f"{spec}:timesteps={timesteps}").alphas_cumprod
        torch.testing.assert_close(kept.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
    exactness(f"schedule {spec}", f"diffusers {name}", "exact", worst, 1e-5)


def test_a_constant_beta_leaves_a_geometric_sequence(exactness: Exactness) -> None:
    kept = 0.98 ** np.arange(1, 1001)
    exactness(
        "schedule constant", "geometric sequence", "exact", furthest(table("constant").alphas_cumprod, kept), 1e-11
    )


def test_a_quadratic_table_adds_up_as_sums_of_squares_do(exactness: Exactness) -> None:
    """The sum of (a + i h)^2 over i < T is T a^2 + a h T (T - 1) + h^2 T (T - 1) (2 T - 1) / 6."""
    a, h, n = 0.01, (math.sqrt(0.02) - 0.01) / 999, 1000
    total = n * a**2 + a * h * n * (n - 1) + h**2 * n * (n - 1) * (2 * n - 1) / 6
    difference = abs(float(table("quadratic").betas.sum()) / total - 1)
    exactness("schedule quadratic", "sum of squares", "exact", difference, 1e-12)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_warm_up_rises_in_a_line_then_stays(fraction: float, exactness: Exactness) -> None:
    rise = round(1000 * fraction)
    wanted = np.interp(np.arange(1000), [0, rise - 1], [1e-4, 0.02])
    difference = furthest(table(f"warmup:fraction={fraction}").betas, wanted)
    exactness("schedule warmup", f"two line segments, {fraction}", "exact", difference, 1e-12)
    assert (table("warmup:fraction=0").betas == 0.02).all()


def test_the_sigmoid_table_is_that_of_chen(exactness: Exactness) -> None:
    """From hyperbolic tangents, 2 sigmoid(x) = 1 + tanh(x / 2); the last beta, which is 1, is capped."""
    for start, end, tau in ((-3, 3, 1), (0, 3, 0.3), (-3, 3, 0.7)):
        u = np.arange(1001) / 1000
        bend = np.tanh((start + (end - start) * u) / tau / 2)
        kept = (bend[-1] - bend) / (bend[-1] - bend[0])
        ours = table(f"sigmoid:start={start},end={end},tau={tau}")
        difference = np.abs(ours.alphas_cumprod.numpy()[:-1] - kept[1:-1]).max()
        exactness("schedule sigmoid", f"tanh form, {start}/{end}/{tau}", "exact", difference, 1e-12)
        assert float(ours.betas[-1]) == 0.999


def test_the_linear_table_is_that_of_ho_et_al(exactness: Exactness) -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    assert np.abs(Linear().betas.numpy() - betas).max() < 1e-15
    kept = np.array([math.prod(1 - betas[: t + 1]) for t in range(1000)])
    level = every(Linear())
    assert np.abs(level.alpha.numpy() ** 2 - kept).max() < 1e-12
    assert np.abs(level.sigma.numpy() ** 2 - (1 - kept)).max() < 1e-12
    difference = np.abs(level.log_snr.numpy() - np.log(kept / (1 - kept))).max()
    exactness("schedule linear", "Ho et al. 2020, section 4", "exact", difference, 1e-11)
    assert kept[-1] == pytest.approx(4.0e-5, rel=0.02)


def test_the_cosine_table_is_that_of_nichol_and_dhariwal(exactness: Exactness) -> None:
    f = np.array([math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)])
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    difference = np.abs(Cosine().betas.numpy() - betas).max()
    exactness("schedule cosine", "Nichol & Dhariwal 2021, eq. 17", "exact", difference, 1e-12)
    assert np.abs(Cosine().alphas_cumprod.numpy()[:-1] - (f[1:] / f[0])[:-1]).max() < 1e-12
    assert float(Cosine().betas[-1]) == 0.999


def test_scaled_tables_end_at_about_the_same_noise() -> None:
    full = Linear()
    for timesteps in (100, 500, 4000):
        scaled = Linear(timesteps=timesteps, scaled=True)
        assert np.allclose(scaled.betas.sum(), full.betas.sum(), rtol=1e-12)
        assert float(scaled.log_snr[-1]) == pytest.approx(float(full.log_snr[-1]), abs=1.0)


def test_levels_preserve_variance_and_fall(schedule: DiscreteSchedule) -> None:
    level = every(schedule)
    assert (level.alpha**2 + level.sigma**2 - 1).abs().max() < 1e-15
    assert (level.log_snr.diff() < 0).all()
    assert (level.alpha.diff() < 0).all()
    assert (level.sigma.diff() >= 0).all()
    assert ((level.alpha**2 / level.sigma**2).log() - level.log_snr).abs().max() < 1e-9
    assert all(value.dtype == torch.float64 for value in vars(level).values())
    assert (schedule.first, schedule.last) == (schedule.timesteps - 1, 0)


def test_real_times_lie_between_their_neighbours(schedule: DiscreteSchedule) -> None:
    table = every(schedule)
    t = torch.arange(schedule.timesteps - 1) + 0.25
    level = schedule.at(t)
    assert (level.alpha**2 + level.sigma**2 - 1).abs().max() < 1e-15
    assert (level.alpha < table.alpha[:-1]).all()
    assert (level.alpha > table.alpha[1:]).all()
    expected = 0.75 * table.log_snr[:-1] + 0.25 * table.log_snr[1:]
    assert (level.log_snr - expected).abs().max() < 1e-12
    assert (torch.logit(level.alpha**2) - expected).abs().max() < 1e-9


def test_times_are_found_back_from_log_snr(schedule: DiscreteSchedule) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.arange(schedule.timesteps, dtype=torch.float64)
    real = torch.rand(500, generator=generator, dtype=torch.float64) * (schedule.timesteps - 1)
    for t in (whole, real, real.reshape(20, 25), t64(3.5)[0]):
        assert (schedule.t_of(schedule.at(t).log_snr) - t).abs().max() < 1e-9
    low, high = float(schedule.log_snr[-1]), float(schedule.log_snr[0])
    wanted = torch.linspace(low, high, 501, dtype=torch.float64)
    assert (schedule.at(schedule.t_of(wanted)).log_snr - wanted).abs().max() < 1e-9


def test_times_beyond_the_table_are_its_ends(schedule: DiscreteSchedule) -> None:
    found = schedule.t_of(t64(math.inf, 1e9, -1e9, -math.inf))
    assert found.tolist() == [-1, 0, schedule.timesteps - 1, schedule.timesteps - 1]


def test_the_clean_level(schedule: DiscreteSchedule) -> None:
    for level in (schedule.clean, schedule.at(t64(-1)[0])):
        assert level.is_clean
        assert [float(value) for value in vars(level).values()] == [-1, 1, 0, math.inf]
    assert not schedule.at(t64(0)[0]).is_clean
    assert schedule.prior_std == 1


def test_step_variance_of_neighbours_is_beta(schedule: DiscreteSchedule) -> None:
    t = torch.arange(schedule.timesteps)
    found = step_variance(schedule.at(t), schedule.at(t - 1))
    assert (found - schedule.betas).abs().max() < 1e-12
    assert ((found - schedule.betas).abs() / schedule.betas).max() < 1e-9


@pytest.mark.parametrize("spec", ["linear", "cosine", "zero-snr"])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_step_variance_is_what_the_two_levels_say(spec: str, t: int, s: int) -> None:
    schedule = Schedule.parse(spec)
    level, previous = schedule.at(t64(t)[0]), schedule.at(t64(s)[0])
    expected = level.sigma**2 - (level.alpha / previous.alpha) ** 2 * previous.sigma**2
    assert float((step_variance(level, previous) - expected).abs()) < 1e-14


@pytest.mark.parametrize("spec", ["linear", "cosine", "zero-snr", "jsd"])
def test_the_posterior_is_that_of_ho_et_al(spec: str) -> None:
    """Equations 6 and 7, from betas alone."""
    schedule = table(spec)
    betas = schedule.betas.numpy()
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    at_x0, at_x_t = np.sqrt(before) * betas / (1 - kept), np.sqrt(1 - betas) * (1 - before) / (1 - kept)
    variance = (1 - before) / (1 - kept) * betas
    t = torch.arange(1000)
    found = posterior_coefficients(schedule.at(t), schedule.at(t - 1))
    assert np.abs(found[0].numpy() - at_x0).max() < 1e-10
    assert np.abs(found[1].numpy() - at_x_t).max() < 1e-10
    assert np.abs(posterior_variance(schedule.at(t), schedule.at(t - 1)).numpy() - variance).max() < 1e-10

    generator = torch.Generator().manual_seed(0)
    x0, x_t = (torch.randn(1000, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, found_variance = posterior(x0, x_t, schedule.at(t), schedule.at(t - 1))
    expected = at_x0[:, None, None, None] * x0.numpy() + at_x_t[:, None, None, None] * x_t.numpy()
    assert np.abs(mean.numpy() - expected).max() < 1e-10
    assert np.abs(found_variance.numpy() - variance).max() < 1e-10


@pytest.mark.parametrize("spec", ["linear", "cosine", "zero-snr"])
@pytest.mark.parametrize(("t", "s"), [pair for pair in PAIRS if pair[1] >= 0])
def test_the_posterior_is_gaussian_conditioning(spec: str, t: int, s: int) -> None:
    """x_s = a_s x0 + sigma_s e and x_t = r x_s + b e' given x0: condition the joint normal on x_t, for skipped steps too."""
    schedule = Schedule.parse(spec)
    level, previous = schedule.at(t64(t)[0]), schedule.at(t64(s)[0])
    a_t, a_s, sigma_s = float(level.alpha), float(previous.alpha), float(previous.sigma)
    r = a_t / a_s
    added = 1 - a_t**2 - r**2 * sigma_s**2
    joint = np.array([[sigma_s**2, r * sigma_s**2], [r * sigma_s**2, r**2 * sigma_s**2 + added]])
    x0, x_t = 0.7, -1.3
    gain = np.linalg.solve(joint[1:, 1:], joint[1:, :1])[0, 0]
    mean, variance = a_s * x0 + gain * (x_t - r * a_s * x0), joint[0, 0] - gain * joint[1, 0]
    found = posterior(t64(x0).reshape(1, 1, 1, 1), t64(x_t).reshape(1, 1, 1, 1), level, previous)
    assert float(found[0]) == pytest.approx(mean, abs=1e-10)
    assert float(found[1]) == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("spec", ["linear", "cosine", "zero-snr"])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_posterior_averaged_over_x_t_is_the_forward_process(spec: str, t: int, s: int) -> None:
    schedule = Schedule.parse(spec)
    level, previous = schedule.at(t64(t)[0]), schedule.at(t64(s)[0])
    at_x0, at_x_t = posterior_coefficients(level, previous)
    variance = posterior_variance(level, previous) + at_x_t**2 * level.sigma**2
    assert float(at_x0 + at_x_t * level.alpha) == pytest.approx(float(previous.alpha), abs=1e-12)
    assert float(variance) == pytest.approx(float(previous.sigma**2), abs=1e-12)


def test_the_last_posterior_is_the_clean_image() -> None:
    schedule = Linear()
    x0, x_t = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    mean, variance = posterior(x0, x_t, schedule.at(t64(0, 5, 999)), schedule.clean.expand(3))
    torch.testing.assert_close(mean, x0, rtol=0, atol=1e-6)
    assert mean.dtype == torch.float32
    assert variance.tolist() == [0, 0, 0]


def test_training_times_are_uniform_over_the_table(schedule: DiscreteSchedule) -> None:
    n = schedule.timesteps
    u = (torch.arange(10 * n, dtype=torch.float64) + 0.5) / (10 * n)
    assert torch.bincount(schedule.draw(u).long(), minlength=n).tolist() == [10] * n
    edges = schedule.draw(t64(0.5 / 2**32, 1 - 0.5 / 2**32, 1.0))
    assert edges.tolist() == [0, n - 1, n - 1]


def test_levels_take_the_shape_of_images() -> None:
    level = Linear().at(t64(3, 5))
    like = level.like(torch.zeros(2, 3, 4, 4))
    assert like.alpha.shape == (2, 1, 1, 1)
    assert like.alpha.dtype == torch.float32
    single = Linear().at(t64(3)[0])
    assert single.like(torch.zeros(2, 3, 4, 4)).sigma.shape == ()
    assert single.expand(4).sigma.tolist() == [float(single.sigma)] * 4


@pytest.mark.parametrize(
    "spec",
    [
        "linear:timesteps=19,scaled=true",
        "linear:timesteps=10,scaled=true",
        "constant:beta=0.9",
        "sigmoid:start=1,end=1",
        "zero-snr:table=constant(beta=1e-17)",
        "linear:beta_start=1e-300",
        "linear:timesteps=100000",
        "cosine:timesteps=2,max_beta=1e-17",
    ],
)
def test_a_table_that_is_no_noise_schedule_is_refused(spec: str) -> None:
    """Betas beyond 1, or so small or so many that float numbers cannot tell levels apart."""
    with pytest.raises(ConfigError, match=r"its signal does not fall step by step .* other betas or timesteps\.$"):
        Schedule.parse(spec)


@pytest.mark.parametrize("name", Schedule.names())
def test_schedules_do_not_depend_on_the_device_of_the_moment(name: str) -> None:
    with torch.device("meta"):
        built = Schedule.parse(name)
        assert built.prior_std > 0
    times = torch.tensor([built.first, built.first / 2, built.last])
    found, wanted = built.at(times), Schedule.parse(built.spec).at(times)
    assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(wanted).values(), strict=True))
