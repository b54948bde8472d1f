"""Samplers: their relations, their promises at the ends of a path, thresholding, and the seam that a new one fills in."""

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.objectives import Prediction
from ddpm.samplers import Sampler, Thresholding
from ddpm.schedules import Level, Schedule, posterior, posterior_variance, step_variance
from tests.samplers.known import (
    CLIP,
    NONE,
    SAMPLERS,
    Wave,
    gaussian,
    mixture,
    noises,
    scores,
    start,
    stepping,
    walk,
    wave_model,
)


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_one_point_of_data_is_reached_in_any_number_of_steps(steps: int) -> None:
    model = gaussian("cosine")
    model.covariances = model.covariances * 0
    x = noises((20, 1, 1, 2))(0)
    for sampler in ("ddim", "ddim:eta=0.7", "ddpm", "ddpm:variance=fixed-small"):
        sampler += f",steps={steps}" if ":" in sampler else f":steps={steps}"
        found = walk(sampler, model, x)[-1].flatten(1)
        assert (found - model.means[0]).abs().max() < 1e-9


def test_the_small_variance_is_exact_for_a_point_and_the_large_for_white_noise() -> None:
    """Ho et al. (2020), section 3.2: the optima for x0 set deterministically and for x0 ~ N(0, I), for skipped steps too."""
    model = gaussian("linear")
    white = torch.eye(2, dtype=torch.float64)[None]
    n = 4000
    z = noises((n, 1, 1, 2))(5)
    for variance, covariance, mean in (
        ("fixed-small", white * 0, model.means[0]),
        ("fixed-large", white, model.means[0]),
    ):
        model.covariances = covariance
        schedule = model.schedule
        level, following = (schedule.at(torch.tensor(t)) for t in (999.0, 400.0))
        generator = torch.Generator().manual_seed(0)
        x0 = mean + torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64) * float(covariance[0, 0, 0])
        x_t = level.alpha * x0 + level.sigma * torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64)
        sampler = Sampler.parse(f"ddpm:variance={variance}")
        found = sampler.step(x_t, level, following, model.predict, lambda: z, []).flatten(1)
        expected = float(following.alpha**2 * covariance[0, 0, 0] + following.sigma**2)
        assert ((found.mean(0) - following.alpha * mean) * (n / expected) ** 0.5).abs().max() < 4
        assert ((found.var(0) - expected) / expected * (n / 2) ** 0.5).abs().max() < 4


# --- relations between samplers


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance() -> None:
    model = mixture("linear")
    x = start(model, 8)
    for steps in (7, 50, 300):
        ddim = walk(f"ddim:steps={steps},eta=1", model, x)
        ddpm = walk(f"ddpm:steps={steps},variance=fixed-small", model, x)
        assert max(float((a - b).abs().max()) for a, b in zip(ddim, ddpm, strict=True)) < 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_one_step_of_ddim_has_the_marginals_of_the_forward_process(eta: float) -> None:
    """Song et al. (2021), lemma 1: whatever eta, x_s given x0 is N(alpha_s x0, sigma_s^2)."""
    schedule = Schedule.parse("linear")
    level, following = schedule.at(torch.tensor(800.0)), schedule.at(torch.tensor(300.0))
    eps, z = noises((50_000, 1, 1, 1))(0), noises((50_000, 1, 1, 1))(1)
    x0 = torch.full_like(eps, 0.6)
    x_t = level.alpha * x0 + level.sigma * eps
    sampler = Sampler.parse(f"ddim:eta={eta}")
    found = sampler.step(x_t, level, following, lambda x, at: Prediction(x0, eps), lambda: z, [])
    normalised = (found - following.alpha * x0) / following.sigma
    assert abs(float(normalised.mean())) * 50_000**0.5 < 4
    assert abs(float(normalised.var()) - 1) * (50_000 / 2) ** 0.5 < 4


