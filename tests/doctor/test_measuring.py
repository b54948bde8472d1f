"""What is measured, against closed forms: the linear denoiser, losses with one thing changed, noise of half steps, neighbours."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.data import ImageSet
from ddpm.doctor import comparing
from ddpm.doctor.comparing import distinct, judged, label_agreement, neighbours, two_nearest
from ddpm.doctor.drawing import Recipe, draw_twice, finer
from ddpm.doctor.exam import Losses
from ddpm.doctor.linear import LinearDenoiser, largest_moment
from ddpm.doctor.measuring import Patient, compare_average, levels_of
from ddpm.models import GaussianDiffusion
from ddpm.objectives import Objective
from ddpm.runtime import resolve
from ddpm.samplers import Sampler, Thresholding
from ddpm.schedules import Level, Schedule

COSINE = Schedule.parse("cosine")
GENERATOR = torch.Generator().manual_seed(0)


class Says(nn.Module):
    """A network that is a function of x, the noise label and the condition."""

    def __init__(self, says: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.says, self.weight = says, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise_label: Tensor, condition: Tensor | None, stream: Any = None) -> Tensor:
        return self.says(x, noise_label, condition)


def model(says: Callable[[Tensor, Tensor, Any], Tensor], objective: str = "eps", classes: int = 0) -> GaussianDiffusion:
    network = Says(says)
    return GaussianDiffusion(network, COSINE, Objective.parse(objective), shape=(1, 4, 4), num_classes=classes).eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def test_the_linear_denoiser_is_the_posterior_mean_of_gaussian_data(exactness: Any) -> None:
    images = (normal(400, 16) @ normal(16, 16) + normal(16)).reshape(400, 1, 4, 4)
    found, x_t = LinearDenoiser.fit(images), normal(5, 1, 4, 4).double()
    flat = images.flatten(1).double().numpy()
    mean, covariance = flat.mean(axis=0), np.cov(flat.T)
    for t in (10.0, 500.0, 990.0):
        level = COSINE.at(torch.tensor(t))
        alpha, sigma = float(level.alpha), float(level.sigma)
        gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(16))
        expected = mean + (x_t.flatten(1).numpy() - alpha * mean) @ gain.T
        difference = np.abs(found.x0(x_t, level).flatten(1).numpy() - expected).max() / np.abs(expected).max()
        exactness("linear denoiser", "posterior mean of Gaussian data", "exact", difference, 1e-9)


def test_the_linear_denoiser_knows_class_means() -> None:
    labels = torch.arange(60) % 3
    images = labels.float().reshape(-1, 1, 1, 1).expand(60, 1, 4, 4) + 0.01 * normal(60, 1, 4, 4)
    found = LinearDenoiser.fit(images, labels, 3)
    noise = COSINE.at(torch.tensor(999.0))
    guess = found.x0(normal(3, 1, 4, 4), noise.expand(3), torch.tensor([0, 1, 2]))
    assert guess.mean(dim=(1, 2, 3)).numpy() == pytest.approx([0, 1, 2], abs=0.05)


def test_the_largest_moment_is_an_eigenvalue() -> None:
    images = normal(50, 1, 4, 4) + 0.5
    flat = images.flatten(1).double().numpy()
    assert largest_moment(images) == pytest.approx(np.linalg.eigvalsh(flat.T @ flat / 50).max())


def test_a_network_that_says_nothing_has_the_power_of_its_target_as_loss() -> None:
    images = normal(20, 1, 4, 4)
    patient = Patient(model(lambda x, *_: 0 * x), images, None, levels_of(COSINE))
    found = patient.losses(LinearDenoiser.fit(images))
    assert np.array_equal(found.model, found.power)
    assert np.array_equal(found.power, patient.losses_and_power()[1])
    assert found.power.mean() == pytest.approx(1.0, abs=0.05)
    assert (found.linear.mean(axis=0) < found.power.mean(axis=0)).all()


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_the_linear_denoiser_as_a_network_has_its_own_loss(objective: str) -> None:
    images, level = normal(40, 1, 4, 4), levels_of(COSINE)
    linear, meant = LinearDenoiser.fit(images), Objective.parse(objective)

    def says(x: Tensor, noise_label: Tensor, _: Any) -> Tensor:
        at = COSINE.at(noise_label.double())
        x0 = linear.x0(x, at)
        return meant.target(x0, (x - at.like(x).alpha * x0) / at.like(x).sigma, x, at, COSINE)

    found = Patient(model(says, objective), images[:8], None, level).losses(linear)
    assert found.model == pytest.approx(found.linear, rel=1e-3)
    assert found.log_ratio() == pytest.approx(np.zeros((8, 8)), abs=1e-3)
    other = Patient(model(says, objective), images[:8], None, level)
    if objective != "eps":
        wrong = other.losses(linear, Objective.parse("eps"))
        assert wrong.log_ratio().mean() > 0.3


def test_by_time_changes_the_label_alone() -> None:
    patient = Patient(
        model(lambda x, t, _: x * t.reshape(-1, 1, 1, 1) / 1000), normal(20, 1, 4, 4), None, levels_of(COSINE)
    )
    found = patient.by_time()
    assert np.array_equal(found[:, range(8), range(8)], patient.model_losses())
    assert np.array_equal(found[:, :, 3], patient.model_losses(patient.level.t[3]))
    assert not np.array_equal(found[:, :, 3], found[:, :, 4])


def test_by_label_tells_which_label_fits() -> None:
    labels = torch.arange(24) % 3
    images = labels.float().reshape(-1, 1, 1, 1).expand(24, 1, 4, 4) + 0.3 * normal(24, 1, 4, 4)
    told = model(lambda x, t, label: label.float().reshape(-1, 1, 1, 1) + 0 * x, "x0", classes=3)
    candidates = (labels.numpy()[:, None] + np.array([0, 1, 2])) % 3
    patient = Patient(told, images, labels, levels_of(COSINE))
    found, linear = patient.by_label(candidates, LinearDenoiser.fit(images, labels, 3), np.ones((24, 8)))
    for table in (found, linear):
        assert (table.argmin(axis=1) == 0).all()
    assert found[:, 0] == pytest.approx(np.log(patient.model_losses() + 0.01).mean(axis=1))


def test_losses_are_compared_above_the_floor() -> None:
    tiny = Losses(np.full((3, 2), 1e-6), np.full((3, 2), 1e-9), np.ones((3, 2)))
    assert tiny.log_ratio() == pytest.approx(np.zeros((3, 2)), abs=1e-3)
    assert Losses(2 * np.ones((3, 2)), np.ones((3, 2)), 0 * np.ones((3, 2))).log_ratio() == pytest.approx(
        np.log(2) * np.ones((3, 2))
    )


def test_an_average_is_told_from_its_start_and_from_a_standstill() -> None:
    made = {"norm": torch.ones(4), "bias": torch.zeros(4), "weight": normal(4, 4)}
    weights = {name: value + normal(*value.shape) for name, value in made.items()}
    moved = {name: 0.9 * value + 0.1 * weights[name] for name, value in made.items()}
    untouched = compare_average("0.9", made, weights, None)
    assert (untouched.untouched, untouched.stood_still) == (2, None)
    assert compare_average("0.9", weights, weights, None).untouched == 0
    assert compare_average("0.9", moved, weights, None).untouched == 0
    assert compare_average("0.9", moved, weights, (made, made)).stood_still is False
    assert compare_average("0.9", moved, weights, (moved, made)).stood_still is True
    assert compare_average("0.9", moved, weights, (moved, weights)).stood_still is None


class Adds(Sampler):
    """x of a step is x and its noise: so the images are the sum of all noise."""

    name = "adds"

    def step(self, x: Tensor, level: Level, following: Level, denoise: Any, noise: Any, history: Any) -> Tensor:
        return x + noise()


def test_noise_of_half_steps_is_standard_normal_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr("ddpm.doctor.drawing.to_uint8", lambda x: (seen.append(x), x)[1])
    recipe = Recipe(Adds(steps=5), Thresholding.parse("none"), lambda model: model, 64)
    draw_twice(model(lambda x, *_: 0 * x), recipe, resolve("cpu", "float32"), range(64))
    coarse, fine = seen
    recipe = Recipe(Adds(steps=1), Thresholding.parse("none"), lambda model: model, 64)
    draw_twice(model(lambda x, *_: 0 * x), recipe, resolve("cpu", "float32"), range(64))
    first = seen[2]
    start = first - (seen[3] - first) / (2**0.5 - 1)  # fine - start = sqrt(2) (coarse - start)
    assert fine - start == pytest.approx((2**0.5) * (coarse - start), abs=1e-4)
    assert float((coarse - start).var()) == pytest.approx(5.0, rel=0.15)


@pytest.mark.parametrize(
    ("spec", "schedule", "steps"),
    [
        ("ddim:steps=10", "cosine", 20),
        ("ddim:steps=600", "cosine", 1000),
        ("ddim:steps=900", "cosine", None),
        ("ddpm", "cosine", None),
    ],
)
def test_finer_steps_are_twice_as_many_where_there_are(spec: str, schedule: str, steps: int | None) -> None:
    found = finer(Sampler.parse(spec), Schedule.parse(schedule))
    assert (None if found is None else found.steps) == steps


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)


@pytest.mark.parametrize("block", [16, 48, 10_000])
def test_two_nearest_is_brute_force(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(comparing, "BLOCK_NUMBERS", block)
    queries, references = pixels(9), pixels(31, seed=1)
    gaps = queries[:, None].reshape(9, 1, 16).astype(float) - references.reshape(31, 16)
    distances = np.sqrt((gaps**2).mean(axis=2))
    places, found = two_nearest(queries, references)
    assert np.array_equal(places, np.argsort(distances, axis=1)[:, :2])
    assert found == pytest.approx(np.sort(distances, axis=1)[:, :2])


def test_neighbours_of_copies_and_of_others() -> None:
    train, held_out = ImageSet("a", pixels(100)), ImageSet("a", pixels(50, seed=1))
    found = neighbours(train.images[:10], train, held_out)
    assert found is not None and found.held_out is not None
    assert (found.nearest == 0).all()
    assert (found.second > 20).all()
    assert (found.held_out > 20).all()
    assert (len(found.real), found.prior) == (50, pytest.approx(2 / 3))


def test_equal_training_images_count_once_or_as_what_recurs() -> None:
    few, many = np.repeat(pixels(20), 10, axis=0), np.repeat(pixels(80), 2, axis=0)
    assert len(distinct(few)) == 20
    of_few, of_many = (neighbours(pixels(5, seed=2), ImageSet("a", images), None) for images in (few, many))
    assert of_few is not None and of_many is not None
    assert of_few.real.min() > 20  # twenty images are no set: that they recur excuses nothing
    assert of_many.real.max() == 0  # of eighty, each again: a new image may be one of them
    assert neighbours(pixels(5), ImageSet("a", np.repeat(pixels(2), 10, axis=0)), None) is None


def test_labels_agree_by_nature_or_by_chance() -> None:
    labels = np.arange(300) % 3
    images = np.clip(
        80 * labels[:, None, None, None] + np.random.default_rng(0).normal(0, 9, (300, 1, 4, 4)), 0, 255
    ).astype(np.uint8)
    agree, by_chance = label_agreement(ImageSet("a", images, labels, ("x", "y", "z")))
    assert agree[0] == agree[1]
    assert by_chance == pytest.approx(1 / 3, abs=1e-3)
    shuffled = np.random.default_rng(1).permutation(labels)
    (hits, trials), _ = label_agreement(ImageSet("a", images, shuffled, ("x", "y", "z")))
    assert abs(hits / trials - 1 / 3) < 4 * (2 / 9 / trials) ** 0.5


@pytest.mark.parametrize("held_out", [True, False])
def test_the_nearest_training_image_judges(held_out: bool) -> None:
    labels = np.arange(40) % 2
    images = (
        labels[:, None, None, None] * 200 + np.arange(40)[:, None, None, None] // 2 * np.ones((1, 1, 4, 4))
    ).astype(np.uint8)
    known = ImageSet("a", images, labels, ("dark", "light"))
    found = judged(images[:6] + 1, labels[:6], known, known if held_out else None, None)
    assert found is not None
    assert np.array_equal(found.given, labels[:6])
    assert (found.real == found.real_true).all()
    assert judged(images[:6], None, ImageSet("a", images), None, None) is None
