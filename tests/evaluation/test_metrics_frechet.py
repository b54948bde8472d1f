from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from ddpm.errors import DataError
from ddpm.evaluation.frechet import _Expansion, frechet_distance, frechet_estimate
from ddpm.evaluation.statistics import Moments

Array = NDArray[np.float64]


def _moments(features: Array) -> tuple[Array, Array]:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.mean, moments.covariance


def _sample(n: int, d: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def test_the_distance_is_that_of_torchmetrics_and_of_the_usual_formula() -> None:
    mu1, sigma1, mu2, sigma2 = *_moments(_sample(500, 32, 0)), *_moments(_sample(400, 32, 1))
    root = linalg.sqrtm(sigma1 @ sigma2).real
    usual = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2.0 * root)
    theirs = _compute_fid(*map(torch.from_numpy, (mu1, sigma1, mu2, sigma2))).item()
    found = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert found == pytest.approx(usual, rel=1e-9)
    assert found == pytest.approx(theirs, rel=1e-9)


def test_features_give_the_distance_of_torchmetrics_whole_metric() -> None:
    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    features, reference = _sample(300, 16, 2), _sample(200, 16, 3)
    metric = FrechetInceptionDistance(Identity(), antialias=False)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(features), real=False)
    assert frechet_estimate(features, *_moments(reference)).value == pytest.approx(metric.compute().item(), rel=1e-5)


def test_covariances_that_commute_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    a, b, mu1, mu2 = rng.uniform(0, 2, 20), rng.uniform(0, 2, 20), rng.normal(size=20), rng.normal(size=20)
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(mu1, (basis * a) @ basis.T, mu2, (basis * b) @ basis.T) == pytest.approx(
        expected, rel=1e-12
    )


def test_singular_covariances_have_their_closed_form() -> None:
    rng = np.random.default_rng(0)
    u, v, zero = rng.normal(size=50), rng.normal(size=50), np.zeros(50)
    expected = u @ u + v @ v - 2.0 * abs(u @ v)
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zero, np.outer(u, u), zero, np.zeros((50, 50))) == pytest.approx(u @ u, rel=1e-12)
    assert frechet_distance(zero, np.zeros((50, 50)), v, np.zeros((50, 50))) == pytest.approx(v @ v, rel=1e-12)


def test_fewer_images_than_features_give_the_distance_within_their_span() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 6)) @ rng.normal(size=(6, 100)), rng.normal(size=(9, 100))
    basis = np.linalg.svd(np.concatenate([a, b]), full_matrices=False)[2]
    inside = frechet_distance(*_moments(a @ basis.T), *_moments(b @ basis.T))
    cross = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False).sum() / np.sqrt(19 * 8)
    (mu1, sigma1), (mu2, sigma2) = _moments(a), _moments(b)
    exact = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2.0 * cross
    found = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert found == pytest.approx(exact, rel=1e-9)
    assert found == pytest.approx(inside, rel=1e-9)


@pytest.mark.parametrize(("n", "scale"), [(1000, 1.0), (1000, 1e-3), (30, 1.0), (2, 1e4)])
def test_a_set_is_at_no_distance_from_itself(n: int, scale: float) -> None:
    features = scale * (_sample(n, 64, 4) * np.arange(1, 65) ** -1.5 + 5.0)
    mu, sigma = _moments(features)
    estimate = frechet_estimate(features, mu, sigma)
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high < 1e-6 * np.trace(sigma)


def test_one_feature_has_the_closed_form_and_the_deltas_interval() -> None:
    x = np.random.default_rng(0).normal(3.0, 1.0, size=(4000, 1))
    estimate = frechet_estimate(x, np.zeros(1), np.ones((1, 1)))
    deviation = x.std(ddof=1)
    assert estimate.value == pytest.approx(x.mean() ** 2 + (deviation - 1.0) ** 2, rel=1e-12)
    half = 1.96 * np.sqrt(4 * 9.0 / 4000)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.03)


