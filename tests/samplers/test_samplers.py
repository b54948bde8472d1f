"""Samplers against exact denoisers, closed forms, and diffusers' schedulers step by step with the same noise."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.models import GaussianDiffusion
from ddpm.objectives import Objective, Prediction
from ddpm.samplers import Sampler, Thresholding
from ddpm.schedules import Schedule, posterior, posterior_variance, step_variance

NONE, CLIP = Thresholding.parse("none"), Thresholding.parse("clip")


def noises(shape: Sequence[int], seed: int = 0) -> Callable[[int], Tensor]:
    """noise(i): always the same for one i."""
    return lambda i: torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64)


def walk(sampler: str, model: Any, x: Tensor, rule: Thresholding = NONE, seed: int = 1) -> list[Tensor]:
    """x after every step."""
    seen: list[Tensor] = []
    end = Sampler.parse(sampler).sample(
        model, x, None, noises(x.shape, seed), rule, lambda i, x_i, x0: seen.append(x_i.clone())
    )
    assert torch.equal(end, seen[-1])
    return seen


# --- exact denoisers


def start(model: Any, n: int) -> Tensor:
    """Points at the noisiest level exactly as the forward process gives them."""
    generator = torch.Generator().manual_seed(3)
    level = model.schedule.at(torch.tensor(model.schedule.first))
    x0 = model.draw(n, generator)
    return level.alpha * x0 + level.sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


def slope(errors: list[float], counts: list[int]) -> float:
    return float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def test_ddim_reaches_the_exact_flow_of_a_gaussian_at_first_order(gaussian: Any) -> None:
    """Of Gaussian data the flow keeps (alpha^2 C + sigma^2)^(-1/2) (x_t - alpha mu) constant."""
    model = gaussian("linear:timesteps=4000,scaled=true")
    x = start(model, 200)
    level = model.schedule.at(torch.tensor(3999.0))
    variances, axes = torch.linalg.eigh(model.covariances[0])
    scale = (variances / (level.alpha**2 * variances + level.sigma**2)).sqrt()
    flow = axes @ torch.diag(scale) @ axes.T
    exact = model.means[0] + (x.flatten(1) - level.alpha * model.means[0]) @ flow.T
    counts = [10, 20, 40, 80]
    errors = [float((walk(f"ddim:steps={n}", model, x)[-1].flatten(1) - exact).norm()) for n in counts]
    assert slope(errors, counts) == pytest.approx(-1, abs=0.3)
    assert errors[-1] < 0.05 * float(exact.norm())


def test_ddim_reaches_the_flow_of_a_mixture_at_first_order(mixture: Any) -> None:
    model = mixture("linear:timesteps=2000,scaled=true")
    x = start(model, 100)
    fine = walk("ddim:steps=none", model, x)[-1]
    counts = [25, 50, 100, 200]
    errors = [float((walk(f"ddim:steps={n}", model, x)[-1] - fine).norm()) for n in counts]
    assert slope(errors, counts) == pytest.approx(-1, abs=0.3)


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_ancestral_sampling_reaches_mean_and_covariance(
    data: str, variance: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(data)("linear")
    n = 1500
    found = walk(f"ddpm:variance={variance}", model, start(model, n))[-1].flatten(1)
    weights, means, covariances = model.weights[:, None], model.means, model.covariances
    mean = (weights * means).sum(0)
    off = means - mean
    covariance = (weights[..., None] * (covariances + off[:, :, None] * off[:, None])).sum(0)
    z = (found.mean(0) - mean) / (covariance.diagonal() / n).sqrt()
    assert z.abs().max() < 4
    products = (found - mean)[:, :, None] * (found - mean)[:, None]
    z = (products.mean(0) - covariance) / (products.var(0) / n).sqrt()
    assert z.abs().max() < 4


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_one_point_of_data_is_reached_in_any_number_of_steps(gaussian: Any, steps: int) -> None:
    model = gaussian("cosine")
    model.covariances = model.covariances * 0
    x = noises((20, 1, 1, 2))(0)
    for sampler in ("ddim", "ddim:eta=0.7", "ddpm", "ddpm:variance=fixed-small"):
        sampler += f",steps={steps}" if ":" in sampler else f":steps={steps}"
        found = walk(sampler, model, x)[-1].flatten(1)
        assert (found - model.means[0]).abs().max() < 1e-9


def test_the_small_variance_is_exact_for_a_point_and_the_large_for_white_noise(gaussian: Any) -> None:
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


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance(mixture: Any) -> None:
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


def test_the_models_variance_is_used_unless_forced(gaussian: Any) -> None:
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


@pytest.mark.parametrize("sampler", Sampler.names())
def test_the_last_step_adds_no_noise(sampler: str, mixture: Any) -> None:
    model = mixture("linear")
    level = model.schedule.at(torch.tensor(40.0))
    x = noises((3, 1, 1, 2))(0)
    options = ":eta=1" if sampler == "ddim" else ""
    end = Sampler.parse(sampler + options).step(
        x, level, model.schedule.clean, model.predict, lambda: torch.full_like(x, torch.nan), []
    )
    torch.testing.assert_close(end, model.predict(x, level).x0, rtol=0, atol=1e-12)


# --- against diffusers


class Wave(nn.Module):
    """A network whose predicted x0 leaves [-1, 1] often."""

    def forward(self, x: Tensor, noise_label: Tensor, condition: Any = None, stream: Any = None) -> Tensor:
        return torch.sin(2 * x + noise_label[:, None, None, None] / 50)


def wave_model(variance: str = "fixed-large", schedule: str = "linear") -> GaussianDiffusion:
    return GaussianDiffusion(
        Wave(), Schedule.parse(schedule), Objective.parse("eps"), shape=(1, 2, 3), variance=variance
    )


def float64_tables(scheduler: Any, model: GaussianDiffusion) -> Any:
    """Theirs are float32; the comparison is of the formulas (the tables are compared in test_schedules.py)."""
    scheduler.betas = model.schedule.betas
    scheduler.alphas = 1 - model.schedule.betas
    scheduler.alphas_cumprod = model.schedule.alphas_cumprod
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def theirs(
    scheduler: Any, x: Tensor, noise: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Tensor]:
    """diffusers' own loop, with our noise where it draws its own."""
    steps: list[Tensor] = []
    for i, t in enumerate(scheduler.timesteps):
        for module in ("ddpm", "ddim"):
            name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
            monkeypatch.setattr(name, lambda *args, i=i, **kwargs: noise(i))
        output = Wave()(x, t.float().expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
        steps.append(x)
    return steps


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("timesteps", "steps"), [(300, 300), (1000, 20), (1000, 7)])
def test_ddpm_is_that_of_diffusers_step_by_step(
    variance: str, clip: bool, timesteps: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDPMScheduler

    model = wave_model(variance, f"linear:timesteps={timesteps}")
    scheduler = DDPMScheduler(timesteps, variance_type=variance.replace("-", "_"), clip_sample=clip)
    float64_tables(scheduler, model).set_timesteps(steps)
    x, noise = noises((2, 1, 2, 3))(0), noises((2, 1, 2, 3), 1)
    ours = walk(f"ddpm:steps={steps},grid=leading", model, x, CLIP if clip else NONE)
    expected = theirs(scheduler, x, noise, monkeypatch)
    assert len(ours) == len(expected) == steps
    # Without clipping the wave lets x grow to hundreds; rounding grows with it.
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-7 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("steps", "grid"), [(50, "leading"), (7, "leading"), (10, "trailing")])
def test_ddim_is_that_of_diffusers_step_by_step(
    eta: float, clip: bool, steps: int, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDIMScheduler

    model = wave_model()
    scheduler = DDIMScheduler(1000, clip_sample=clip, timestep_spacing=grid)
    float64_tables(scheduler, model).set_timesteps(steps)
    x, noise = noises((2, 1, 2, 3))(0), noises((2, 1, 2, 3), 1)
    ours = walk(f"ddim:steps={steps},eta={eta},grid={grid}", model, x, CLIP if clip else NONE)
    expected = theirs(scheduler, x, noise, monkeypatch, eta=eta, use_clipped_model_output=clip)
    assert len(ours) == len(expected) == steps
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-7 * max(1.0, float(b.abs().max()))


# --- thresholding


def test_thresholding_clamps_or_leaves_alone() -> None:
    x0 = torch.tensor([-3.0, -1.0, 0.2, 1.5])
    assert CLIP.apply(x0).tolist() == pytest.approx([-1, -1, 0.2, 1])
    assert torch.equal(NONE.apply(x0), x0)


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


def test_progress_tells_x_and_the_predicted_x0(mixture: Any) -> None:
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


def test_each_step_has_noise_of_its_own(mixture: Any) -> None:
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


def test_a_sampler_from_outside_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gaussian: Any) -> None:
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


def test_no_gradient_is_kept(mixture: Any) -> None:
    model = mixture("linear")
    x = start(model, 2).requires_grad_()
    assert not walk("ddim:steps=3", model, x)[-1].requires_grad


def test_the_model_is_asked_once_at_each_level_of_the_path(mixture: Any) -> None:
    model, seen = mixture("cosine"), []
    inner = model.predict

    def predict(x: Tensor, level: Any, condition: Any = None) -> Prediction:
        seen.append(float(level.t))
        return inner(x, level, condition)  # type: ignore[no-any-return]

    model.predict = predict
    walk("ddim:steps=5", model, start(model, 2))
    assert seen == [999, 799, 599, 399, 199]
