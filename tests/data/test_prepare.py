"""The cache of decoded images: built once, by one process, whole or not at all; damage is noticed."""

import json
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.config import DataConfig
from ddpm.data import ImageSet, load_dataset
from ddpm.data import prepare as prepare_module
from ddpm.data.places import cache_root
from ddpm.errors import DataError

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        place = tmp_path / "images" / ("even" if i % 2 == 0 else "odd") / f"{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(place)
    (tmp_path / "images" / "odd" / "broken.png").write_bytes(b"x")
    return tmp_path / "images"


def load(folder: Path, **options: object) -> ImageSet:
    return load_dataset(DataConfig.model_validate({"dataset": "folder", "path": folder, **options}))


def is_mapped(array: object) -> bool:
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array is not None


def prepared() -> list[Path]:
    return sorted(path for path in (cache_root() / "prepared").iterdir() if path.is_dir())


def test_the_second_time_nothing_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)
    monkeypatch.setattr(prepare_module, "_build", None)
    second = load(folder)
    assert second.fingerprint == first.fingerprint
    assert (second.skipped, second.classes, second.notes) == (first.skipped, first.classes, first.notes)
    assert is_mapped(second.images)
    assert not second.images.flags.writeable
    (place,) = prepared()
    assert {path.name for path in place.iterdir()} == {"images.npy", "labels.npy", "meta.json", "skipped.csv"}
    assert (place / "skipped.csv").read_text().splitlines()[0] == "path,reason"
    np.testing.assert_array_equal(np.load(place / "images.npy"), first.images)


def test_a_moved_folder_is_not_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)
    monkeypatch.setattr(prepare_module, "_build", None)
    moved = folder.rename(folder.with_name("moved"))
    assert load(moved).fingerprint == first.fingerprint


def test_a_changed_folder_or_option_is_decoded_anew(folder: Path) -> None:
    load(folder)
    load(folder, size=(4, 4))
    load(folder, size=(4, 4), resize="fit")
    load(folder, channels=1)
    os.utime(folder / "even" / "00.png", ns=(1, 1))
    load(folder)
    (folder / "even" / "00.png").rename(folder / "even" / "zz.png")
    load(folder)
    assert len(prepared()) == 6


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json", "skipped.csv"])
def test_a_damaged_cache_is_built_anew(folder: Path, name: str) -> None:
    whole = load(folder)
    fingerprint, skipped = whole.fingerprint, whole.skipped
    (place,) = prepared()
    for content in ((place / name).read_bytes()[:-1], (place / name).read_bytes() + b"\0", b"", None):
        if content is None:
            (place / name).unlink()
        else:
            (place / name).write_bytes(content)
        again = load(folder)
        assert again.fingerprint == fingerprint
        assert again.skipped == skipped or name == "skipped.csv"


def test_meta_that_does_not_fit_the_array_is_noticed(folder: Path) -> None:
    fingerprint = load(folder).fingerprint
    meta = prepared()[0] / "meta.json"
    values = json.loads(meta.read_text())
    meta.write_text(json.dumps({**values, "shape": [12, 3, 10, 8]}))
    assert load(folder).fingerprint == fingerprint


def test_progress_counts_every_image_twice(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = DataConfig(dataset="folder", path=folder)
    load_dataset(config, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 26) for i in [*range(1, 14), *range(14, 26)]]
    seen.clear()
    load_dataset(config, lambda done, total: seen.append((done, total)))
    assert seen == []


TWO = """
import sys, time
from ddpm.data import load_dataset, prepare
from ddpm.config import DataConfig
build = prepare._build
def slow_build(*arguments):
    print("building", flush=True)
    time.sleep(0.5)
    build(*arguments)
prepare._build = slow_build
sys.stdin.readline()
print(load_dataset(DataConfig(dataset="folder", path=sys.argv[1])).fingerprint)
"""


def test_two_processes_at_once_build_one_cache(folder: Path) -> None:
    command = [sys.executable, "-c", TWO, str(folder)]
    pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=100)[0].split() for process in pair]
    assert sorted(len(output) for output in outputs) == [1, 2], "one of the two builds"
    assert {output[-1] for output in outputs} == {load(folder).fingerprint}
    assert len(prepared()) == 1


def test_what_a_killed_builder_left_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = "import os, sys; from ddpm.data import prepare, load_dataset; from ddpm.config import DataConfig\n"
    killed += "prepare._write_meta = lambda *_: os.kill(os.getpid(), 9)\n"
    killed += "load_dataset(DataConfig(dataset='folder', path=sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", killed, str(folder)], check=False).returncode == -9
    assert len(prepared()) == 1, "the unfinished one"
    found = load(folder)
    assert len(found) == 12
    assert [path.name.startswith(".") for path in prepared()] == [False]


def test_an_unwritable_cache_names_the_variable(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "under", Path("/proc/ddpm-cache")):
        monkeypatch.setenv("DDPM_CACHE", str(place))
        with pytest.raises(DataError) as error:
            load(folder)
        message = str(error.value)
        assert "DDPM_CACHE" in message
        assert str(place) in message
        assert "\n" not in message


def test_a_disk_that_fills_up_leaves_no_partial_cache(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DataError) as error:
            load(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "DDPM_CACHE" in str(error.value)
    assert prepared() == []
    assert len(load(folder)) == 12


def test_too_little_room_is_told_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "free_bytes", lambda _: 100)
    with pytest.raises(DataError, match="100 bytes free, but the images need 2,880; set DDPM_CACHE"):
        load(folder)
