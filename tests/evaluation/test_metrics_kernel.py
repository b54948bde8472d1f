import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from torchmetrics.image.kid import poly_mmd

from ddpm.errors import DataError
from ddpm.evaluation.kernel_distance import kernel_distance
from ddpm.evaluation.metrics import student
from ddpm.randomness import permutation


def _sets(n: int = 300, m: int = 300, d: int = 16, shift: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)) + shift, rng.normal(size=(m, d))


def _torchmetrics(features: np.ndarray, reference: np.ndarray) -> float:
    return poly_mmd(torch.from_numpy(reference), torch.from_numpy(features)).item()


def test_whole_sets_give_the_distance_of_torchmetrics() -> None:
    features, reference = _sets()
    assert kernel_distance(features, reference).value == pytest.approx(_torchmetrics(features, reference), rel=1e-9)


def test_sets_of_two_sizes_and_many_blocks_give_the_usual_formula() -> None:
    features, reference = _sets(2100, 700, 4)
    xx, yy, xy = (
        polynomial_kernel(a, b, degree=3) for a, b in [(features,) * 2, (reference,) * 2, (features, reference)]
    )
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    assert kernel_distance(features, reference).value == pytest.approx(sum(off) - 2.0 * xy.mean(), rel=1e-9)


def test_disjoint_subsets_average_their_distances() -> None:
    features, reference = _sets(330, 420)
    ours, theirs = permutation(5, 0, 330).numpy(), permutation(5, 1, 420).numpy()
    cuts = [slice(100 * i, 100 * i + 100) for i in range(3)]
    values = np.array([_torchmetrics(features[ours[cut]], reference[theirs[cut]]) for cut in cuts])
    found = kernel_distance(features, reference, subset_size=100, seed=5)
    assert found.value == pytest.approx(values.mean(), rel=1e-9)
    assert found.high - found.value == pytest.approx(student(2) * values.std(ddof=1) / np.sqrt(3), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_intervals_cover_the_distance_of_the_distributions(shift: float) -> None:
    rng = np.random.default_rng(1)
    draws = [(rng.normal(size=(150, 64)) + shift, rng.normal(size=(200, 64))) for _ in range(200)]
    estimates = [kernel_distance(features, reference) for features, reference in draws]
    expected = 0.0 if shift == 0 else np.mean([estimate.value for estimate in estimates])
    assert 0.90 <= np.mean([estimate.low <= expected <= estimate.high for estimate in estimates]) <= 0.98


def test_what_cannot_be_compared_is_refused() -> None:
    features, reference = _sets(20, 30)
    with pytest.raises(DataError, match="subsets of 15"):
        kernel_distance(features, reference, subset_size=15)
    with pytest.raises(DataError, match="at least 2"):
        kernel_distance(features[:1], reference)
    with pytest.raises(DataError, match="one extractor"):
        kernel_distance(features[:, :4], reference)
    with pytest.raises(DataError, match="NaN"):
        kernel_distance(np.full_like(features, np.nan), reference)