def test_the_models_variance_is_used_unless_forced() -> None:
    schedule = Schedule.parse("linear")
    level, following = schedule.at(torch.tensor(800.0)), schedule.at(torch.tensor(300.0))
    x, z = noises((3, 1, 1, 2))(0), noises((3, 1, 1, 2))(1)
    small, large = posterior_variance(level, following), step_variance(level, following)

    def deviation(spec: str, fraction: float | Tensor) -> Tensor:
        model = gaussian("linear", fraction)
        found = Sampler.parse(spec).step(x, level, following, model.predict, lambda: z, [])
        mean, _ = posterior(model.predict(x, level).x0, x, level, following)
        return (found - mean) / z

    each = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    between = (small ** (1 - each) * large**each).sqrt()  # Nichol & Dhariwal (2021), equation 15
    torch.testing.assert_close(deviation("ddpm", each), between.expand(3, 1, 1, 2), rtol=1e-9, atol=0)
    torch.testing.assert_close(deviation("ddpm", 0.5), between[1:2].expand(3, 1, 1, 2), rtol=1e-9, atol=0)
    for fraction in (0.0, 0.3, each):
        forced = deviation("ddpm:variance=fixed-large", fraction)
        torch.testing.assert_close(forced, large.sqrt().expand(3, 1, 1, 2), rtol=1e-9, atol=0)
        forced = deviation("ddpm:variance=fixed-small", fraction)
        torch.testing.assert_close(forced, small.sqrt().expand(3, 1, 1, 2), rtol=1e-9, atol=0)


