"""Grids of times: the table is hit, the count is kept, and diffusers and the papers visit the same times."""

import math
from collections.abc import Callable
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
from ddpm.samplers.grids import IndexGrid
from ddpm.schedules import DiscreteSchedule, Schedule

INDEX = [name for name in Grid.names() if issubclass(Grid.registered[name], IndexGrid)]
LEVEL = ["log-snr", "karras", "karras:rho=3"]
TABLES = ["linear", "cosine:timesteps=50", "zero-snr", "jsd:timesteps=20"]
Exactness = Callable[[str, str, str, float, float], None]


def times(name: str, timesteps: int, steps: int) -> np.ndarray:
    return Grid.parse(name).times(Schedule.parse(f"linear:timesteps={timesteps}"), steps).numpy()


@pytest.mark.parametrize("name", INDEX)
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


@pytest.mark.parametrize("name", INDEX)
def test_all_steps_are_the_whole_table(name: str) -> None:
    assert times(name, 50, 50).tolist() == list(range(49, -1, -1))


@pytest.mark.parametrize(
    ("name", "spacing"), [("trailing", "trailing"), ("leading", "leading"), ("linspace", "linspace")]
)
def test_the_times_are_those_of_diffusers(name: str, spacing: str, exactness: Exactness) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1000, timestep_spacing=spacing)
    differences = []
    for steps in (1, 4, 7, 10, 16, 20, 25, 30, 50, 64, 100, 250, 500, 1000):
        if name == "linspace" and steps == 1:
            continue  # theirs visits t = 0 alone; sampling starts at the noisiest time here
        theirs.set_timesteps(steps)
        differences.append(np.abs(times(name, 1000, steps) - theirs.timesteps.numpy()).max())
    exactness(f"grid {name}", "diffusers DDIMScheduler", "exact", max(differences), 0.0)


def test_trailing_starts_at_the_noisiest_time_and_leading_ends_at_the_cleanest() -> None:
    for steps in (1, 3, 10, 50):
        assert times("trailing", 1000, steps)[0] == 999
        assert times("linspace", 1000, steps)[0] == 999
        assert times("leading", 1000, steps)[-1] == 0
    assert times("trailing", 1000, 10).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


def test_quadratic_is_that_of_song_et_al(exactness: Exactness) -> None:
    differences = []
    for steps in (5, 10, 20, 29):
        expected = (np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2).astype(int)
        differences.append(np.abs(times("quadratic", 1000, steps)[::-1] - expected).max())
    exactness("grid quadratic", "Song et al. 2021a, appendix D.2", "exact", max(differences), 0.0)


@pytest.mark.parametrize("steps", [30, 50, 100, 400])
def test_quadratic_visits_no_time_twice(steps: int) -> None:
    """At its clean end the formula alone would; from where it moves by more than one it is the formula."""
    plain = np.floor(np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2)
    found = times("quadratic", 1000, steps)[::-1]
    assert (found == np.maximum(plain, np.arange(steps))).all()
    assert len(set(plain.tolist())) < steps


@pytest.mark.parametrize("name", INDEX)
def test_more_steps_than_timesteps_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"steps=51 are more than the schedule's 50 timesteps\.$"):
        times(name, 50, 51)


def test_a_grid_that_visits_a_time_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grid, "registered", dict(Grid.registered))

    @register("stuck")
    class Stuck(IndexGrid):
        """The same time again and again."""

        at: Annotated[int, Field(ge=0)] = 3

        def fractions(self, steps: int, timesteps: int) -> Tensor:
            return torch.full((steps,), self.at, dtype=torch.float64)

    with pytest.raises(ConfigError, match=r"grid 'stuck' visits a time twice, or goes back, at steps=2"):
        times("stuck", 50, 2)
    assert times("stuck:at=7", 50, 1).tolist() == [7]


