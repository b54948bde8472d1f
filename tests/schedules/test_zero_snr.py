"""Zero terminal SNR: the rescaled table, its last interval, and what can and cannot be learnt on it."""

import math
from collections.abc import Callable

import pytest
import torch

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import ConfigError
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.objectives import Objective
from ddpm.randomness import Stream
from ddpm.samplers import Sampler
from ddpm.schedules import (
    DiscreteSchedule,
    Schedule,
    posterior,
    posterior_coefficients,
    posterior_variance,
    step_variance,
)
from ddpm.weightings import Weighting

SPECS = [
    "zero-snr",
    "linear:timesteps=20,scaled=true",
    "zero-snr:table=cosine(timesteps=50)",
    "zero-snr:table=jsd",
    "jsd",
    "jsd:timesteps=2",
]
Exactness = Callable[[str, str, str, float, float], None]


@pytest.fixture(params=SPECS)
def schedule(request: pytest.FixtureRequest) -> DiscreteSchedule:
    return table(request.param)


def table(spec: str) -> DiscreteSchedule:
    found = Schedule.parse(spec)
    assert isinstance(found, DiscreteSchedule)
    return found


@pytest.mark.parametrize("spec", ["linear", "cosine", "scaled-linear", "constant:timesteps=100", "jsd"])
def test_rescaled_betas_are_those_of_diffusers(spec: str, exactness: Exactness) -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    theirs = rescale_zero_terminal_snr(table(spec).betas.clone())
    ours = table(f"zero-snr:table={spec.replace(':', '(')}{')' if ':' in spec else ''}")
    difference = float((ours.betas - theirs).abs().max())
    exactness("schedule zero-snr", f"diffusers rescale_zero_terminal_snr, {spec}", "exact", difference, 1e-12)
    assert ours.timesteps == table(spec).timesteps


def test_rescaling_is_a_shift_and_a_scale_of_alpha() -> None:
    """Lin et al. (2024), section 3.1: the first alpha stays, the last is 0, those between keep their proportions."""
    plain, rescaled = table("cosine").alphas_cumprod.sqrt(), table("zero-snr:table=cosine").alphas_cumprod.sqrt()
    assert float(rescaled[0]) == pytest.approx(float(plain[0]), abs=1e-15)
    assert rescaled[-1] == 0
    share = (rescaled - rescaled[-1]) / (rescaled[0] - rescaled[-1])
    assert (share - (plain - plain[-1]) / (plain[0] - plain[-1])).abs().max() < 1e-12


def test_jsd_takes_an_equal_share_of_the_signal_at_each_step(exactness: Exactness) -> None:
    difference = (table("jsd").alphas_cumprod - torch.arange(999, -1, -1).double() / 1000).abs().max()
    exactness("schedule jsd", "alphas_cumprod = 1 - t / T", "exact", float(difference), 1e-12)


def test_the_last_level_is_noise_alone(schedule: DiscreteSchedule) -> None:
    assert schedule.zero_terminal_snr
    level = schedule.at(torch.tensor(schedule.first))
    assert [float(value) for value in vars(level).values()] == [schedule.first, 0, 1, -math.inf]
    assert schedule.t_of(level.log_snr) == schedule.first
    assert not Schedule.parse("cosine").zero_terminal_snr
    assert not Schedule.parse("edm").zero_terminal_snr


def test_the_signal_falls_in_a_line_to_the_last_level(schedule: DiscreteSchedule) -> None:
    before = schedule.at(torch.tensor(schedule.first - 1.0))
    along = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    level = schedule.at(schedule.first - 1.0 + along)
    assert level.log_snr.isfinite().all()
    assert (level.log_snr.diff() < 0).all()
    assert (level.alpha - before.alpha * (1 - along)).abs().max() < 1e-12
    assert (level.alpha**2 + level.sigma**2 - 1).abs().max() < 1e-15
    assert (schedule.t_of(level.log_snr) - level.t).abs().max() < 1e-9


@pytest.mark.parametrize("before", [1.0, 0.5, 1e-6])
def test_the_step_from_noise_alone_forgets_it(schedule: DiscreteSchedule, before: float) -> None:
    """q(x_s | x_T, x0) = q(x_s | x0) where x_T tells nothing of x_s."""
    level, previous = (schedule.at(torch.tensor(schedule.first - back, dtype=torch.float64)) for back in (0.0, before))
    assert step_variance(level, previous) == 1
    assert [float(value) for value in posterior_coefficients(level, previous)] == [float(previous.alpha), 0]
    assert posterior_variance(level, previous) == previous.sigma**2
    x0, x_t = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 7.0)
    mean, variance = posterior(x0, x_t, level, schedule.clean)
    assert (mean == x0).all()
    assert variance == 0


def test_a_schedule_without_a_table_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^schedule 'zero-snr' needs a schedule of numbered steps, .*; 'edm' is continuous\.$"
    ):
        Schedule.parse("zero-snr:table=edm")


def build(objective: str, schedule: str, **options: str) -> GaussianDiffusion:
    config = DiffusionConfig(objective=objective, schedule=schedule, thresholding="none", **options)
    return build_diffusion(ModelConfig(channels=8, channel_mults=(1,), blocks=1, attention=()), config, (1, 4, 4), 0)


@pytest.mark.parametrize("schedule", ["zero-snr", "jsd"])
def test_what_divides_by_alpha_is_refused(schedule: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--diffusion.objective=eps divides by alpha, .* '{schedule}': use v or x0\.$"
    ):
        build("eps", schedule)


@pytest.mark.parametrize(
    "objective", [name for name in Objective.names() if not Objective.registered[name].needs_signal]
)
@pytest.mark.parametrize("schedule", ["zero-snr:table=linear(timesteps=4,scaled=false)", "jsd:timesteps=4"])
def test_the_other_objectives_learn_from_noise_alone(objective: str, schedule: str) -> None:
    """With every weight of the error, and with the bound: sixteen images see each of the four times."""
    x0, stream = torch.linspace(-1, 1, 256).reshape(16, 1, 4, 4), Stream(0, torch.arange(16))
    options = [{"weighting": name} for name in Weighting.names()]
    options += [{"variance": "learned-range", "criterion": "hybrid"}, {"criterion": "vlb"}]
    for chosen in options:
        model = build(objective, schedule, **chosen)
        assert model.schedule.draw(stream.at("time").uniform()).unique().tolist() == [0, 1, 2, 3]
        assert model.loss(x0, None, stream).isfinite().all(), chosen
    prediction = model.predict(x0, model.schedule.at(torch.tensor(3.0)))
    assert prediction.x0.isfinite().all()
    assert torch.equal(prediction.eps, x0)


@pytest.mark.parametrize("sampler", [name for name in Sampler.names() if name != "pndm"])  # it takes even times alone
@pytest.mark.parametrize("grid", ["trailing", "log-snr", "karras"])
def test_every_sampler_starts_from_noise_alone(sampler: str, grid: str) -> None:
    model = build("v", "zero-snr:table=cosine(timesteps=20)")
    x = torch.linspace(-2, 2, 64).reshape(4, 1, 4, 4)
    images = Sampler.parse(f"{sampler}:steps=6,grid={grid}").sample(model, x, None, lambda i: torch.ones_like(x))
    assert images.isfinite().all()