def test_euler_without_churn_is_ddim() -> None:
    model = mixture("linear")
    x = start(model, 8)
    ours, expected = walk("euler:steps=9", model, x), walk("ddim:steps=9", model, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_dpm_solver_pp_2m_with_eta_is_ddim_where_it_has_no_past() -> None:
    """One step of SDE-DPM-Solver++ is ancestral sampling with the small variance (Lu et al. 2022b)."""
    model = mixture("linear")
    x, path = start(model, 8), Sampler.parse("ddim:steps=5").path(model.schedule)[:2]
    for eta in (0, 1):
        a, b = (walk(f"{name}:eta={eta}", model, x, path=path)[-1] for name in ("dpm++2m", "ddim"))
        assert (a - b).abs().max() < 1e-12


def edm_algorithm_2(
    model: Any, x: Tensor, sigmas: list[float], noise: Any, churn: float, tmin: float, tmax: float
) -> Tensor:
    """Karras et al. (2022), algorithm 2, in numbers; the model is asked for x0 at a sigma."""
    n = len(sigmas) - 1
    for i, (t, following) in enumerate(pairwise(sigmas)):
        gamma = min(churn / n, math.sqrt(2) - 1) if tmin <= t <= tmax else 0.0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * 1.007 * noise(i)
        d = (x_hat - model(x_hat, t_hat)) / t_hat
        x = x_hat + (following - t_hat) * d
        if following != 0:
            d_prime = (x - model(x, following)) / following
            x = x_hat + (following - t_hat) * (d / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize(("churn", "tmin", "tmax"), [(0.0, 0.0, 1e9), (10.0, 0.0, 50.0), (80.0, 0.05, 50.0)])
def test_heun_is_edms_algorithm_2(churn: float, tmin: float, tmax: float, exactness: Any) -> None:
    model = mixture("edm")
    x, noise = start(model, 20), noises((20, 1, 1, 2), 1)
    path = Sampler.parse("ddim:steps=18,grid=linspace").path(model.schedule)

    def x0(y: Tensor, sigma: float) -> Tensor:
        return model.predict(y, Level(*torch.tensor([0.0, 1.0, sigma, -2 * math.log(sigma)], dtype=torch.float64))).x0

    expected = edm_algorithm_2(x0, x, [float(level.sigma) for level in path], noise, churn, tmin, tmax)
    ours = walk(f"heun:steps=18,s_churn={churn},s_tmin={tmin},s_tmax={tmax},s_noise=1.007", model, x, path=path)[-1]
    difference = float((ours - expected).abs().max())
    exactness(f"sampler heun:s_churn={churn:g}", "EDM algorithm 2 written out", "exact", difference, 1e-9)


def test_a_part_of_the_steps_is_churned_as_in_the_whole() -> None:
    model, x, noise = mixture("edm"), start(mixture("edm"), 5), noises((5, 1, 1, 2), 1)
    sampler = Sampler.parse("euler:s_churn=4,steps=20,grid=linspace")
    path, seen = sampler.path(model.schedule), list[Tensor]()
    sampler.walk(model, x, path, None, noise, NONE, lambda i, x_i, x0: seen.append(x_i))
    alone = sampler.walk(model, seen[4], path[5:7], None, lambda i: noise(5), NONE)
    torch.testing.assert_close(alone, seen[5], rtol=0, atol=1e-12)


def test_no_level_is_raised_beyond_the_noisiest() -> None:
    """The first step of a walk from the noisiest level is Euler's, whatever the churn."""
    model, x = mixture("linear"), noises((5, 1, 1, 2))(0)
    path = Sampler.parse("ddim:steps=10").path(model.schedule)[:2]
    assert torch.equal(walk("euler:s_churn=99", model, x, path=path)[-1], walk("ddim", model, x, path=path)[-1])


@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_in_time_integrates_its_polynomial(order: int, exactness: Any) -> None:
    """x_s / alpha_s = x_t / alpha_t + sum_j eps_j integral of l_j(t) drho/dt, integrated by scipy with drho/dt written out."""
    from scipy.integrate import quad

    model, x = mixture("vp"), start(mixture("vp"), 5)
    schedule = model.schedule
    times = [999.0, 900.0, 850.0, 700.0, 640.0][: order + 1]
    path = [schedule.at(torch.tensor(t, dtype=torch.float64)) for t in times]
    before = [x, *walk(f"deis:order={order}", model, x, path=path)]
    eps = [model.predict(y, level).eps for y, level in zip(before, path, strict=True)][:order]

    def slope(t: float) -> float:
        u = (t + 1) / 1000
        log_alpha, rate = -(u**2) * 19.9 / 4 - u * 0.1 / 2, (-u * 19.9 / 2 - 0.1 / 2) / 1000
        return -math.exp(-2 * log_alpha) * rate / math.sqrt(math.expm1(-2 * log_alpha))

    def basis(j: int, t: float) -> float:
        return math.prod((t - other) / (times[j] - other) for k, other in enumerate(times[:order]) if k != j)

    weights = [quad(lambda t, j=j: basis(j, t) * slope(t), times[-2], times[-1], epsabs=1e-13)[0] for j in range(order)]
    added = sum(weight * e for weight, e in zip(weights, eps, strict=True))
    expected = path[-1].alpha * (before[-2] / path[-2].alpha + added)
    difference = float((before[-1] - expected).abs().max())
    exactness(f"sampler deis:order={order}", "integral of its polynomial in t by scipy", "exact", difference, 1e-9)


# --- the ends of a path


def test_the_list_of_the_tests_names_every_sampler() -> None:
    assert {spec.partition(":")[0] for spec in SAMPLERS} == set(Sampler.names())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_step_to_the_clean_image_adds_no_noise(sampler: str) -> None:
    model, x = mixture("linear"), noises((3, 1, 1, 2))(0)
    path = [model.schedule.at(torch.tensor(40.0)), model.schedule.clean]
    built = Sampler.parse(sampler.replace("s_churn=8", "s_churn=0"))
    end = built.walk(model, x, path, None, lambda i: torch.full_like(x, torch.nan), NONE)
    torch.testing.assert_close(end, model.predict(x, path[0]).x0, rtol=0, atol=1e-12)


PURE_NOISE = Level(*(torch.tensor(v, dtype=torch.float64) for v in (999.0, 0.0, 1.0, -math.inf)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_a_walk_may_start_from_pure_noise(sampler: str, steps: int) -> None:
    """At zero terminal SNR (alpha = 0) every step is finite, and with steps enough the mean is right."""
    model, n = mixture("linear"), 600
    path = [PURE_NOISE, *Sampler.parse(f"ddim:steps={steps}").path(model.schedule)[1:]]
    seen = walk(sampler, model, noises((n, 1, 1, 2))(7), path=path)
    assert all(bool(x.isfinite().all()) for x in seen)
    if steps == 40:
        mean, covariance = model.moments()
        z = (seen[-1].flatten(1).mean(0) - mean) / (covariance.diagonal() / n).sqrt()
        assert z.abs().max() < 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inversion_is_undone_by_sampling_or_refused(sampler: str) -> None:
    """Both follow the same flow, so the error falls as steps grow; solvers that draw noise have no flow to follow back."""
    model = mixture("vp")
    images = model.draw(12, torch.Generator().manual_seed(2))
    if not Sampler.parse(sampler).rises:
        with pytest.raises(ConfigError, match=r"walks from noise to image only; .* ddim:eta=0\.$"):
            Sampler.parse(stepping(sampler, 20)).invert(model, images)
        return
    errors = []
    for steps in (15, 45, 135):
        built = Sampler.parse(stepping(sampler, steps))
        back = built.sample(model, built.invert(model, images, None, NONE), None, lambda i: images * torch.nan, NONE)
        errors.append(float((back - images).norm() / images.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_inversion_ends_in_standard_normal_noise() -> None:
    """Where x is as wide as its level (edm: 80), that is divided out."""
    for schedule in ("vp", "edm"):
        model = gaussian(schedule)
        images = model.draw(2000, torch.Generator().manual_seed(2))
        found = Sampler.parse("heun:steps=40,grid=linspace").invert(model, images, None, NONE).flatten(1)
        assert scores(found, torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)) < 4


def test_a_rising_path_may_end_in_pure_noise() -> None:
    model = mixture("linear")
    images = model.draw(6, torch.Generator().manual_seed(2))
    path = [PURE_NOISE, *Sampler.parse("ddim:steps=12").path(model.schedule)[1:]][::-1]
    for sampler in SAMPLERS:
        if Sampler.parse(sampler).rises:
            assert walk(sampler, model, images, path=path)[-1].isfinite().all(), sampler


@pytest.mark.parametrize("sampler", [spec for spec in SAMPLERS if Sampler.parse(spec).rises])
def test_errors_at_the_noisiest_level_are_not_multiplied(sampler: str) -> None:
    """On the cosine table sigma / alpha begins at 20,000, and a step of higher order in eps would multiply errors by that."""
    model = mixture("cosine")
    exact, x = model.predict, noises((50, 1, 1, 2))(0)

    def astray(x_t: Tensor, level: Level, condition: Any = None) -> Prediction:
        found = exact(x_t, level)
        x0 = found.x0 + 0.02 * torch.sin(9 * x_t + level.t)
        return Prediction(x0, (x_t - level.alpha * x0) / level.sigma + 0.002 * torch.cos(7 * x_t + level.t))

    right = walk(stepping(sampler, 20), model, x)[-1]
    model.predict = astray  # type: ignore[method-assign]
    assert (walk(stepping(sampler, 20), model, x)[-1] - right).abs().mean() < 0.05


def test_pndm_refuses_unequal_strides() -> None:
    model, x = mixture("linear"), noises((2, 1, 1, 2))(0)
    with pytest.raises(
        ConfigError, match=r"'pndm' needs equal strides in time, and these are .* take another sampler\.$"
    ):
        walk("pndm:steps=10,grid=quadratic", model, x)
    for steps in (1, 2, 3, 7, 30, 300):  # rounded to the table, strides differ by one
        assert walk(f"pndm:steps={steps}", model, x)[-1].isfinite().all()


def test_analytic_ddim_refuses_a_model_without_the_variance() -> None:
    with pytest.raises(ConfigError, match=r"^sampler ddim:analytic=true: this model knows no analytic variance; .*\.$"):
        walk("ddim:analytic=true", mixture("linear"), noises((2, 1, 1, 2))(0))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_coefficients_are_float64_and_images_keep_their_type(sampler: str) -> None:
    """In float32 the images differ from those of float64 by rounding alone, as the noise levels are not rounded."""
    model, x = wave_model(), noises((4, 1, 2, 3))(0)
    built, noise = Sampler.parse(stepping(sampler, 12)), noises(x.shape, 1)
    wide = built.sample(model, x, None, noise, CLIP)
    narrow = built.sample(model, x.float(), None, lambda i: noise(i).float(), CLIP)
    assert narrow.dtype == torch.float32
    assert (narrow - wide).abs().max() < 1e-4


# --- network evaluations

EVALUATIONS = {  # of n steps to the clean image, n >= 4
    "ddpm": lambda n: n,
    "ddim": lambda n: n,
    "euler:s_churn=8": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "dpm-solver:order=2": lambda n: 2 * n - 1,
    "dpm-solver:order=3": lambda n: 3 * n - 2,
    "dpm++2s": lambda n: 2 * n - 1,
    "dpm++2m": lambda n: n,
    "dpm++3m": lambda n: n,
    "unipc": lambda n: n,
    "deis": lambda n: n,
    "lms": lambda n: n,
    "pndm": lambda n: n + 9,
    "pndm:warm_up=euler": lambda n: n + 1,
}


@pytest.mark.parametrize("sampler", EVALUATIONS)
@pytest.mark.parametrize("steps", [4, 11])
def test_evaluations_are_what_the_model_is_asked(sampler: str, steps: int) -> None:
    model, asked = wave_model(), []
    model.network.register_forward_hook(lambda *_: asked.append(1))
    spec = stepping(sampler, steps)
    walk(spec, model, noises((2, 1, 2, 3))(0))
    assert len(asked) == Sampler.parse(spec).evaluations(model.schedule) == EVALUATIONS[sampler](steps)


def test_evaluations_of_every_sampler_with_its_defaults() -> None:
    schedule = Schedule.parse("linear:timesteps=60")
    assert {name: Sampler.parse(name).evaluations(schedule) for name in Sampler.names()} == {
        "ddim": 50, "ddpm": 60, "deis": 50, "dpm++2m": 50, "dpm++2s": 99, "dpm++3m": 50, "dpm-solver": 148,
        "euler": 50, "heun": 99, "lms": 50, "pndm": 59, "unipc": 50,
    }  # fmt: skip


# --- thresholding


def test_thresholding_clamps_or_leaves_alone() -> None:
    x0 = torch.tensor([-3.0, -1.0, 0.2, 1.5])
    assert CLIP.apply(x0).tolist() == pytest.approx([-1, -1, 0.2, 1])
    assert torch.equal(NONE.apply(x0), x0)


def test_dynamic_thresholding_takes_each_image_by_itself() -> None:
    """Saharia et al. (2022): x0 is clamped to [-s, s] and divided by s, at least 1; where s is 1 that is clipping."""
    rule = Thresholding.parse("dynamic:percentile=1")
    x0 = torch.tensor([[-3.0, 1.5, 0.0], [0.5, -0.2, 0.1]], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(rule.apply(x0).flatten(1), torch.tensor([[-1.0, 0.5, 0.0], [0.5, -0.2, 0.1]]).double())
    capped = Thresholding.parse("dynamic:percentile=1,max=2").apply(x0)
    torch.testing.assert_close(capped.flatten(1)[0], torch.tensor([-1.0, 0.75, 0.0]).double())
    assert torch.equal(Thresholding.parse("dynamic:max=1").apply(x0), CLIP.apply(x0))
    many = noises((7, 1, 4, 4))(0) * 3
    for name in ("dynamic", "dynamic:percentile=0.5,max=1.2"):
        whole = Thresholding.parse(name).apply(many)
        assert all(torch.equal(Thresholding.parse(name).apply(many[i : i + 1])[0], whole[i]) for i in range(7))
        assert whole.abs().max() <= 1
        assert Thresholding.parse(name).apply(many.bfloat16()).dtype == torch.bfloat16


def test_the_samplers_own_thresholding_goes_before_the_models() -> None:
    model, x = wave_model(), noises((2, 1, 2, 3))(0)
    clipped, free = (walk("ddim:steps=5", model, x, rule)[-1] for rule in (CLIP, NONE))
    assert clipped.abs().max() <= 1
    assert free.abs().max() > 1
    assert torch.equal(walk("ddim:steps=5,thresholding=none", model, x, CLIP)[-1], free)
    assert torch.equal(walk("ddim:steps=5,thresholding=clip", model, x, NONE)[-1], clipped)


def test_eps_is_derived_again_from_the_clamped_x0() -> None:
    """x_s = alpha_s x0 + sigma_s (x_t - alpha_t x0) / sigma_t with the clamped x0."""
    model, x = wave_model(), noises((2, 1, 2, 3))(0) * 3
    path = Sampler.parse("ddim:steps=2").path(model.schedule)
    first = walk("ddim:steps=2", model, x, CLIP)[0]
    level, following = path[0], path[1]
    x0 = ((x - level.sigma * Wave()(x, torch.full((2,), 999.0))) / level.alpha).clamp(-1, 1)
    expected = following.alpha * x0 + following.sigma * (x - level.alpha * x0) / level.sigma
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-7)


def test_progress_tells_x_and_the_predicted_x0() -> None:
    model = mixture("linear")
    x, seen = start(model, 3), []
    Sampler.parse("ddim:steps=4").sample(
        model, x, None, noises(x.shape), NONE, lambda i, x_i, x0: seen.append((i, x_i, x0))
    )
    assert [i for i, *_ in seen] == [0, 1, 2, 3]
    levels = Sampler.parse("ddim:steps=4").path(model.schedule)
    for level, before, (_, _, x0) in zip(levels, [x, *(s[1] for s in seen)], seen, strict=False):
        assert torch.equal(x0, model.predict(before, level).x0)
    assert torch.equal(seen[-1][1], seen[-1][2])


def test_each_step_has_noise_of_its_own() -> None:
    model, asked = mixture("linear"), []
    x = start(model, 3)

    def noise(i: int) -> Tensor:
        asked.append(i)
        return noises(x.shape)(i)

    Sampler.parse("ddpm:steps=5").sample(model, x, None, noise, NONE)
    assert asked == [0, 1, 2, 3]
    asked.clear()
    Sampler.parse("ddim:steps=5").sample(model, x, None, noise, NONE)
    assert asked == []


# --- outside the package


OUTSIDE = '''
from ddpm.registry import register
from ddpm.samplers import Sampler


@register("two-point")
class TwoPoint(Sampler):
    """Second order: the mean of this x0 and the last one, with memory within a path."""

    weight: float = 0.5

    def step(self, x, level, following, denoise, noise, history):
        prediction = denoise(x, level)
        history.append(prediction.x0)
        x0 = history[-1] if len(history) == 1 else (1 + self.weight) * history[-1] - self.weight * history[-2]
        return following.alpha * x0 + following.sigma * (x - level.alpha * x0) / level.sigma
'''


def test_a_sampler_from_outside_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One class with one step; at weight 0 it is DDIM, and its memory is empty at the start of every path."""
    (tmp_path / "their_sampler.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Sampler, "registered", dict(Sampler.registered))
    model = gaussian("linear")
    x = start(model, 10)
    plain = walk("their_sampler:TwoPoint:weight=0,steps=9,grid=linspace", model, x)
    for a, b in zip(plain, walk("ddim:steps=9,grid=linspace", model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    ours = [walk("their_sampler:TwoPoint:steps=9", model, x)[-1] for _ in range(2)]
    assert torch.equal(*ours)
    assert not torch.allclose(ours[0], plain[-1])
    sys.modules.pop("their_sampler")


def test_no_gradient_is_kept() -> None:
    model = mixture("linear")
    x = start(model, 2).requires_grad_()
    assert not walk("ddim:steps=3", model, x)[-1].requires_grad


def test_the_model_is_asked_once_at_each_level_of_the_path() -> None:
    model, seen = mixture("cosine"), []
    inner = model.predict

    def predict(x: Tensor, level: Any, condition: Any = None) -> Prediction:
        seen.append(float(level.t))
        return inner(x, level, condition)  # type: ignore[no-any-return]

    model.predict = predict
    walk("ddim:steps=5", model, start(model, 2))
    assert seen == [999, 799, 599, 399, 199]
