"""Editing: closed forms of Gaussian data, diffusers' RePaint, and the promises of `Editor` on a small network."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.editing import Editor, Walker, estimate_sigma, level_at, level_of_noise, psnr, resampled, slerp, usual_jump
from ddpm.errors import ConfigError
from ddpm.images import to_float, to_uint8
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.randomness import Stream
from ddpm.runtime import Runtime
from ddpm.samplers import Sampler, Thresholding
from ddpm.sampling import generate
from ddpm.schedules import Level, Schedule, posterior_coefficients, posterior_variance, step_variance

NONE = Thresholding.parse("none")
MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.25, 0.08], [0.08, 0.16]], dtype=torch.float64)
UNIT = torch.eye(2, dtype=torch.float64)
N = 2000


@dataclass
class Gaussian:
    """The best denoiser of N(MEAN, COVARIANCE); points are images (B, 1, 1, 2). Its variance is that of the first element."""

    schedule: Schedule

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        gain, left = posterior_of(level)
        x0 = (MEAN + (x_t.flatten(1) - level.alpha * MEAN) @ gain.T).reshape(x_t.shape)
        return Prediction(x0, eps_from_x0(x0, x_t, level), x0_variance=float(left[0, 0]))


def posterior_of(level: Level) -> tuple[Tensor, Tensor]:
    """x0 given x_t has mean MEAN + gain (x_t - alpha MEAN) and this covariance."""
    gain = level.alpha * COVARIANCE @ torch.linalg.inv(level.alpha**2 * COVARIANCE + level.sigma**2 * UNIT)
    return gain, COVARIANCE - level.alpha * gain @ COVARIANCE


def root(matrix: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(matrix)
    return axes @ torch.diag(values.sqrt()) @ axes.T


def noises(n: int, seed: int = 0) -> Callable[[str, int], Tensor]:
    """noise(purpose, i), float64; what is asked for again is the same."""

    def noise(purpose: str, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose} {i}".encode()))
        return torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64)

    return noise


def walker(sampler: str, schedule: str = "linear", n: int = N, seed: int = 0) -> Walker:
    predictor = Gaussian(Schedule.parse(schedule))
    return Walker(predictor=predictor, sampler=Sampler.parse(sampler), noise=noises(n, seed), thresholding=NONE)


def points(values: Sequence[float], n: int = N) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, 2).expand(n, -1, -1, -1)


def worst_z(found: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Of the sample mean and of the sample covariance of (n, d) normal points."""
    n, variances = len(found), covariance.diagonal()
    of_mean = (found.mean(0) - mean) / (variances / n).sqrt()
    spread = ((variances[:, None] * variances + covariance**2) / (n - 1)).sqrt()
    of_covariance = (found.T.cov().reshape(covariance.shape) - covariance) / spread
    return float(torch.cat([of_mean, of_covariance.flatten()]).abs().max())


def slope(errors: list[float], counts: list[int]) -> float:
    return float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


# --- RePaint


FILL = torch.tensor([True, False]).reshape(1, 1, 1, 2)
KNOWN = 0.1
GIVEN_MEAN = MEAN[0] + COVARIANCE[0, 1] / COVARIANCE[1, 1] * (KNOWN - MEAN[1])
GIVEN_VARIANCE = COVARIANCE[0, 0] - COVARIANCE[0, 1] ** 2 / COVARIANCE[1, 1]


def repainted(jump: int, resamplings: int, seed: int = 0) -> Tensor:
    """(N,) the first elements, filled in beside a second one of KNOWN."""
    x = walker("ddpm:steps=100", seed=seed).repaint(points([9.0, KNOWN]), FILL, jump, resamplings)
    assert (x[..., 1] == KNOWN).all()
    return x[..., 0].flatten()


def test_repaint_nears_the_exact_conditional_as_resamplings_grow(exactness: Any) -> None:
    found = {resamplings: repainted(1, resamplings) for resamplings in (1, 5, 25)}
    off = [abs(float(x.mean() - GIVEN_MEAN)) for x in found.values()]
    assert off[0] > 0.08
    assert off[1] < off[0] / 2
    assert off[2] < off[1]
    z = worst_z(found[25][:, None], GIVEN_MEAN[None], GIVEN_VARIANCE[None, None])
    exactness("editing repaint", "exact conditional of a Gaussian, 25 resamplings", "statistical", z, 4)


