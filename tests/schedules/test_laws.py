"""Laws that every schedule obeys, whatever its options."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm.config import DiffusionConfig
from ddpm.errors import ConfigError
from ddpm.samplers import Grid
from ddpm.schedules import (
    DiscreteSchedule,
    Level,
    Schedule,
    VarianceExploding,
    posterior_coefficients,
    posterior_variance,
    step_variance,
)

T = st.integers(2, 300)
ENDS = {"beta_start": st.floats(1e-5, 1e-2), "beta_end": st.floats(1e-3, 0.3)}
SIGMAS = {"sigma_min": st.floats(1e-4, 1.0), "sigma_max": st.floats(2.0, 1e3)}
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "linear": {"timesteps": T, "scaled": st.booleans(), **ENDS},
    "scaled-linear": {"timesteps": T, **ENDS},
    "quadratic": {"timesteps": T, **ENDS},
    "cosine": {"timesteps": T, "s": st.floats(0, 0.1), "max_beta": st.floats(0.5, 0.9999)},
    "sigmoid": {"timesteps": T, "start": st.floats(-4, 0), "end": st.floats(1, 4), "tau": st.floats(0.3, 2)},
    "sigmoid-beta": {"timesteps": T, **ENDS},
    "constant": {"timesteps": T, "beta": st.floats(1e-4, 0.4)},
    "jsd": {"timesteps": T},
    "warmup": {"timesteps": T, "fraction": st.floats(0, 1), **ENDS},
    "zero-snr": {
        "table": st.sampled_from(["linear(timesteps=100)", "cosine(timesteps=2)", "jsd", "sigmoid", "constant"])
    },
    "edm": {"rho": st.floats(1, 10), **SIGMAS},
    "ve": SIGMAS,
    "vp": {"beta_min": st.floats(1e-2, 20), "beta_max": st.floats(1e-2, 40)},
    "laplace": {"mu": st.floats(-3, 3), "b": st.floats(0.1, 3), "log_snr_min": st.floats(-15, -5)},
}
checked = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def schedules(name: str) -> st.SearchStrategy[Schedule]:
    def build(options: dict[str, Any]) -> Schedule:
        written = ",".join(f"{key}={str(value).lower()}" for key, value in options.items())
        try:
            return Schedule.parse(f"{name}:{written}")
        except ConfigError:
            assume(False)
            raise

    return st.fixed_dictionaries(OPTIONS[name]).map(build)


def times(schedule: Schedule, data: st.DataObject, n: int = 12) -> Tensor:
    """Whole and real times in falling order, the ends among them, none nearer than 1e-3 to another."""
    share = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    t = schedule.last + torch.tensor([0.0, 1.0, *share], dtype=torch.float64) * (schedule.first - schedule.last)
    t = torch.cat([t, t[2 : n // 2].round()])
    return ((t * 1000).round() / 1000).unique().flip(0)


every = pytest.mark.parametrize("name", Schedule.names())


def test_every_schedule_is_drawn_here() -> None:
    assert sorted(OPTIONS) == Schedule.names()


@every
@checked
@given(data=st.data())
def test_the_signal_falls_and_the_level_is_of_a_piece(name: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules(name))
    level = schedule.at(times(schedule, data))
    assert all(value.dtype == torch.float64 for value in vars(level).values())
    assert (level.log_snr.diff() > 0).all()
    finite = level.log_snr.isfinite()
    assert finite[1:].all()
    assert bool(finite[0]) is not schedule.zero_terminal_snr
    ratio = 2 * (level.alpha[finite].log() - level.sigma[finite].log())
    assert (ratio - level.log_snr[finite]).abs().max() < 1e-9
    if isinstance(schedule, VarianceExploding):
        assert (level.alpha == 1).all()
    else:
        assert (level.alpha**2 + level.sigma**2 - 1).abs().max() < 1e-15


@every
@checked
@given(data=st.data())
def test_times_and_levels_are_each_others_inverse(name: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules(name))
    t = times(schedule, data)
    log_snr = schedule.at(t).log_snr
    assert (schedule.t_of(log_snr) - t).abs().max() < 1e-8 * schedule.first
    low, high = float(log_snr[log_snr.isfinite()][0]), float(log_snr[-1])
    share = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=5, max_size=5)), dtype=torch.float64)
    wanted = low + share * (high - low)
    assert (schedule.at(schedule.t_of(wanted)).log_snr - wanted).abs().max() < 1e-8
    assert schedule.t_of(torch.tensor([math.inf, -math.inf])).tolist() == [-1, schedule.first]


@every
@checked
@given(data=st.data())
def test_two_levels_make_one_process(name: str, data: st.DataObject) -> None:
    """Noise added from s to t, and taken away again given x0, leads back to the level at s."""
    schedule = data.draw(schedules(name))
    t = times(schedule, data)
    level, previous = schedule.at(t[:-1]), schedule.at(t[1:])
    added = step_variance(level, previous)
    ratio = level.alpha / previous.alpha
    assert (added > 0).all()
    assert (ratio**2 * previous.sigma**2 + added - level.sigma**2).abs().max() < 1e-12 * level.sigma.max() ** 2
    at_x0, at_x_t = posterior_coefficients(level, previous)
    assert (at_x0 + at_x_t * level.alpha - previous.alpha).abs().max() < 1e-9
    whole = posterior_variance(level, previous) + at_x_t**2 * level.sigma**2
    assert (whole / previous.sigma**2 - 1).abs().max() < 1e-9
    clean = Level(*(value.expand(len(t)) for value in vars(schedule.clean).values()))
    assert (posterior_variance(schedule.at(t), clean) == 0).all()
    assert [c.unique().tolist() for c in posterior_coefficients(schedule.at(t), clean)] == [[1], [0]]


@every
@checked
@given(data=st.data())
def test_betas_are_shares(name: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules(name))
    if isinstance(schedule, DiscreteSchedule):
        betas = schedule.betas
        assert betas.shape == (schedule.timesteps,)
        assert betas.dtype == torch.float64
        assert (betas > 0).all()
        assert (betas[:-1] < 1).all()
        assert betas[-1] == 1 if schedule.zero_terminal_snr else betas[-1] < 1


@every
@checked
@given(data=st.data())
def test_training_times_rise_with_their_uniform_number(name: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules(name))
    u = torch.tensor(sorted(data.draw(st.lists(st.floats(1e-9, 1 - 1e-9), min_size=8, max_size=8)))).double()
    t = schedule.draw(u)
    assert (t.diff() >= 0).all()
    assert t.min() >= schedule.last
    assert t.max() <= schedule.first


def test_the_help_and_the_documents_name_every_schedule_and_grid() -> None:
    document = (Path(__file__).parents[2] / "docs/schedules.md").read_text(encoding="utf-8")
    assert [name for name in Schedule.names() + Grid.names() if f"| `{name}` |" not in document] == []
    said = set(re.findall(r"[\w-]+", str(DiffusionConfig.model_fields["schedule"].description)))
    assert set(Schedule.names()) <= said
