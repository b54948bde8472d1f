"""What an ImageSet promises, and what `load_dataset` does to every data set alike."""

import numpy as np
import pytest
from PIL import Image

from ddpm.config import DataConfig
from ddpm.data import Dataset, ImageSet, load_dataset
from ddpm.data.base import every_fifth
from ddpm.data.decode import convert_arrays
from ddpm.errors import ConfigError, DataError
from ddpm.registry import register

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 3, 12, 20), dtype=np.uint8)


@register("test-pictures")
class Pictures(Dataset):
    """Five random RGB images, as somebody else's data set would be."""

    count: int = 5

    def load(self, config: DataConfig) -> ImageSet:
        return ImageSet("test-pictures", PICTURES[: self.count], np.arange(self.count) % 2, ("even", "odd"))


def refusal(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_set_knows_its_shape_and_cannot_be_written_to() -> None:
    found = load_dataset(DataConfig(dataset="test-pictures"))
    assert (len(found), found.shape, found.num_classes) == (5, (3, 12, 20), 2)
    assert found.labels is not None
    assert found.labels.dtype == np.int64
    for array in (found.images, found.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert PICTURES.flags.writeable, "the owner of the array keeps the right to write"


@pytest.mark.parametrize(
    ("images", "labels", "classes", "words"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), None, (), "float32"),
        (np.zeros((2, 4, 4), np.uint8), None, (), "(2, 4, 4)"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, int), ("a",), "(3,)"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2), ("a",), "float64"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 2]), ("a", "b"), "0 to 2"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.array([-1, 0]), ("a", "b"), "-1 to 0"),
        (np.zeros((2, 1, 4, 4), np.uint8), None, ("a",), "no labels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    images: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...], words: str
) -> None:
    with pytest.raises(DataError) as error:
        ImageSet("mine", images, labels, classes)
    assert words in refusal(error)
    assert "'mine'" in refusal(error)


def test_the_fingerprint_is_of_the_content() -> None:
    images, labels = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 1, 8, 8), np.array([0, 1])
    one = ImageSet("one", images, labels, ("a", "b"), notes=("a note",))
    assert ImageSet("two", images.copy(order="F"), labels.astype(np.int32), ("a", "b")).fingerprint == one.fingerprint
    changed = images.copy()
    changed[1, 0, 7, 7] ^= 1
    others = [
        ImageSet("one", changed, labels, ("a", "b")),
        ImageSet("one", images, labels[::-1], ("a", "b")),
        ImageSet("one", images, labels, ("a", "c")),
        ImageSet("one", images.reshape(2, 1, 4, 16), labels, ("a", "b")),
        ImageSet("one", images),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_size_and_channels_are_those_of_the_config() -> None:
    grey = load_dataset(DataConfig(dataset="test-pictures", channels=1, size=(24, 10), resize="stretch"))
    assert grey.shape == (1, 24, 10)
    assert grey.classes == ("even", "odd")
    for image, original in zip(grey.images, PICTURES, strict=True):
        expected = Image.fromarray(original.transpose(1, 2, 0)).convert("L").resize((10, 24), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image[0], np.asarray(expected))


def test_grey_becomes_rgb_by_repetition(digits: ImageSet) -> None:
    found = load_dataset(DataConfig(dataset="digits", split="all", channels=3))
    np.testing.assert_array_equal(found.images, digits.images.repeat(3, axis=1))


def test_a_wanted_size_that_is_there_copies_nothing() -> None:
    found = load_dataset(DataConfig(dataset="test-pictures", size=(12, 20), channels=3))
    assert np.shares_memory(found.images, PICTURES)


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(DataError, match="holds no image"):
        load_dataset(DataConfig(dataset="test-pictures:count=0"))


def test_odd_channel_counts_can_only_be_kept() -> None:
    images = np.zeros((2, 4, 8, 8), np.uint8)
    assert convert_arrays(images, (8, 8), 4, "crop") is images
    with pytest.raises(DataError, match="4 channels"):
        convert_arrays(images, (8, 8), 3, "crop")


def test_a_flag_that_a_data_set_does_not_read_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        load_dataset(DataConfig(dataset="digits", path="somewhere"))
    assert "--data.path" in refusal(error)
    with pytest.raises(ConfigError, match=r"--data\.labels"):
        load_dataset(DataConfig(dataset="mnist", labels="labels.csv"))


def test_an_unknown_data_set_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_dataset(DataConfig(dataset="digit"))


def test_outside_code_is_reached_by_its_path() -> None:
    spec = f"{Pictures.__module__}:Pictures:count=3"
    assert Dataset.parse(spec) == Pictures(count=3)


def test_every_data_set_prints_its_spec_and_parses_back() -> None:
    names = [name for name in Dataset.names() if not name.startswith("test-")]
    assert names == ["cifar10", "digits", "fashion-mnist", "folder", "mnist", "npz", "shapes"]
    for name in names:
        built = Dataset.parse(name)
        assert Dataset.parse(built.spec) == built


def test_every_fifth_of_each_class() -> None:
    labels = RNG.integers(0, 3, 200)
    chosen = every_fifth(labels)
    for label in range(3):
        np.testing.assert_array_equal(np.flatnonzero(chosen[labels == label]), np.arange(4, (labels == label).sum(), 5))