def recursion(jump: int, resamplings: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the first element after algorithm 1, all of whose steps are affine with normal noise."""
    path = resampled(Sampler.parse("ddpm:steps=100").path(Schedule.parse("linear")), jump, resamplings)
    mean, covariance = torch.zeros(2, dtype=torch.float64), UNIT
    for level, following in [(path[0], path[0]), *pairwise(path)]:
        if following.log_snr < level.log_snr:
            scale = following.alpha / level.alpha
            mean, covariance = scale * mean, scale**2 * covariance + step_variance(following, level) * UNIT
            continue
        if following is not level:
            gain, left = posterior_of(level)
            at_x0, at_x = posterior_coefficients(level, following)
            step = at_x0 * gain + at_x * UNIT
            added = 0 if following.is_clean else posterior_variance(level, following) + at_x0**2 * left[0, 0]
            mean = step @ mean + at_x0 * (MEAN - level.alpha * gain @ MEAN)
            covariance = step @ covariance @ step.T + added * UNIT
        mean = torch.stack([mean[0], following.alpha * KNOWN])
        covariance = torch.diag(torch.stack([covariance[0, 0], following.sigma**2]))
    return mean[:1], covariance[:1, :1]


def test_repaint_is_algorithm_1_with_jumps_of_any_length(exactness: Any) -> None:
    z = worst_z(repainted(7, 3, seed=1)[:, None], *recursion(7, 3))
    exactness("editing repaint", "affine recursion of the paper's algorithm 1, jumps of 7", "statistical", z, 4)


def test_jumps_are_those_of_diffusers(exactness: Any) -> None:
    from diffusers import RePaintScheduler

    worst = 0.0
    for steps, jump, resamplings in ((100, 10, 10), (50, 10, 3), (20, 3, 4), (10, 9, 2), (7, 1, 1)):
        theirs = RePaintScheduler(num_train_timesteps=steps)
        theirs.set_timesteps(steps, jump, resamplings)
        path = resampled(Sampler.parse("ddpm").path(Schedule.parse(f"linear:timesteps={steps}")), jump, resamplings)
        times = [int(level.t) for level in path[:-1]]
        ours = times[:1]
        for before, t in pairwise(times):  # they go up one level at a time
            ours += range(before + 1, t + 1) if t > before else [t]
        assert len(ours) == len(theirs.timesteps)
        worst = max(worst, float(np.abs(np.array(ours) - theirs.timesteps.numpy()).max()))
    exactness("editing repaint", "diffusers RePaintScheduler, times of five jump schedules", "exact", worst, 0)


def test_repaint_without_jumps_is_diffusers_step_by_step(exactness: Any) -> None:
    """diffusers uses one noise for the known part and the filled one, and steps as DDIM with eta = 1."""
    from diffusers import RePaintScheduler

    n, generator = 20, torch.Generator()
    theirs = RePaintScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, eta=1.0, clip_sample=False)
    theirs.set_timesteps(50, 10, 1)
    seeded = lambda i: torch.randn(n, 1, 1, 2, generator=generator.manual_seed(i), dtype=torch.float64)  # noqa: E731
    schedule = Schedule.parse("linear")
    seen: list[Tensor] = []
    ours = replace(
        walker("ddim:steps=50,eta=1,grid=leading", n=n),
        noise=lambda purpose, i: seeded(i),
        watch=lambda steps: lambda i, x, x0: seen.append(x),
    )
    known = points([9.0, KNOWN], n)
    ours.repaint(known, FILL, 10, 1)
    top = schedule.at(torch.tensor(980.0))
    x = torch.where(FILL, seeded(0), top.alpha * known + top.sigma * seeded(0))
    worst = 0.0
    for i, t in enumerate(theirs.timesteps.tolist()):
        eps = ours.predictor.predict(x, schedule.at(torch.tensor(float(t)))).eps
        x = theirs.step(eps, t, x, known, (~FILL).double(), generator=generator.manual_seed(i + 1)).prev_sample
        worst = max(worst, float((x - seen[i]).abs().max()))
    assert len(seen) == 50
    exactness("editing repaint", "diffusers RePaintScheduler, steps", "exact", worst, 1e-5)


def test_a_jump_needs_levels_to_jump_over() -> None:
    path = Sampler.parse("ddim:steps=10").path(Schedule.parse("linear"))
    with pytest.raises(ConfigError, match="a jump of 10 levels needs a sampler of more than 10 steps, not 10"):
        resampled(path, 10, 2)
    assert resampled(path, 10, 1) == path


def test_jumps_are_a_fifth_of_the_steps_and_ten_at_most() -> None:
    schedule = Schedule.parse("linear")
    jumps = [usual_jump(Sampler.parse(f"ddim:steps={steps}").path(schedule)) for steps in (1, 4, 20, 50, 250)]
    assert jumps == [1, 1, 4, 10, 10]


# --- SDEdit, interpolation


def after(guide: Tensor, start: Level, flow: bool) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what a guide noised to `start` becomes: by the exact flow, or by the exact reverse process."""
    gain, left = posterior_of(start)
    if flow:
        gain, left = (
            root(COVARIANCE) @ torch.linalg.inv(root(start.alpha**2 * COVARIANCE + start.sigma**2 * UNIT)),
            0 * left,
        )
    return MEAN + start.alpha * gain @ (guide - MEAN), start.sigma**2 * gain @ gain.T + left


@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize(
    ("schedule", "sampler"), [("linear", "ddpm"), ("linear", "ddim:steps=1000"), ("edm", "heun:steps=60,grid=karras")]
)
def test_sdedit_has_the_marginal_of_gaussian_data(schedule: str, sampler: str, strength: float, exactness: Any) -> None:
    made = walker(sampler, schedule)
    start = level_at(made.path, strength)
    assert made.path.index(start) == round((1 - strength) * (len(made.path) - 1))
    x = made.sdedit(points([-0.9, 0.8]), start)
    mean, covariance = after(torch.tensor([-0.9, 0.8], dtype=torch.float64), start, sampler != "ddpm")
    oracle = f"exact marginal of a Gaussian, {schedule}, {sampler.partition(':')[0]}, strength {strength}"
    exactness("editing sdedit", oracle, "statistical", worst_z(x.flatten(1), mean, covariance), 4)


def test_sdedit_of_data_gives_data() -> None:
    made = walker("ddpm")
    data = MEAN + torch.randn(N, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ root(COVARIANCE)
    x = made.sdedit(data.reshape(-1, 1, 1, 2), level_at(made.path, 0.5))
    assert worst_z(x.flatten(1), MEAN, COVARIANCE) < 4


def test_interpolation_has_the_marginal_of_gaussian_data(exactness: Any) -> None:
    made = walker("ddpm")
    start, third = level_at(made.path, 0.4), torch.full((N, 1, 1, 1), 1 / 3, dtype=torch.float64)
    x = made.interpolate(points([-0.9, 0.8]), points([0.9, -0.1]), third, start, "lerp")
    mean, covariance = after(torch.tensor([-0.3, 0.5], dtype=torch.float64), start, flow=False)
    z = worst_z(x.flatten(1), mean, covariance)
    exactness("editing interpolate", "exact marginal of a Gaussian at a third", "statistical", z, 4)


def test_interpolation_by_an_affine_flow_is_a_straight_line(exactness: Any) -> None:
    """The flow of Gaussian data is affine, so blending at a level with one noise is blending what the ends become."""
    made = walker("ddim:steps=20", n=50)
    start, weight = level_at(made.path, 0.5), torch.linspace(0, 1, 50, dtype=torch.float64).reshape(-1, 1, 1, 1)
    first, second = points([-0.9, 0.8], 50), points([0.9, -0.1], 50)
    ends = [made.sdedit(end, start) for end in (first, second)]
    x = made.interpolate(first, second, weight, start, "lerp")
    difference = float((x - torch.lerp(*ends, weight)).abs().max())
    exactness("editing interpolate", "lerp of both ends, affine flow", "exact", difference, 1e-10)


def test_slerp_turns_at_constant_speed_and_keeps_the_noise_level() -> None:
    angle = torch.linspace(0, 1, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)
    first, second = points([1.0, 0.0], 7), points([math.cos(2.0), math.sin(2.0)], 7)
    expected = torch.stack([(2 * angle).cos(), (2 * angle).sin()], dim=-1).reshape(7, 1, 1, 2)
    torch.testing.assert_close(slerp(first, second, angle), expected)
    a, b = (Stream(0, torch.tensor([seed]), "sample").normal(3, 64, 64).expand(9, -1, -1, -1) for seed in (0, 1))
    turned = slerp(a, b, torch.linspace(0, 1, 9).reshape(-1, 1, 1, 1)).flatten(1)
    z = (turned.var(1) - 1) * math.sqrt(3 * 64 * 64 / 2)
    assert z.abs().max() < 4


# --- inversion


def test_inversion_reaches_the_exact_noise_at_first_order(exactness: Any) -> None:
    """Of Gaussian data the flow keeps (alpha^2 C + sigma^2)^(-1/2) (x_t - alpha mean) constant; its noise is x_t at the top."""
    schedule = "linear:timesteps=4000,scaled=true"
    data = MEAN + torch.randn(100, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) @ root(
        COVARIANCE
    )
    top = Schedule.parse(schedule).at(torch.tensor(3999.0))
    flow = root(top.alpha**2 * COVARIANCE + top.sigma**2 * UNIT) @ torch.linalg.inv(root(COVARIANCE))
    exact = top.alpha * MEAN + (data - MEAN) @ flow.T
    counts = [20, 40, 80, 160]
    there, back = [], []
    for steps in counts:
        made = walker(f"ddim:steps={steps},grid=linspace", schedule, n=100)
        noise = made.invert(data.reshape(-1, 1, 1, 2))
        there.append(float((noise.flatten(1) - exact).norm()))
        back.append(float((made.reconstruct(noise).flatten(1) - data).norm()))
    for what, errors in (("exact noise", there), ("back to the data", back)):
        exactness(
            "editing ddim-inversion", f"exact flow of a Gaussian, {what}", "order", abs(slope(errors, counts) + 1), 0.3
        )
    assert there[-1] < 0.05 * float(exact.norm())


# --- levels and measures


def test_a_share_of_the_steps_is_a_level_of_the_path() -> None:
    path = Sampler.parse("ddim:steps=10").path(Schedule.parse("linear"))
    assert [path.index(level_at(path, share)) for share in (1, 0.5, 0.26, 0.1, 1e-9)] == [0, 5, 7, 9, 9]
    for wrong in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
            level_at(path, wrong)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm"])
@pytest.mark.parametrize("sigma", [3.0, 25.0, 100.0])
def test_the_level_of_noise_has_that_ratio_of_noise_to_signal(schedule: str, sigma: float) -> None:
    level = level_of_noise(Schedule.parse(schedule), sigma)
    assert float(level.sigma / level.alpha) * 127.5 == pytest.approx(sigma, rel=1e-9)


def test_noise_outside_the_schedule_is_refused() -> None:
    for sigma in (0.0, 0.1, 1e9, math.nan):
        with pytest.raises(ConfigError, match=r"grey levels is not what this model can take away: it knows 1.3 to"):
            level_of_noise(Schedule.parse("linear"), sigma)


@pytest.mark.parametrize("sigma", [5.0, 20.0])
def test_the_noise_of_an_image_with_edges_is_estimated(sigma: float) -> None:
    """The estimate's own deviation is 1.167 sigma / sqrt(n) of n details (the median absolute deviation's efficiency, 0.367)."""
    image = np.full((3, 128, 128), 128.0)
    image[:, 30:90, 40:70] = 60.0
    noisy = image + sigma * np.random.default_rng(0).standard_normal(image.shape)
    found = estimate_sigma(noisy.round().clip(0, 255).astype(np.uint8))
    assert abs(found - math.hypot(sigma, 12**-0.5)) < 4 * 1.167 * sigma / math.sqrt(3 * 64 * 64) + 0.1
    assert estimate_sigma(image.astype(np.uint8)) == 0


def test_psnr_is_that_of_the_definition() -> None:
    a, b = np.zeros((2, 1, 4, 4), np.uint8), np.zeros((2, 1, 4, 4), np.uint8)
    assert psnr(a, b) == math.inf
    b[0] = 255
    assert psnr(a, b) == pytest.approx(10 * math.log10(2))


# --- the editor


SHAPE = (1, 8, 8)
MACHINE = Runtime(torch.device("cpu"), "float32", channels_last=False, threads=1)


@pytest.fixture(scope="module")
def model() -> GaussianDiffusion:
    network = ModelConfig(
        channels=8, channel_mults=(1, 2), blocks=1, conditioning="global", initialisation="torch", norm_groups=2
    )
    options = DiffusionConfig(schedule="linear:timesteps=100,scaled=true", objective="v")
    return build_diffusion(network, options, SHAPE, 10).eval().requires_grad_(False)


def editor(model: GaussianDiffusion, sampler: str = "ddpm:steps=6", **options: Any) -> Editor:
    given = {"predictor": model, "sampler": Sampler.parse(sampler), "shape": SHAPE, "machine": MACHINE, "labels": (3,)}
    return Editor(**{**given, **options})


@pytest.fixture(scope="module")
def some(digits: Any) -> np.ndarray:
    return digits.images[:5].copy()


def hole() -> np.ndarray:
    mask = np.zeros((8, 8), bool)
    mask[2:6, 3:] = True
    return mask


EDITS: dict[str, Callable[..., np.ndarray]] = {
    "inpaint": lambda e, x, seeds: e.inpaint(x, hole(), seeds, jump=2, resamplings=2),
    "img2img": lambda e, x, seeds: e.img2img(x, 0.5, seeds),
    "denoise": lambda e, x, seeds: e.denoise(x, 150.0, seeds),
    "one-step": lambda e, x, seeds: e.denoise(x, 150.0, seeds, one_step=True),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_result_depends_on_its_image_and_seed_alone(
    model: GaussianDiffusion, some: np.ndarray, edit: Any, chunk: int
) -> None:
    made = editor(model, chunk=chunk)
    together = edit(made, some, [4, 0, 7, 9, 1])
    assert together.dtype == np.uint8
    assert together.shape == some.shape
    for rows in ([2], [4, 0], [3, 1, 2, 0]):
        np.testing.assert_array_equal(edit(made, some[rows], [[4, 0, 7, 9, 1][k] for k in rows]), together[rows])
    one = edit(made, torch.from_numpy(some[1]), [0])
    np.testing.assert_array_equal(one[0], together[1])


@pytest.mark.parametrize("edit", list(EDITS.values())[:3], ids=list(EDITS)[:3])
def test_seeds_make_variations_and_are_counted_from_zero(model: GaussianDiffusion, some: np.ndarray, edit: Any) -> None:
    made = editor(model)
    many = edit(made, some[0], [0, 1, 2])
    assert len({image.tobytes() for image in many}) == 3
    np.testing.assert_array_equal(edit(made, some[:1], None), many[:1])


@pytest.mark.parametrize("sampler", ["ddpm:steps=6", "ddim:steps=6"])
def test_inpainting_keeps_the_known_pixels_bit_for_bit(
    model: GaussianDiffusion, some: np.ndarray, sampler: str
) -> None:
    filled = editor(model, sampler).inpaint(some, hole(), jump=2, resamplings=3)
    np.testing.assert_array_equal(filled[..., ~hole()], some[..., ~hole()])
    assert (filled[..., hole()] != some[..., hole()]).mean() > 0.5
    masks = np.stack([np.roll(hole(), k, axis=1) for k in range(5)])
    each = editor(model, sampler).inpaint(some, masks, jump=2, resamplings=3)
    np.testing.assert_array_equal(each[0], filled[0])
    np.testing.assert_array_equal(each[:, 0][~masks], some[:, 0][~masks])


def test_sdedit_of_everything_is_sampling_from_a_faint_image(model: GaussianDiffusion, some: np.ndarray) -> None:
    """At strength 1 the start is alpha_T x0 + sigma_T z with the noise of `sample`, and so is all noise that follows."""
    stream = Stream(0, torch.tensor([5]), "sample")
    first = model.schedule.at(torch.tensor(99.0))
    x = first.alpha * to_float(torch.from_numpy(some[:1])) + first.sigma * stream.normal(*SHAPE)
    sampler = Sampler.parse("ddpm:steps=6")
    labels = torch.tensor([3])
    walked = sampler.walk(
        model, x, sampler.path(model.schedule), labels, lambda i: stream.at(step=i + 1).normal(*SHAPE)
    )
    np.testing.assert_array_equal(editor(model).img2img(some[0], 1.0, [5]), to_uint8(walked).numpy())


def test_interpolation_between_seeds_ends_in_what_the_seeds_give(model: GaussianDiffusion) -> None:
    sampler = Sampler.parse("ddim:steps=6")
    (drawn,) = generate(model, sampler, MACHINE, seeds=[2, 3], labels=[3], chunk=4)
    frames = editor(model, "ddim:steps=6", chunk=4).interpolate_seeds(2, 3, 5)
    assert frames.shape == (5, *SHAPE)
    np.testing.assert_array_equal(frames[[0, -1]], drawn.images)
    assert len({frame.tobytes() for frame in frames}) == 5


@pytest.mark.parametrize("blend", ["lerp", "slerp"])
def test_interpolation_ends_in_variations_of_its_ends(model: GaussianDiffusion, some: np.ndarray, blend: Any) -> None:
    frames = editor(model).interpolate(some[0], some[1], 4, level=0.5, seed=8, blend=blend)
    variation = editor(model).img2img(some[0], 0.5, [8])
    np.testing.assert_array_equal(frames[0], variation[0])
    assert np.abs(frames[-1].astype(int) - frames[-2]).mean() > 0
    same = editor(model).interpolate(some[1], some[1], 4, level=0.5, seed=8, blend="lerp")
    assert len({frame.tobytes() for frame in same}) == 1


def test_inversion_comes_back_nearer_with_more_steps(model: GaussianDiffusion, some: np.ndarray) -> None:
    found = []
    for steps in (5, 15, 50):
        made = editor(model, f"ddim:steps={steps},thresholding=none")
        latents = made.invert(some)
        assert latents.dtype == np.float32
        np.testing.assert_array_equal(made.invert(some[2]), latents[2:3])
        found.append(psnr(some, made.reconstruct(latents)))
    assert found[0] < found[1] < found[2]
    assert found[2] > 25
    with pytest.raises(ConfigError, match="walks from noise to image only"):
        editor(model).invert(some)


def test_one_step_is_the_predicted_x0(model: GaussianDiffusion, some: np.ndarray) -> None:
    level = level_of_noise(model.schedule, 60.0)
    x0 = model.predict(level.alpha * to_float(torch.from_numpy(some)), level, torch.full((5,), 3)).x0
    for sampler in ("ddpm:steps=6", "ddim:steps=6"):
        found = editor(model, sampler, chunk=5).denoise(some, 60.0, one_step=True)
        np.testing.assert_array_equal(found, to_uint8(x0).numpy())


def test_the_walk_of_the_first_chunk_is_watched(model: GaussianDiffusion, some: np.ndarray) -> None:
    seen: list[tuple[int, int]] = []

    def watch(steps: int) -> Callable[[int, Tensor, Tensor], None]:
        def on_step(index: int, x: Tensor, x0: Tensor) -> None:
            assert x.shape == x0.shape == (2, *SHAPE)
            seen.append((steps, index))

        return on_step

    for edit, steps in ((EDITS["inpaint"], 6 + 2 * 2), (EDITS["img2img"], 3), (EDITS["one-step"], 0)):
        seen.clear()
        edit(editor(model, chunk=2, watch=watch), some, None)
        assert seen == [(steps, index) for index in range(steps)]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda e, x: e.img2img(x.astype(np.float32)), r"images: expected uint8 \(N, 1, 8, 8\), found float32 \(5, 1, 8, 8\)\."),
        (lambda e, x: e.img2img(x[:, :, :7]), r"found uint8 \(5, 1, 7, 8\)\."),
        (lambda e, x: e.img2img(x[:0]), r"found uint8 \(0, 1, 8, 8\)\."),
        (lambda e, x: e.img2img(x[0, 0]), r"found uint8 \(8, 8\)\."),
        (lambda e, x: e.img2img(x, 1.5), "a noise level of 1.5 is wrong"),
        (lambda e, x: e.img2img(x, 0.5, [1, 2]), "seeds: 2 of them for 5 images; give one for each."),
        (lambda e, x: e.img2img(x, 0.5, [-1] * 5), "-1 is negative"),
        (lambda e, x: e.img2img(x, 0.5, [0.5] * 5), "whole numbers from 0"),
        (lambda e, x: e.inpaint(x, hole().astype(np.uint8)), r"fill: expected bool \(8, 8\), one or one for each image, found uint8"),
        (lambda e, x: e.inpaint(x, hole()[:7]), r"found bool \(1, 7, 8\)"),
        (lambda e, x: e.inpaint(x, np.stack([hole()] * 2)), r"found bool \(2, 8, 8\)"),
        (lambda e, x: e.inpaint(x, np.ones((8, 8), bool)), "must fill a part of the image and leave a part"),
        (lambda e, x: e.inpaint(x, np.zeros((8, 8), bool)), "must fill a part of the image and leave a part"),
        (lambda e, x: e.inpaint(x, hole(), jump=10), "a jump of 10 levels needs a sampler of more than 10 steps, not 6"),
        (lambda e, x: e.reconstruct(x), r"latents: expected float32 \(N, 1, 8, 8\), found uint8"),
        (lambda e, x: e.interpolate_seeds(2, 2), "both seeds are 2; give two different ones."),
        (lambda e, x: e.denoise(x, 0.0), "noise of 0 grey levels is not what this model can take away"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(model: GaussianDiffusion, some: np.ndarray, edit: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        edit(editor(model), some)
