"""The drawn shapes: exact labels, exact statistics."""

import numpy as np
import pytest

from ddpm.config import DataConfig
from ddpm.data import load_dataset
from ddpm.data.shapes import CLASSES, COLOURS, draw, radius_px
from ddpm.errors import ConfigError

GOLDEN = "37b9e404f92450c676c86f6f6a8034cda000b461c894cb6aa3c01630316cf515"


def test_every_image_shows_what_its_label_says() -> None:
    found = load_dataset(DataConfig(dataset="shapes:num_images=600", split="all"))
    assert found.shape == (3, 32, 32)
    assert found.labels is not None
    np.testing.assert_array_equal(np.bincount(found.labels), np.full(12, 50))
    areas: dict[str, set[int]] = {}
    for image, label in zip(found.images, found.labels, strict=True):
        colour, shape = CLASSES[label].split()
        painted = image.any(axis=0)
        assert {tuple(pixel) for pixel in image[:, painted].T} == {COLOURS[colour]}
        areas.setdefault(shape, set()).add(int(painted.sum()))
    side = 2 * radius_px(32) + 1
    disc = sum(x * x + y * y <= 64 for x in range(-8, 9) for y in range(-8, 9))
    triangle = sum(2 * (row // 2) + 1 for row in range(side))
    assert areas == {"square": {side**2}, "disc": {disc}, "triangle": {triangle}}


def test_a_shape_is_drawn_where_it_is_asked_for() -> None:
    image = draw(np.array([1]), np.array([[3, 5]]), 8)[0]
    expected = np.zeros((8, 8), np.uint8)
    expected[1:6, 3:8] = 255
    np.testing.assert_array_equal(image, np.stack([expected, 0 * expected, 0 * expected]))
    disc = draw(np.array([3]), np.array([[4, 4]]), 9)[0, 1] // 255
    np.testing.assert_array_equal(disc, disc.T)
    np.testing.assert_array_equal(disc[:, ::-1], disc)


def test_centres_are_uniform_where_shapes_fit() -> None:
    found = load_dataset(DataConfig(dataset="shapes:num_images=6000", split="all"))
    squares = found.images[np.isin(found.labels, [1, 4, 7, 10])].any(axis=1)
    for axis in (1, 2):
        counts = np.bincount(squares.any(axis=axis).argmax(axis=1))
        assert len(counts) == 32 - 2 * radius_px(32), "from the first place where it fits to the last"
        expected = counts.sum() / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 37.7, "chi-squared, 15 degrees of freedom, p = 0.001"


def test_they_depend_on_the_seed_and_nothing_else() -> None:
    one, same, other = (
        load_dataset(DataConfig(dataset=f"shapes:num_images=120,seed={seed}"), None).fingerprint for seed in (1, 1, 2)
    )
    assert one == same != other
    assert load_dataset(DataConfig(dataset="shapes:num_images=60")).fingerprint == GOLDEN
    small, large = (load_dataset(DataConfig(dataset=f"shapes:num_images={n}", split="all")).images for n in (60, 2400))
    np.testing.assert_array_equal(small, large[:60])


def test_train_and_test_make_all() -> None:
    parts = [load_dataset(DataConfig(dataset="shapes:num_images=600,size=16", split=s)) for s in ("train", "test")]
    assert [len(part) for part in parts] == [480, 120]
    assert parts[0].shape == (3, 16, 16)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="size=4"):
        load_dataset(DataConfig(dataset="shapes:size=4"))
