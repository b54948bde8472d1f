"""The judge of the demo, judged on images whose verdict is known."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from ddpm.config import DataConfig
from ddpm.data import ImageSet, load_dataset
from ddpm.errors import DataError
from ddpm.evaluation.neighbours import judge, nearest


@pytest.fixture(scope="module")
def train() -> ImageSet:
    return load_dataset(DataConfig(dataset="digits", split="train"))


@pytest.fixture(scope="module")
def held_out() -> ImageSet:
    return load_dataset(DataConfig(dataset="digits", split="test"))


@pytest.mark.parametrize("block", [1, 7, 500])
def test_neighbours_are_scikit_learns(train, held_out, block):
    index, distance = nearest(held_out.images, train.images, block)
    flat = train.images.reshape(len(train), -1).astype(np.float64)
    wanted, places = (
        NearestNeighbors(n_neighbors=1, algorithm="brute")
        .fit(flat)
        .kneighbors(held_out.images.reshape(len(held_out), -1).astype(np.float64))
    )
    np.testing.assert_allclose(distance, wanted[:, 0], rtol=1e-12)
    np.testing.assert_array_equal(index, places[:, 0])


def test_a_tie_goes_to_the_first():
    references = np.array([10, 30, 10, 50], np.uint8).reshape(4, 1, 1, 1)
    index, distance = nearest(np.array([20, 50], np.uint8).reshape(2, 1, 1, 1), references)
    assert index.tolist() == [0, 3]
    assert distance.tolist() == [10.0, 0.0]


def test_real_held_out_digits_score_as_real(train, held_out):
    verdict = judge(held_out.images, held_out.labels, train, held_out)
    assert verdict.judged_as_asked == verdict.real_held_out > 0.97
    assert verdict.copies <= 0.02 * len(held_out)
    assert 0.9 < verdict.diversity < 1.1
    assert verdict.num_samples == len(held_out)


def test_copies_of_training_images_are_counted_as_copies(train, held_out):
    verdict = judge(train.images[:100], train.labels[:100], train, held_out)
    assert (verdict.copies, verdict.judged_as_asked) == (100, 1.0)
    nearly = train.images[:100].copy()
    nearly[:, 0, 0, 0] ^= 3
    assert judge(nearly, train.labels[:100], train, held_out).copies == 100


def test_wrong_labels_score_nothing(train, held_out):
    verdict = judge(train.images[:100], (train.labels[:100] + 1) % 10, train, held_out)
    assert verdict.judged_as_asked == 0.0


def test_one_image_over_and_over_has_no_diversity(train, held_out):
    same = np.repeat(held_out.images[:10], 10, axis=0)
    assert judge(same, np.repeat(held_out.labels[:10], 10), train, held_out).diversity == pytest.approx(0.0, abs=1e-6)


def test_noise_is_no_digit_and_no_copy(train, held_out):
    noise = np.random.default_rng(0).integers(0, 256, (100, 1, 8, 8), dtype=np.uint8)
    verdict = judge(noise, np.arange(100) % 10, train, held_out)
    assert verdict.copies == 0
    assert verdict.judged_as_asked < 0.4
    assert verdict.diversity > 1.3


def test_diversity_and_copy_distance_by_hand():
    def pixels(*values: int) -> np.ndarray:
        return np.array(values, np.uint8).reshape(-1, 1, 1, 1)

    train = ImageSet("t", pixels(0, 10, 100, 140), np.array([0, 0, 1, 1]), ("a", "b"))
    held_out = ImageSet("h", pixels(13, 104), np.array([0, 1]), ("a", "b"))
    verdict = judge(pixels(0, 20, 101, 121), np.array([0, 0, 1, 1]), train, held_out)
    assert verdict.copy_distance == pytest.approx(3 + 0.01)
    assert verdict.copies == 2
    assert verdict.diversity == pytest.approx((20 + 20) / (10 + 40))
    assert verdict.judged_as_asked == 1.0


def test_what_cannot_be_judged(train, held_out):
    unlabelled = ImageSet("u", train.images)
    with pytest.raises(DataError, match="has no labels"):
        judge(train.images[:4], train.labels[:4], unlabelled, held_out)
    with pytest.raises(DataError, match="must be alike to be compared"):
        judge(np.zeros((4, 3, 8, 8), np.uint8), train.labels[:4], train, held_out)
    with pytest.raises(DataError, match="at least two images of one class"):
        judge(train.images[:1], train.labels[:1], train, held_out)