def test_the_kernel_is_half_the_mixed_derivative_of_the_distance() -> None:
    features, (mu, sigma) = _sample(60, 5, 5), _moments(_sample(80, 5, 6))

    def distance(weights: Array) -> float:
        mean = weights @ features / weights.sum()
        centred = features - mean
        return frechet_distance(mean, (centred * (weights / weights.sum())[:, None]).T @ centred, mu, sigma)

    moments = Moments(5)
    moments.add(features)
    moments.scatter *= 59 / 60  # so that the covariance has n below, as in `distance`
    expansion = _Expansion.at(moments, mu, sigma)
    y = (features - moments.mean) @ expansion.projection
    i, j, h = 3, 11, 2e-4

    def moved(a: float, b: float) -> float:
        weights = np.full(60, (1 - a - b) / 60)
        weights[i] += a
        weights[j] += b
        return distance(weights)

    mixed = (moved(h, h) - moved(h, -h) - moved(-h, h) + moved(-h, -h)) / (4 * h * h)
    assert mixed == pytest.approx(2.0 * expansion.kernel(y[i : i + 1], y[j : j + 1])[0], rel=1e-4)


@pytest.mark.parametrize("case", ["same", "shifted", "wider"])
def test_intervals_cover_the_expected_distance(case: str) -> None:
    assert 0.90 <= _coverage(case, sampled_reference=False) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("sampled_reference", [False, True])
@pytest.mark.parametrize("case", ["same", "shifted", "wider", "random", "random wider", "steep"])
def test_intervals_cover_the_expected_distance_for_many_truths(case: str, sampled_reference: bool) -> None:
    assert 0.90 <= _coverage(case, sampled_reference) <= 0.98


def _coverage(case: str, sampled_reference: bool, d: int = 64, n: int = 1000, simulations: int = 200) -> float:
    """Share of intervals that hold the mean of the values."""
    rng = np.random.default_rng(7)
    factor = rng.normal(size=(d, 2 * d))
    random, eye, steep = factor @ factor.T / (2 * d), np.eye(d), np.diag(np.arange(1.0, d + 1) ** -1.5)
    truths: dict[str, tuple[Array, float, Array]] = {
        "same": (eye, 0.0, eye),
        "shifted": (eye, 0.05, eye),
        "wider": (1.2 * eye, 0.0, eye),
        "random": (random, 0.0, random),
        "random wider": (1.2 * random, 0.02, random),
        "steep": (steep, 0.0, steep),
    }
    sigma, shift, reference = truths[case]
    draw: Callable[[Array, int], Array] = lambda s, m: rng.normal(size=(m, d)) @ np.linalg.cholesky(s).T  # noqa: E731
    estimates = []
    for _ in range(simulations):
        mu, known = _moments(draw(reference, 800)) if sampled_reference else (np.zeros(d), reference)
        estimates.append(frechet_estimate(draw(sigma, n) + shift, mu, known, 800 if sampled_reference else None))
    expected = np.mean([estimate.value for estimate in estimates])
    return float(np.mean([estimate.low <= expected <= estimate.high for estimate in estimates]))


def test_float32_and_memory_mapped_features_give_the_same(tmp_path) -> None:
    features = _sample(5000, 8, 8).astype(np.float32)
    mu, sigma = _moments(_sample(100, 8, 9))
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert frechet_estimate(mapped, mu, sigma) == frechet_estimate(features.astype(np.float64), mu, sigma)


def test_what_cannot_be_compared_is_refused() -> None:
    mu, sigma = np.zeros(4), np.eye(4)
    with pytest.raises(DataError, match="hold 1 images"):
        frechet_estimate(np.zeros((1, 4)), mu, sigma)
    with pytest.raises(DataError, match="one extractor"):
        frechet_estimate(np.zeros((5, 3)), mu, sigma)
    with pytest.raises(DataError, match="one extractor"):
        frechet_distance(mu, sigma, np.zeros(3), np.eye(3))
    with pytest.raises(DataError, match="NaN"):
        frechet_estimate(np.full((5, 4), np.nan), mu, sigma)
