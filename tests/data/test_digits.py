"""The embedded digits are scikit-learn's."""

import numpy as np
import pytest

from ddpm.config import DataConfig
from ddpm.data import ImageSet, load_dataset
from ddpm.data.digits import ASSET


def test_they_equal_scikit_learns(digits: ImageSet) -> None:
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    np.testing.assert_array_equal(digits.labels, sklearn.target)
    np.testing.assert_array_equal(digits.images[:, 0], (sklearn.images * 255 + 8) // 16)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.classes == tuple("0123456789")


def test_the_splits_part_them_about_80_to_20_in_every_class(digits: ImageSet) -> None:
    train, test = (load_dataset(DataConfig(dataset="digits", split=split)) for split in ("train", "test"))
    assert len(train) + len(test) == len(digits) == 1797
    assert train.labels is not None
    assert test.labels is not None
    share = np.bincount(test.labels) / np.bincount(digits.labels)
    assert share.min() > 0.19
    assert share.max() <= 0.2
    rows = {image.tobytes() for image in digits.images}
    assert {image.tobytes() for image in train.images} | {image.tobytes() for image in test.images} == rows


def test_the_asset_is_small() -> None:
    assert ASSET.stat().st_size < 46_000
