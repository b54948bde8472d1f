"""NumPy archives: layouts, labels, refusals."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.config import DataConfig
from ddpm.data import ImageSet, load_dataset
from ddpm.errors import ConfigError, DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)


def load(path: Path, **options: Any) -> ImageSet:
    return load_dataset(DataConfig(dataset="npz", path=path, **options))


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("images", "labels")])
def test_layouts_and_names(tmp_path: Path, names: tuple[str, str]) -> None:
    labels = np.array([2, 0, 2, 1], np.int32)
    for array in (IMAGES, IMAGES.transpose(0, 3, 1, 2)):
        np.savez(tmp_path / "a.npz", **{names[0]: array, names[1]: labels})
        found = load(tmp_path / "a.npz")
        np.testing.assert_array_equal(found.images, IMAGES.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(found.labels, labels)
        assert found.classes == ("0", "1", "2")


def test_grey_images_need_no_channel_axis(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES[..., 0])
    found = load(tmp_path / "a.npz", split="all")
    np.testing.assert_array_equal(found.images, IMAGES[..., 0][:, None])
    assert found.labels is None


def payload(path: Path) -> Any:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (path,)

    return Payload()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": IMAGES.astype(np.float32) / 255}, "float32"),
        ({"other": IMAGES}, "other"),
        ({"arr_0": IMAGES[..., :2]}, "(4, 6, 5, 2)"),
        ({"arr_0": IMAGES[0, 0]}, "(5, 3)"),
        ({"arr_0": IMAGES, "arr_1": np.array([0, 1, -1, 0])}, "-1"),
        ({"arr_0": IMAGES, "arr_1": np.array([0.5, 1, 0, 0])}, "float64"),
        ({"arr_0": IMAGES, "arr_1": np.array([0, 1, 0])}, "(3,)"),
        ({"arr_0": IMAGES, "arr_1": np.array([0, 1, 0, 1 << 40])}, str(1 << 40)),
        ({"arr_0": IMAGES[:0]}, "holds no image"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError) as error:
        load(tmp_path / "a.npz")
    message = str(error.value)
    assert words in message
    assert message.endswith(".")
    assert "\n" not in message


def test_pickles_are_not_run(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    np.savez(tmp_path / "a.npz", arr_0=np.array([payload(executed)], object))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(payload(executed)))
    for name in ("a.npz", "b.npz", "absent.npz"):
        with pytest.raises(DataError, match=name):
            load(tmp_path / name)
    assert not executed.exists()


def test_flags(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES)
    with pytest.raises(ConfigError, match=r"--data\.path"):
        load_dataset(DataConfig(dataset="npz"))
    with pytest.raises(DataError, match="no test part"):
        load(tmp_path / "a.npz", split="test")


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 900), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_files_are_read_rightly_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez_compressed(path, IMAGES)
    whole = bytearray(path.read_bytes())
    place = min(place, len(whole) - 1)
    if cut:
        del whole[place:]
    else:
        whole[place] ^= 1 << bit
    path.write_bytes(whole)
    try:
        found = load(path)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(found.images, IMAGES.transpose(0, 3, 1, 2))
