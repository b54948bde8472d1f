"""Sweeps: the front and the recommendation against tables made by hand."""

import itertools
from typing import Any

import pytest

from ddpm import sweep
from ddpm.errors import ConfigError
from ddpm.evaluation.metrics import Estimate
from ddpm.samplers import Sampler
from ddpm.schedules import Schedule
from ddpm.sweep import Cell


def cell(label: str, evaluations: float, value: float, half: float = 0.5, seconds: float | None = None) -> Cell:
    time = Estimate(seconds or evaluations / 100, 0.0, 1.0)
    return Cell(label, label, 1, evaluations, Estimate(value, value - half, value + half), time, "")


CELLS = [cell("a", 5, 9.0), cell("b", 10, 4.0), cell("c", 10, 6.0), cell("d", 20, 4.0), cell("e", 50, 3.8)]


def test_a_cell_on_the_front_is_better_than_all_that_cost_no_more() -> None:
    for count in range(1, len(CELLS) + 1):
        for chosen in itertools.combinations(CELLS, count):
            found = sweep.front(chosen, lambda c: c.evaluations)
            expected = [
                c
                for c in chosen
                if not any(
                    o is not c
                    and o.evaluations <= c.evaluations
                    and o.quality.value <= c.quality.value
                    and (o.evaluations, o.quality.value) != (c.evaluations, c.quality.value)
                    for o in chosen
                )
            ]
            assert found == expected


def test_the_quickest_that_is_as_good_as_the_best_is_recommended() -> None:
    assert sweep.recommend(CELLS).label == "b"  # 4.0 lies within 3.8 +- 0.5, in a fifth of the time
    assert sweep.recommend([cell("x", 5, 2.0, 0.1), cell("y", 50, 1.0, 0.1)]).label == "y"


def test_the_verdict_names_both_sides_and_the_share_of_time() -> None:
    ancestral = cell("ddpm", 1000, 3.7, half=0.4, seconds=10.0)
    assert sweep.verdict(CELLS, ancestral, 20) == (
        "b with 10 evaluations (4) is no worse than ddpm with 1000 (3.7), in 1/100 of its time."
    )
    assert "is worse than ddpm" in sweep.verdict(CELLS[:1], ancestral, 20)
    assert sweep.verdict(CELLS, ancestral, 4) == ""


@pytest.mark.parametrize("spec", ["ddim", "ddpm", "heun", "dpm++2m"])
@pytest.mark.parametrize("budget", [1, 7, 20])
def test_a_budget_is_used_up_as_far_as_it_goes(spec: str, budget: int) -> None:
    schedule = Schedule.parse("cosine")
    fitted = sweep.fit(Sampler.parse(spec), budget, schedule)
    assert fitted is not None and fitted.steps is not None
    assert fitted.evaluations(schedule) <= budget
    more = Sampler.parse(f"{spec}:steps={fitted.steps + 1}")
    assert more.evaluations(schedule) > budget


def test_a_plan_keeps_specs_with_steps_and_says_what_does_not_fit() -> None:
    schedule = Schedule.parse("linear:timesteps=10")
    planned, notes = sweep.plan(["ddim", "ddpm:steps=7", "ddim:eta=1"], [4, 8], schedule)
    assert [(label, sampler.steps) for label, sampler in planned] == [
        ("ddim", 4), ("ddim", 8), ("ddpm:steps=7", 7), ("ddim:eta=1", 4), ("ddim:eta=1", 8),
    ]  # fmt: skip
    assert notes == []
    with pytest.raises(ConfigError, match="10 timesteps"):
        sweep.plan(["ddim:steps=11"], [4], schedule)
    with pytest.raises(ConfigError, match="did you mean"):
        sweep.plan(["ddimm"], [4], schedule)


def test_rounds_run_every_task_in_turn() -> None:
    order: list[str] = []
    tasks: dict[str, Any] = {name: lambda name=name: order.append(name) for name in "ab"}
    found = sweep.interleave(tasks, 2)
    assert order == ["a", "b"] * 3
    assert all(0 <= value.low <= value.value <= value.high for value in found.values())  # type: ignore[operator]
