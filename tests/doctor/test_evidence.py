"""Shares and means against scipy and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from ddpm.doctor.evidence import BY_CHANCE, Effect, at_least_by_chance, is_less, is_more


@pytest.mark.parametrize(
    ("hits", "trials", "share"), [(0, 5, 0.3), (5, 5, 0.3), (3, 64, 0.01), (64, 64, 0.8), (700, 2000, 0.31)]
)
def test_the_binomial_tail_is_scipys(hits: int, trials: int, share: float) -> None:
    assert at_least_by_chance(hits, trials, share) == pytest.approx(
        float(stats.binom.sf(hits - 1, trials, share)), rel=1e-9
    )


def test_shares_that_are_certain() -> None:
    assert at_least_by_chance(1, 5, 0.0) == 0.0
    assert at_least_by_chance(5, 5, 1.0) == 1.0


def test_more_and_less_are_sure() -> None:
    assert is_more(64, 64, 0.8)
    assert not is_more(58, 64, 0.8)
    assert is_less(0, 64, 0.2)
    assert not is_less(8, 64, 0.2)
    assert pytest.approx(float(stats.norm.sf(4)), rel=1e-9) == BY_CHANCE


def test_an_effect_is_a_mean_and_its_z() -> None:
    numbers = np.random.default_rng(0).normal(1.0, 2.0, 50)
    found = Effect.of(numbers)
    assert found.mean == pytest.approx(numbers.mean())
    assert found.z == pytest.approx(stats.ttest_1samp(numbers, 0).statistic)


@pytest.mark.parametrize(("number", "z"), [(0.0, 0.0), (3.0, math.inf), (-3.0, -math.inf)])
def test_equal_numbers_are_certain(number: float, z: float) -> None:
    assert Effect.of([number] * 5) == Effect(number, z)


def test_an_alarm_needs_both_size_and_certainty() -> None:
    assert Effect(0.2, 5.0).above(0.1)
    assert not Effect(0.2, 3.0).above(0.1)
    assert not Effect(0.05, 50.0).above(0.1)
    assert Effect(-0.2, -5.0).below(-0.1)
    assert not Effect(-0.05, -50.0).below(-0.1)