@pytest.mark.parametrize("name", INDEX)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_without_a_table_times_are_spread_over_the_schedules_range(name: str, steps: int) -> None:
    found = Grid.parse(name).times(Schedule.parse("edm"), steps)
    assert found.shape == (steps,)
    assert (found.diff() < 0).all()
    assert found.max() <= 999
    assert found.min() >= 0
    if name == "linspace":
        assert torch.allclose(found, torch.linspace(999, 0, steps, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LEVEL)
@pytest.mark.parametrize("spec", [*TABLES, "edm", "ve", "vp", "laplace"])
def test_level_grids_go_from_the_noisiest_to_the_cleanest_level(name: str, spec: str) -> None:
    schedule = Schedule.parse(spec)
    for steps in (1, 2, 3, 10, 64):
        found = Grid.parse(name).times(schedule, steps)
        assert found.shape == (steps,)
        assert found.dtype == torch.float64
        assert (found.diff() < 0).all()
        assert found[0] == schedule.first
        if steps > 2:
            assert found[-1] == schedule.last


def test_log_snr_is_even_in_log_snr() -> None:
    for spec in ("linear", "cosine", "edm", "vp", "laplace"):
        schedule = Schedule.parse(spec)
        steps = schedule.at(Grid.parse("log-snr").times(schedule, 23)).log_snr.diff()
        assert (steps / steps.mean() - 1).abs().max() < 1e-6, spec
        assert steps.min() > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("grid", ["log-snr", "karras"])
@pytest.mark.parametrize("spec", ["linear", "scaled-linear", "cosine"])
def test_levels_are_those_of_diffusers(grid: str, spec: str, exactness: Exactness) -> None:
    """Sigmas of float32; their times are rounded to whole ones, which ours would be with whole=true."""
    from diffusers import DPMSolverMultistepScheduler

    schedule = Schedule.parse(spec)
    assert isinstance(schedule, DiscreteSchedule)
    options = {"use_karras_sigmas": grid == "karras", "use_lu_lambdas": grid == "log-snr"}
    theirs = DPMSolverMultistepScheduler(trained_betas=schedule.betas.numpy(), **options)
    theirs.alphas_cumprod = schedule.alphas_cumprod
    worst = 0.0
    for steps in (3, 10, 25):
        theirs.set_timesteps(steps)
        ours = Grid.parse(grid).times(schedule, steps)
        sigma = torch.exp(-0.5 * schedule.at(ours).log_snr)
        worst = max(worst, float((sigma / theirs.sigmas[:-1] - 1).abs().max()))
        if spec != "cosine":  # where theirs are not rounded either: whole times would meet at the noisy end
            whole = Grid.parse(f"{grid}:whole=true").times(schedule, steps)
            assert (whole == ours.round()).all()
            assert whole.tolist() == theirs.timesteps.tolist()
    exactness(f"grid {grid}", f"diffusers DPMSolverMultistepScheduler, {spec}", "exact", worst, 1e-6)


def test_karras_is_equation_5(exactness: Exactness) -> None:
    """Over the linear table's own ends; and over EDM's it is an even grid of its times."""
    schedule = Schedule.parse("linear")
    ends = [math.sqrt((1 - kept) / kept) for kept in np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[-1, 0]]]
    i = np.arange(20)
    wanted = (ends[0] ** (1 / 7) + i / 19 * (ends[1] ** (1 / 7) - ends[0] ** (1 / 7))) ** 7
    level = schedule.at(Grid.parse("karras").times(schedule, 20))
    found = (level.sigma / level.alpha).numpy()
    exactness("grid karras", "Karras et al. 2022, eq. 5", "exact", np.abs(found / wanted - 1).max(), 1e-9)
    even = torch.linspace(999, 0, 20, dtype=torch.float64)
    assert (Grid.parse("karras").times(Schedule.parse("edm"), 20) - even).abs().max() < 1e-9


@pytest.mark.parametrize("grid", ["log-snr", "karras"])
@pytest.mark.parametrize("spec", ["zero-snr:table=cosine", "jsd"])
def test_at_zero_terminal_snr_the_noisiest_time_stands_before_the_grid(grid: str, spec: str) -> None:
    schedule = Schedule.parse(spec)
    found = Grid.parse(grid).times(schedule, 11)
    level = schedule.at(found)
    assert found[:2].tolist() == [999, 998]
    assert level.log_snr[0] == -math.inf
    measure = level.log_snr[1:] if grid == "log-snr" else torch.exp(-level.log_snr[1:] / 14)
    steps = measure.diff()
    assert (steps / steps.mean() - 1).abs().max() < 1e-6


def test_a_list_of_times_is_visited_as_it_stands() -> None:
    grid = Grid.parse("custom:t=999/700.5/20")
    assert grid.spec == "custom:t=999.0/700.5/20.0"
    for spec in ("linear", "edm"):
        assert grid.times(Schedule.parse(spec), 3).tolist() == [999, 700.5, 20]


@pytest.mark.parametrize(
    ("grid", "spec", "steps", "message"),
    [
        ("custom", "linear", 50, r"'custom' lists 0 times t, but the sampler has steps=50: "),
        ("custom:t=9/5", "linear", 3, r"'custom' lists 2 times t, but the sampler has steps=3: "),
        ("custom:t=5/9", "linear", 2, r"'custom' visits a time twice, or goes back, at steps=2: "),
        ("custom:t=9/9", "edm", 2, r"'custom' visits a time twice, or goes back, at steps=2: "),
        (
            "custom:t=999/0",
            "linear:timesteps=50,scaled=true",
            2,
            r"'custom' leaves the times of schedule 'linear', 49 to 0: ",
        ),
        ("custom:t=999/-1", "vp", 2, r"'custom' leaves the times of schedule 'vp', 999 to 0: "),
        (
            "log-snr:whole=true",
            "linear:timesteps=50",
            49,
            r"'log-snr' visits a time twice, or goes back, at steps=49",
        ),
        (
            "karras:whole=true",
            "linear:timesteps=50",
            49,
            r"'karras' visits a time twice, or goes back, at steps=49",
        ),
    ],
)
def test_times_that_cannot_be_walked_are_refused(grid: str, spec: str, steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^grid .*{message}.*\.$"):
        Grid.parse(grid).times(Schedule.parse(spec), steps)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 50), ("ddpm", 1000)])
def test_a_path_is_falling_levels_then_the_clean_image(name: str, steps: int) -> None:
    path = Sampler.parse(name).path(Schedule.parse("linear"))
    assert len(path) == steps + 1
    assert path[-1].is_clean
    assert all(bool(a.log_snr < b.log_snr) for a, b in pairwise(path))
    assert float(path[0].t) == 999


def test_without_a_table_the_number_of_steps_must_be_given() -> None:
    assert len(Sampler.parse("ddpm:steps=5").path(Schedule.parse("edm"))) == 6
    with pytest.raises(ConfigError, match=r"sampler 'ddpm' needs steps=N on the continuous schedule 'edm'\.$"):
        Sampler.parse("ddpm").path(Schedule.parse("edm"))
