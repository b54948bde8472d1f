from typing import TYPE_CHECKING

import numpy as np
import pytest

from ddpm.data.base import ImageSet
from ddpm.errors import DataError
from ddpm.evaluation.copies import compare_copies

if TYPE_CHECKING:
    from numpy.typing import NDArray


def parts(digits: ImageSet, *cuts: int) -> "list[NDArray[np.uint8]]":
    order = np.random.default_rng(0).permutation(len(digits.images))
    return np.split(digits.images[order][: cuts[-1]], cuts[:-1])


def test_the_share_of_copies_is_that_of_crafted_ones(digits: ImageSet) -> None:
    train, held_out, new = parts(digits, 800, 1150, 1500)
    noise = np.random.default_rng(0).integers(0, 3, size=new.shape)
    copied = (train[: len(new)] + noise).clip(0, 255).astype(np.uint8)
    found = compare_copies(copied, ImageSet("train", train), ImageSet("held out", held_out))
    assert found.copies is not None and found.nearest_held_out is not None
    assert found.copies.value > 0.99
    assert found.nearest_train.value < 3 < found.nearest_held_out.low


def test_real_images_are_no_copies_and_noise_is_far_from_all(digits: ImageSet) -> None:
    train, held_out, new = parts(digits, 800, 1150, 1500)
    sets = ImageSet("train", train), ImageSet("held out", held_out)
    honest = compare_copies(new, *sets)
    assert honest.copies is not None and honest.nearest_held_out is not None
    assert honest.copies.low <= 0.01
    assert honest.nearest_train.low < honest.nearest_held_out.high
    assert honest.nearest_train.high > honest.nearest_held_out.low
    garbage = compare_copies(np.random.default_rng(0).integers(0, 256, new.shape).astype(np.uint8), *sets)
    assert garbage.copies is not None and garbage.copies.value == 0.0


def test_distances_are_root_mean_squares_of_the_nearest(digits: ImageSet) -> None:
    train, new = parts(digits, 300, 400)
    found = compare_copies(new, ImageSet("train", train), None)
    gaps = (new[:, None].astype(float) - train[None]) ** 2
    assert found.nearest_train.value == pytest.approx(np.sqrt(gaps.mean(axis=(2, 3, 4)).min(axis=1)).mean(), rel=1e-9)
    assert found.copies is None and found.nearest_held_out is None


def test_other_shapes_and_single_images_are_refused(digits: ImageSet) -> None:
    with pytest.raises(DataError, match="must be alike"):
        compare_copies(np.zeros((3, 1, 4, 4), np.uint8), digits, None)
    with pytest.raises(DataError, match="at least 2"):
        compare_copies(digits.images[:1], digits, None)
