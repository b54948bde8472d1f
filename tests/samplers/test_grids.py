"""Grids of times: the table is hit, the count is kept, and diffusers and the papers visit the same times."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.registry import register
from ddpm.samplers import Grid, Sampler
from ddpm.schedules import Level, Schedule


@dataclass(frozen=True)
class Continuous(Schedule):
    """A schedule without a table: sigma = t from 2 down to 0.1."""

    first: float = 2.0
    last: float = 0.1

    def at(self, t: Tensor) -> Level:
        t = t.double()
        return Level(t, torch.ones_like(t), t, -2 * t.log())

    def t_of(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2)

    def draw(self, u: Tensor) -> Tensor:
        return self.last + u * (self.first - self.last)


Continuous.name = "continuous"


def times(name: str, timesteps: int, steps: int) -> np.ndarray:
    return Grid.parse(name).times(Schedule.parse(f"linear:timesteps={timesteps}"), steps).numpy()


@pytest.mark.parametrize("name", Grid.names())
@pytest.mark.parametrize("timesteps", [2, 10, 50, 1000])
def test_every_count_gives_so_many_falling_entries_of_the_table(name: str, timesteps: int) -> None:
    for steps in {1, 2, timesteps // 3 or 1, timesteps // 2, timesteps - 1, timesteps, *range(1, min(timesteps, 40))}:
        found = times(name, timesteps, steps)
        assert found.shape == (steps,)
        assert found.dtype == np.float64
        assert (np.diff(found) < 0).all()
        assert (found == found.astype(int)).all()
        assert found[-1] >= 0
        assert found[0] <= timesteps - 1


@pytest.mark.parametrize("name", Grid.names())
def test_all_steps_are_the_whole_table(name: str) -> None:
    assert times(name, 50, 50).tolist() == list(range(49, -1, -1))


@pytest.mark.parametrize(
    ("name", "spacing"), [("trailing", "trailing"), ("leading", "leading"), ("linspace", "linspace")]
)
def test_the_times_are_those_of_diffusers(name: str, spacing: str) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1000, timestep_spacing=spacing)
    for steps in (1, 4, 7, 10, 16, 20, 25, 30, 50, 64, 100, 250, 500, 1000):
        if name == "linspace" and steps == 1:
            continue  # theirs visits t = 0 alone; sampling starts at the noisiest time here
        theirs.set_timesteps(steps)
        assert times(name, 1000, steps).tolist() == theirs.timesteps.tolist(), steps


def test_trailing_starts_at_the_noisiest_time_and_leading_ends_at_the_cleanest() -> None:
    for steps in (1, 3, 10, 50):
        assert times("trailing", 1000, steps)[0] == 999
        assert times("linspace", 1000, steps)[0] == 999
        assert times("leading", 1000, steps)[-1] == 0
    assert times("trailing", 1000, 10).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


def test_quadratic_is_that_of_song_et_al() -> None:
    for steps in (5, 10, 20, 29):
        expected = [int(value) for value in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
        assert times("quadratic", 1000, steps)[::-1].tolist() == expected


@pytest.mark.parametrize("steps", [30, 50, 100, 400])
def test_quadratic_visits_no_time_twice(steps: int) -> None:
    """At its clean end the formula alone would; from where it moves by more than one it is the formula."""
    plain = np.floor(np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2)
    found = times("quadratic", 1000, steps)[::-1]
    assert (found == np.maximum(plain, np.arange(steps))).all()
    assert len(set(plain.tolist())) < steps


@pytest.mark.parametrize("name", Grid.names())
def test_more_steps_than_timesteps_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"steps=51 are more than the schedule's 50 timesteps\.$"):
        times(name, 50, 51)


def test_a_grid_that_visits_a_time_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grid, "registered", dict(Grid.registered))

    @register("stuck")
    class Stuck(Grid):
        """The same time again and again."""

        at: Annotated[int, Field(ge=0)] = 3

        def fractions(self, steps: int, timesteps: int) -> Tensor:
            return torch.full((steps,), self.at, dtype=torch.float64)

    with pytest.raises(ConfigError, match=r"grid 'stuck' visits a timestep twice at steps=2"):
        times("stuck", 50, 2)
    assert times("stuck:at=7", 50, 1).tolist() == [7]


@pytest.mark.parametrize("name", Grid.names())
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_without_a_table_times_are_spread_over_the_schedules_range(name: str, steps: int) -> None:
    found = Grid.parse(name).times(Continuous(), steps)
    assert found.shape == (steps,)
    assert (found.diff() < 0).all()
    assert found.max() <= 2.0
    assert found.min() >= 0.1 - 1e-12


@pytest.mark.parametrize(("name", "steps"), [("ddim", 50), ("ddpm", 1000)])
def test_a_path_is_falling_levels_then_the_clean_image(name: str, steps: int) -> None:
    path = Sampler.parse(name).path(Schedule.parse("linear"))
    assert len(path) == steps + 1
    assert path[-1].is_clean
    assert all(bool(a.log_snr < b.log_snr) for a, b in pairwise(path))
    assert float(path[0].t) == 999


def test_without_a_table_the_number_of_steps_must_be_given() -> None:
    assert len(Sampler.parse("ddpm:steps=5").path(Continuous())) == 6
    with pytest.raises(ConfigError, match=r"sampler 'ddpm' needs steps=N on the continuous schedule 'continuous'\.$"):
        Sampler.parse("ddpm").path(Continuous())
