"""Folders of image files: classes, splits, label files, what is left out."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm.config import DataConfig
from ddpm.data import ImageSet, Skipped, load_dataset
from ddpm.errors import ConfigError, DataError


def paint(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(path)


def load(path: Path, **options: Any) -> ImageSet:
    return load_dataset(DataConfig(dataset="folder", path=path, **options))


def values(found: ImageSet) -> list[int]:
    """The painted values: image by image, in order."""
    return [int(image[0, 0, 0]) for image in found.images]


def labels(found: ImageSet) -> list[int]:
    assert found.labels is not None
    return found.labels.tolist()


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for value, name in enumerate(["b.png", "a.PNG", "c.bmp", "notes.txt.png"]):
        paint(tmp_path / name, value)
    for name in ("notes.txt", ".hidden.png", "__MACOSX/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not looked at")
    found = load(tmp_path)
    assert values(found) == [1, 0, 2, 3]
    assert found.labels is None
    assert found.classes == ()
    assert found.shape == (1, 8, 8)
    assert found.skipped == ()


def test_the_first_level_of_subfolders_names_the_classes(tmp_path: Path) -> None:
    for value, name in enumerate(["dog/x.png", "cat/deep/er/y.png", "cat/z.png", "dog/a/w.png"]):
        paint(tmp_path / name, value)
    found = load(tmp_path)
    assert found.classes == ("cat", "dog")
    assert values(found) == [2, 1, 0, 3]
    assert labels(found) == [0, 0, 1, 1]


def test_images_beside_subfolders_have_no_classes_and_a_note_says_so(tmp_path: Path) -> None:
    for name in ("cat/x.png", "y.png"):
        paint(tmp_path / name, 0)
    found = load(tmp_path)
    assert found.labels is None
    assert any("no classes" in note for note in found.notes)


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "cat/x.png", 0)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert f"{tmp_path / 'dog'} holds no image" in str(error.value)
    (tmp_path / "dog/x.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="no image of the class 'dog' can be read"):
        load(tmp_path)


def test_splits(tmp_path: Path) -> None:
    for value, name in enumerate(["train/cat/a.png", "train/dog/b.png", "test/dog/c.png", "test/emu/d.png"]):
        paint(tmp_path / name, value)
    train, test, everything = (load(tmp_path, split=split) for split in ("train", "test", "all"))
    assert train.classes == test.classes == everything.classes == ("cat", "dog", "emu")
    assert (values(train), labels(train)) == ([0, 1], [0, 1])
    assert (values(test), labels(test)) == ([2, 3], [1, 2])
    assert (values(everything), labels(everything)) == ([0, 1, 2, 3], [0, 1, 1, 2])


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train/a.png", "plane/b.png"):
        paint(tmp_path / name, 0)
    assert load(tmp_path).classes == ("plane", "train")


def test_a_folder_without_splits_is_all_for_training(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 7)
    assert load(tmp_path, split="train").fingerprint == load(tmp_path, split="all").fingerprint
    with pytest.raises(DataError, match=r"--data\.split test"):
        load(tmp_path, split="test")


def test_a_label_file_overrides_the_subfolders(tmp_path: Path) -> None:
    for value, name in enumerate(["a/1.png", "a/2.png", "b/3.png"]):
        paint(tmp_path / "in" / name, value)
    (tmp_path / "labels.csv").write_text("path,label\nb/3.png,red\na/1.png,blue\na/9.png,red\n")
    found = load(tmp_path / "in", labels=tmp_path / "labels.csv")
    assert found.classes == ("blue", "red")
    assert (values(found), labels(found)) == ([0, 2], [0, 1])
    assert found.skipped == (Skipped("a/2.png", "has no label in the label file"),)
    assert any("a/9.png" in note for note in found.notes)
    (tmp_path / "labels.csv").write_text("in/a/1.png,red\n")
    with pytest.raises(DataError, match=r"paths are relative to --data\.path"):
        load(tmp_path / "in", labels=tmp_path / "labels.csv")


def test_odd_and_damaged_files_are_counted_and_reasoned(tmp_path: Path) -> None:
    paint(tmp_path / "grey.png", 3)
    paint(tmp_path / "rgb.webp", 5, "RGB")
    paint(tmp_path / "photo.jpg", 9, "RGB")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.tif")
    Image.fromarray(np.full((8, 8), 257 * 4, np.uint16)).save(tmp_path / "deep.png")
    Image.new("P", (8, 8)).save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("P", (8, 8), 1)])
    (tmp_path / "broken.png").write_bytes((tmp_path / "grey.png").read_bytes()[:50])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    found = load(tmp_path)
    assert found.shape == (3, 8, 8)
    assert values(found) == [4, 3, 0, 9, 255, 5, 255]
    assert [skipped.path for skipped in found.skipped] == ["broken.png", "dangling.png", "text.jpg"]
    assert all(skipped.reason for skipped in found.skipped)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    paint(tmp_path / os.fsdecode(b"a\xff.png"), 6)
    Path(tmp_path / os.fsdecode(b"b\xff.png")).write_bytes(b"damaged")
    for _ in range(2):
        found = load(tmp_path)
        assert values(found) == [6]
        assert [skipped.path for skipped in found.skipped] == ["b\ufffd.png"]


def test_one_colour_image_makes_the_set_rgb(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 1)
    assert load(tmp_path).shape[0] == 1
    paint(tmp_path / "b.png", 2, "RGB")
    assert load(tmp_path).shape[0] == 3
    assert load(tmp_path, channels=1).shape[0] == 1


def test_mixed_sizes_are_brought_to_one_and_a_note_says_how(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 1, size=(120, 80))
    paint(tmp_path / "b.png", 2, size=(90, 60))
    found = load(tmp_path)
    assert found.shape == (1, 40, 64)
    assert any("2 sizes, 60x90 to 80x120" in note and "become 40x64" in note for note in found.notes)
    asked = load(tmp_path, size=(16, 24), resize="fit")
    assert asked.shape == (1, 16, 24)
    assert not any("sizes" in note for note in asked.notes)


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere/x.png", 4)
    (tmp_path / "in/cat").mkdir(parents=True)
    (tmp_path / "in/cat/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "in")
    assert values(load(tmp_path / "in")) == [4]


def test_folders_that_give_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs --data\.path"):
        load_dataset(DataConfig(dataset="folder"))
    with pytest.raises(DataError, match="is not a folder"):
        load(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no image"):
        load(tmp_path)
    (tmp_path / "a.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"none of its 1 images can be read \(a\.png"):
        load(tmp_path)
