import numpy as np
import pytest
from scipy import stats

from ddpm.errors import DataError
from ddpm.evaluation.kernel_distance import kernel_distance
from ddpm.evaluation.metrics import blocks, by_class, mean_of_independent, student, wilson


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 6, 9, 30, 1000])
def test_students_quantile_is_scipys(degrees: int) -> None:
    assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=5e-3 if degrees == 3 else 1e-3)


def test_the_mean_of_independent_values_has_students_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 10)
    expected = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    estimate = mean_of_independent(values)
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (37, 80), (10, 10)])
def test_a_share_has_wilsons_interval(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    estimate = wilson(hits, n)
    assert estimate.value == hits / n
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_blocks_cover_the_rows_once_and_refuse_what_is_not_finite() -> None:
    features = np.arange(14, dtype=np.float32).reshape(7, 2)
    parts = list(blocks(features, rows=3))
    assert [where.stop for where, _ in parts] == [3, 6, 7]
    assert np.array_equal(np.concatenate([block for _, block in parts]), features)
    features[5, 1] = np.inf
    with pytest.raises(DataError, match="infinite"):
        list(blocks(features, rows=3))


def test_each_class_is_compared_with_its_own_reference() -> None:
    rng = np.random.default_rng(0)
    features, reference = rng.normal(size=(41, 3)), rng.normal(size=(61, 3))
    labels, reference_labels = np.arange(41) % 2, np.arange(61) % 3
    labels[0] = 7
    found = by_class(kernel_distance, features, labels, reference, reference_labels)
    assert set(found.results) == {0, 1}
    assert found.results[1] == kernel_distance(features[labels == 1], reference[reference_labels == 1])
    assert "the images hold 0 images" in found.left_out[2]
    assert "the reference images hold 0 images" in found.left_out[7]


def test_labels_must_be_as_many_as_rows() -> None:
    with pytest.raises(DataError, match="labels of shape"):
        by_class(kernel_distance, np.zeros((4, 2)), np.zeros(3, int), np.zeros((4, 2)), np.zeros(4, int))
