"""MNIST's file format, the places that are looked in, the download; Debian's Fashion-MNIST where it is installed."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.config import DataConfig
from ddpm.data import ImageSet, fashion_mnist, idx, load_dataset, mnist
from ddpm.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = {part: RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 7), ("t10k", 3))}
LABELS = {part: RNG.integers(0, 10, len(images), dtype=np.uint8) for part, images in IMAGES.items()}


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in IMAGES:
        for name, array in ((f"{part}-images-idx3-ubyte", IMAGES[part]), (f"{part}-labels-idx1-ubyte", LABELS[part])):
            data = idx_bytes(array)
            (folder / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return folder


def load(path: Path | None = None, split: str = "train", dataset: str = "mnist") -> ImageSet:
    return load_dataset(DataConfig.model_validate({"dataset": dataset, "path": path, "split": split}))


def no_download(*arguments: Any, **_: Any) -> None:
    raise AssertionError(arguments)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", ["", "raw", "MNIST/raw"])
def test_splits_packings_and_layouts(tmp_path: Path, packed: bool, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "download", no_download)
    write(tmp_path / inner, packed)
    for split, parts in (("train", ["train"]), ("test", ["t10k"]), ("all", ["train", "t10k"])):
        found = load(tmp_path, split)
        np.testing.assert_array_equal(found.images[:, 0], np.concatenate([IMAGES[part] for part in parts]))
        np.testing.assert_array_equal(found.labels, np.concatenate([LABELS[part] for part in parts]))
        assert f"Read from {tmp_path / inner}." in found.notes


def test_the_data_folder_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(idx, "download", no_download)
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    write(tmp_path / "mnist")
    assert len(load(None, "all")) == 10


def test_a_path_without_the_files_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(idx, "download", no_download)
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    write(tmp_path / "mnist")
    with pytest.raises(DataError, match=rf"--data.path {tmp_path / 'none'} cannot be read \(No such file"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match=rf"--data.path {tmp_path} does not hold the files of fashion-mnist"):
        load(tmp_path, dataset="fashion-mnist")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The made files, served over HTTP in the place of MNIST's."""
    folder = write(tmp_path / "served")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        files = idx.IdxFiles("mnist", f"http://127.0.0.1:{server.server_address[1]}", digests, mnist.FILES.classes)
        monkeypatch.setattr(mnist, "FILES", files)
        yield folder
        server.shutdown()
        thread.join()


def test_a_download_is_kept_and_found_again(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(split="test")
    np.testing.assert_array_equal(found.images[:, 0], IMAGES["t10k"])
    monkeypatch.setattr(idx, "download", no_download)
    assert load(split="test").fingerprint == found.fingerprint


def test_a_download_to_an_empty_folder_is_told_of_and_added_to(served: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    assert f"Downloaded to {here}." in load(here, "test").notes
    (here / "train-images-idx3-ubyte.gz.part").touch()
    assert f"Downloaded to {here}." in load(here, "train").notes
    assert load(here, "train").notes == (f"Read from {here}.",)


def test_a_download_with_a_wrong_checksum_is_refused(served: Path, tmp_path: Path) -> None:
    (served / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(LABELS["t10k"] ^ 1)))
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError) as error:
        load(tmp_path / "here", "test")
    assert f"put it at {tmp_path / 'here' / 't10k-labels-idx1-ubyte.gz'}" in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\x08",
        idx_bytes(IMAGES["train"])[:-1],
        idx_bytes(IMAGES["train"]) + b"\0",
        idx_bytes(LABELS["train"]),
        idx_bytes(IMAGES["train"].astype(np.int32)),
        b"\0\0\x08\3" + b"\xff" * 12,
    ],
)
def test_damaged_files_are_named(tmp_path: Path, data: bytes) -> None:
    name = "train-images-idx3-ubyte.gz"
    (write(tmp_path) / name).write_bytes(gzip.compress(data))
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert f"{tmp_path / name} is damaged" in str(error.value)
    (tmp_path / name).write_bytes(b"not packed")
    with pytest.raises(DataError, match="is damaged"):
        load(tmp_path)


def test_images_and_labels_must_be_as_many(tmp_path: Path) -> None:
    (write(tmp_path) / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(LABELS["t10k"])))
    with pytest.raises(DataError, match="7 images, but 3 labels"):
        load(tmp_path)


@given(st.binary(max_size=64))
@settings(max_examples=200)
def test_any_bytes_are_an_array_or_a_value_error(data: bytes) -> None:
    for start in (b"", b"\0\0\x08\x01", b"\0\0\x08\x03\0\0\0\1\0\0\0\1"):
        for dimensions in (1, 3):
            try:
                found = idx.parse_idx(start + data, dimensions)
            except ValueError:
                continue
            assert found.ndim == dimensions
            assert idx_bytes(found) == start + data


@pytest.mark.fashion
def test_debians_fashion_mnist() -> None:
    test = load(split="test", dataset="fashion-mnist")
    assert test.images.shape == (10_000, 1, 28, 28)
    np.testing.assert_array_equal(np.bincount(test.labels), np.full(10, 1000))
    assert test.classes[test.labels[0]] == "ankle boot"
    train = load(split="train", dataset="fashion-mnist")
    assert train.images.shape == (60_000, 1, 28, 28)
    np.testing.assert_array_equal(np.bincount(train.labels), np.full(10, 6000))
    assert train.images.mean() / 255 == pytest.approx(0.2860, abs=5e-5), "the mean that is published everywhere"
    assert train.images.std() / 255 == pytest.approx(0.3530, abs=5e-5)


@pytest.mark.fashion
def test_the_checksums_are_of_the_same_data_as_debians() -> None:
    """Debian left the name and the time out of the gzip header; put back, the checksum is the published one."""
    name = "t10k-labels-idx1-ubyte"
    data = (fashion_mnist.FILES.folders[0] / f"{name}.gz").read_bytes()
    original = b"\x1f\x8b\x08\x08" + struct.pack("<I", 1504176627) + data[8:10] + name.encode() + b"\0" + data[10:]
    assert hashlib.sha256(original).hexdigest() == fashion_mnist.FILES.sha256[f"{name}.gz"]
