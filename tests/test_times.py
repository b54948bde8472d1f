"""Training times: their distributions, and the history of losses against a loop written down by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.randomness import Stream
from ddpm.schedules import Schedule
from ddpm.times import LossHistory, Times, radical_inverse

N = 20_000


def stream(n: int = N, first: int = 0, step: int = 4) -> Stream:
    return Stream(5, torch.arange(first, first + n), step=step)


def draw(times: str, schedule: str, s: Stream) -> Tensor:
    built, parsed = Times.parse(times), Schedule.parse(schedule)
    t, factor = built.draw(s, parsed, built.memory(parsed))
    assert factor is None or bool((factor == 1).all())
    assert t.dtype == torch.float64
    return t


@pytest.mark.parametrize("schedule", ["linear:timesteps=100", "edm"])
def test_uniform_times_are_the_schedules_own(schedule: str) -> None:
    expected = Schedule.parse(schedule).draw(stream(500).at("time").uniform())
    assert torch.equal(draw("uniform", schedule, stream(500)), expected)


@pytest.mark.parametrize("times", Times.names())
@pytest.mark.parametrize("schedule", ["cosine:timesteps=50", "edm"])
def test_a_time_does_not_depend_on_the_rest_of_the_batch(times: str, schedule: str) -> None:
    if times == "loss-second-moment" and schedule == "edm":
        return
    parts = torch.cat([draw(times, schedule, stream(j - i, first=i)) for i, j in ((0, 1), (1, 30), (30, 64))])
    # In real time the last bit of a logarithm or exponential is that of the vector units it went through.
    torch.testing.assert_close(parts, draw(times, schedule, stream(64)), rtol=1e-13 if schedule == "edm" else 0, atol=0)
    assert not torch.equal(draw(times, schedule, stream(64)), draw(times, schedule, stream(64, step=5)))


def test_the_radical_inverse_mirrors_bits() -> None:
    assert radical_inverse(torch.arange(8)).tolist() == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    assert float(radical_inverse(torch.tensor(2**32 - 1))) == 1 - 2.0**-32


@pytest.mark.parametrize("n", [2, 16, 128])
def test_stratified_times_hold_one_of_each_stratum(n: int) -> None:
    """On 999 n equal parts of [0, 999], whatever the shift: each of n strata has one time."""
    for step in range(20):
        u = draw("stratified", "edm", stream(n, step=step)) / 999.0
        assert torch.equal((u * n).floor().sort().values, torch.arange(n, dtype=torch.float64))


def test_stratified_times_of_any_batch_are_spread_more_evenly_than_chance_can_and_uniform_over_steps(
    exactness: Any,
) -> None:
    for n in (48, 100, 127):
        u = np.sort((draw("stratified", "edm", stream(n)) / 999.0).numpy())
        gap = max(np.abs(np.arange(n + 1)[i:][:n] / n - u).max() for i in (0, 1))
        assert gap < (math.log2(n) / 3 + 1) / n  # van der Corput's discrepancy
    first = np.array([float(draw("stratified", "edm", stream(1, step=step))) / 999.0 for step in range(500)])
    z = abs(first.mean() - 0.5) * math.sqrt(12 * 500)
    exactness("times stratified", "mean of the uniform distribution", "statistical", z, 4)


def normal_z(values: np.ndarray, mean: float, std: float) -> float:
    """The larger z of mean, variance and the Kolmogorov-Smirnov distance as a normal quantile."""
    unit = (values - mean) / std
    of_distance = stats.norm.isf(stats.kstest(unit, "norm").pvalue / 2)
    of_moments = (abs(unit.mean()) * math.sqrt(len(unit)), abs(unit.var() - 1) * math.sqrt(len(unit) / 2))
    return float(max(of_distance, *of_moments))


def test_logit_normal_times_have_a_normal_logit(exactness: Any) -> None:
    u = (draw("logit-normal:mean=-0.5,std=0.8", "vp", stream()) / 999.0).numpy()
    z = normal_z(np.log(u / (1 - u)), -0.5, 0.8)
    exactness("times logit-normal", "normal distribution", "statistical", z, 4)
    table = draw("logit-normal:mean=-0.5,std=0.8", "linear:timesteps=40", stream())
    assert torch.equal(table, torch.from_numpy(np.floor(u * 40)))


def test_log_normal_times_have_a_normal_log_sigma(exactness: Any) -> None:
    edm = Schedule.parse("edm:sigma_min=1e-6,sigma_max=1e4")
    sigma = edm.at(draw("log-normal", edm.spec, stream())).sigma.numpy()
    exactness("times log-normal", "normal distribution, edm", "statistical", normal_z(np.log(sigma), -1.2, 1.2), 4)

    plain = Schedule.parse("edm").at(draw("log-normal:mean=0,std=9", "edm", stream())).sigma
    assert (float(plain.min()), float(plain.max())) == pytest.approx((0.002, 80.0))

    cosine = Schedule.parse("cosine")
    t = draw("log-normal", "cosine", stream())
    level = cosine.at(t)
    wanted = -1.2 + 1.2 * stream().at("time").normal().double()
    assert torch.equal(t, t.round())
    inside = (t > 0) & (t < 999)
    below, above = (cosine.at(t + shift) for shift in (-0.5, 0.5))
    log_sigma = [(at.sigma / at.alpha).log() for at in (below, level, above)]
    assert ((log_sigma[0] <= wanted + 1e-9) & (wanted <= log_sigma[2] + 1e-9))[inside].all()
    assert inside.double().mean() > 0.95


# --- loss-second-moment


class ByHand:
    """Nichol & Dhariwal (2021), section 3.3, a loss at a time."""

    def __init__(self, timesteps: int, n: int, uniform: float) -> None:
        self.held: list[list[float]] = [[] for _ in range(timesteps)]
        self.n, self.uniform = n, uniform

    def add(self, t: np.ndarray, losses: np.ndarray) -> None:
        for i, loss in zip(t, losses, strict=True):
            self.held[int(i)] = [*self.held[int(i)], float(loss)][-self.n :]

    def p(self) -> np.ndarray:
        if any(len(held) < self.n for held in self.held):
            return np.full(len(self.held), 1 / len(self.held))
        moments = np.array([math.sqrt(sum(loss**2 for loss in held) / self.n) for held in self.held])
        return moments / moments.sum() * (1 - self.uniform) + self.uniform / len(self.held)


def test_times_follow_the_second_moments_of_past_losses(exactness: Any) -> None:
    """Batches in which a timestep comes more often than the history is long; before and after every history is full."""
    schedule, times = Schedule.parse("cosine:timesteps=6"), Times.parse("loss-second-moment:history=3,uniform=0.01")
    memory, by_hand = times.memory(schedule), ByHand(6, 3, 0.01)
    assert memory is not None
    worst, warm = 0.0, 0
    for step in range(12):
        s = stream(16, step=step)
        t, factor = times.draw(s, schedule, memory)
        assert factor is not None
        p = by_hand.p()
        if (p == p[0]).all():
            assert torch.equal(t, schedule.draw(s.at("time").uniform()))
            warm += 1
        else:
            expected = np.searchsorted(np.cumsum(p), s.at("time").uniform().numpy())
            assert (t.numpy() == expected).all()
        worst = max(worst, np.abs(factor.numpy() * 6 * p[t.long().numpy()] - 1).max())
        losses = (t + 1) * (1 + torch.rand(16, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
        memory.add(t, losses)
        by_hand.add(t.numpy(), losses.numpy())
        for row, held, count in zip(memory.losses, by_hand.held, memory.counts, strict=True):
            kept = [float(row[i % 3]) for i in range(max(0, int(count) - 3), int(count))]
            assert kept == held
    assert 0 < warm < 6
    exactness("times loss-second-moment", "equation 18, a loss at a time", "exact", worst, 1e-9)


def test_importance_weights_keep_the_mean_loss(exactness: Any) -> None:
    schedule, times = Schedule.parse("cosine:timesteps=5"), Times.parse("loss-second-moment:history=1")
    memory = times.memory(schedule)
    assert memory is not None
    loss = torch.tensor([9.0, 3.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    memory.add(torch.arange(5), loss)
    t, factor = times.draw(stream(), schedule, memory)
    assert factor is not None
    weighted = factor * loss[t.long()]
    z = abs(float(weighted.mean() - loss.mean())) / float(weighted.std() / math.sqrt(N))
    exactness("times loss-second-moment: mean loss", "uniform times", "statistical", z, 4)
    assert float(weighted.std()) < 0.1 * float(loss.std())
    counts = torch.bincount(t.long(), minlength=5).double() / N
    p = loss / loss.sum() * 0.999 + 0.001 / 5
    assert ((counts - p).abs() < 4 * (p * (1 - p) / N).sqrt()).all()


def test_a_history_without_loss_is_no_reason_to_leave_a_time_out() -> None:
    times, schedule = Times.parse("loss-second-moment:history=1,uniform=0"), Schedule.parse("linear:timesteps=3")
    memory = LossHistory(3, 1)
    memory.add(torch.arange(3), torch.zeros(3))
    t, factor = times.draw(stream(300), schedule, memory)
    assert set(t.tolist()) == {0, 1, 2}
    assert factor is not None and factor.isfinite().all()


def test_losses_are_remembered_for_numbered_steps_only() -> None:
    with pytest.raises(ConfigError, match=r"--diffusion\.times=loss-second-moment needs a schedule of numbered steps"):
        Times.parse("loss-second-moment").check(Schedule.parse("vp"))
