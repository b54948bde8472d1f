import numpy as np
import pytest
from prdc import compute_prdc

from ddpm.errors import DataError
from ddpm.evaluation import metrics
from ddpm.evaluation.prdc import Manifold, precision_recall_density_coverage

NAMES = ("precision", "recall", "density", "coverage")


def _values(found: Manifold) -> dict[str, float]:
    return {name: getattr(found, name).value for name in NAMES}


@pytest.mark.parametrize(
    ("n", "m", "k", "scale"), [(200, 300, 5, 1.0), (300, 200, 3, 0.6), (60, 50, 1, 2.0), (40, 40, 38, 1.0)]
)
def test_the_values_are_those_of_prdc(n: int, m: int, k: int, scale: float) -> None:
    rng = np.random.default_rng(0)
    features, reference = scale * rng.normal(size=(n, 8)) + 3.2, rng.normal(size=(m, 8)) + 3.0
    assert _values(precision_recall_density_coverage(features, reference, k)) == pytest.approx(
        compute_prdc(reference, features, k), rel=1e-12
    )


def test_the_size_of_the_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    features, reference = rng.normal(size=(130, 6)), rng.normal(size=(170, 6))
    whole = precision_recall_density_coverage(features, reference, 4)
    small = metrics.blocks
    monkeypatch.setattr("ddpm.evaluation.prdc.blocks", lambda x: small(x, rows=37))
    assert precision_recall_density_coverage(features, reference, 4) == whole


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_set_against_itself_has_its_closed_form_at_any_rounding(
    offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = np.random.default_rng(2).normal(size=(300, 32)) + offset
    small = metrics.blocks
    monkeypatch.setattr("ddpm.evaluation.prdc.blocks", lambda x: small(x, rows=71))
    found = _values(precision_recall_density_coverage(features, features.copy(), 5))
    # a ball holds its centre and k - 1 neighbours: the k-th lies on its surface
    assert found == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}


def test_points_on_a_line_have_a_closed_form() -> None:
    reference = np.arange(10.0)[:, None]  # k = 1: balls of radius 1
    features = np.array([[0.5], [3.0], [20.0], [22.0]])
    found = _values(precision_recall_density_coverage(features, reference, 1))
    # 0.5 lies in the balls of 0 and 1, 3.0 in that of 3 alone; the images' balls have radii 2.5, 2.5, 2 and 2
    assert found == {"precision": 0.5, "recall": 0.6, "density": 0.75, "coverage": 0.3}


def test_repeated_points_lie_in_no_ball_of_radius_nought() -> None:
    found = _values(precision_recall_density_coverage(np.ones((20, 3)), np.ones((20, 3)), 5))
    assert found == dict.fromkeys(NAMES, 0.0)


@pytest.mark.slow
def test_intervals_cover_the_expected_values() -> None:
    rng = np.random.default_rng(3)
    found = [
        precision_recall_density_coverage(1.1 * rng.normal(size=(600, 16)), rng.normal(size=(800, 16)))
        for _ in range(100)
    ]
    for name in NAMES:
        estimates = [getattr(one, name) for one in found]
        expected = np.mean([one.value for one in estimates])
        assert 0.88 <= np.mean([one.low <= expected <= one.high for one in estimates]) <= 0.99, name


def test_few_images_have_no_interval_and_too_few_no_value() -> None:
    rng = np.random.default_rng(0)
    features, reference = rng.normal(size=(17, 3)), rng.normal(size=(40, 3))
    assert precision_recall_density_coverage(features, reference, 5).recall.low is None
    bigger = precision_recall_density_coverage(rng.normal(size=(18, 3)), reference, 5).recall
    assert 0.0 <= bigger.low <= bigger.value <= bigger.high <= 1.0
    with pytest.raises(DataError, match="the images hold 5 images"):
        precision_recall_density_coverage(features[:5], reference, 5)
    with pytest.raises(DataError, match="the reference images hold 5"):
        precision_recall_density_coverage(features, reference[:5], 5)
    with pytest.raises(DataError, match="k is 0"):
        precision_recall_density_coverage(features, reference, 0)
    with pytest.raises(DataError, match="one extractor"):
        precision_recall_density_coverage(features[:, :2], reference)
