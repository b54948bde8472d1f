"""CIFAR-10 in both versions, as archive and as folder; a hostile pickle runs nothing."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.config import DataConfig
from ddpm.data import ImageSet, cifar10, load_dataset
from ddpm.errors import DataError

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (len(NAMES), 4, 3, 32, 32), dtype=np.uint8)
LABELS = RNG.integers(0, 10, (len(NAMES), 4), dtype=np.uint8)


def binary(i: int) -> bytes:
    return np.concatenate([LABELS[i][:, None], IMAGES[i].reshape(4, -1)], axis=1).tobytes()


def pickled(i: int, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": IMAGES[i].reshape(4, -1), b"labels": LABELS[i].tolist()}, protocol)


class _Old(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings where arrays keep their bytes, and NumPy's old module name."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(b"T" + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def pickled_by_python_2(i: int) -> bytes:
    buffer = io.BytesIO()
    batch = {b"data": IMAGES[i].reshape(4, -1), b"labels": LABELS[i].tolist(), b"batch_label": b"training batch"}
    _Old(buffer, 2).dump(batch)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def batches(version: str) -> dict[str, bytes]:
    if version == "bin":
        return {f"cifar-10-batches-bin/{name}.bin": binary(i) for i, name in enumerate(NAMES)}
    write = pickled_by_python_2 if version == "py2" else pickled
    return {f"cifar-10-batches-py/{name}": write(i) for i, name in enumerate(NAMES)}


def write_folder(root: Path, version: str) -> Path:
    for name, data in batches(version).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_archive(root: Path, version: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / ("cifar-10-binary.tar.gz" if version == "bin" else "cifar-10-python.tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        for name, data in batches(version).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def load(path: Path | None = None, split: str = "train") -> ImageSet:
    return load_dataset(DataConfig.model_validate({"dataset": "cifar10", "path": path, "split": split}))


def check(split: str, found: ImageSet) -> None:
    part = {"train": slice(0, 5), "test": slice(5, 6), "all": slice(0, 6)}[split]
    np.testing.assert_array_equal(found.images, IMAGES[part].reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(found.labels, LABELS[part].reshape(-1))
    assert found.classes[3] == "cat"


@pytest.mark.parametrize("split", ["train", "test", "all"])
@pytest.mark.parametrize("version", ["bin", "py", "py2"])
def test_every_version_in_every_form(tmp_path: Path, version: str, split: str) -> None:
    archive = write_archive(tmp_path / "archive", version)
    root = write_folder(tmp_path / "folder", version)
    (inner,) = root.iterdir()
    for path in (archive, archive.parent, root, inner):
        check(split, load(path, split))


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "download", no_download)
    for place in ("cifar_test", "cifar_train", "data", os.environ["DDPM_DATA"] + "/cifar10"):
        write_folder(Path(place), "py")
        found = load()
        check("train", found)
        assert f"Read from {Path(place) / 'cifar-10-batches-py'}." in found.notes


def no_download(*arguments: Any) -> None:
    raise AssertionError(arguments)


def test_what_is_nowhere_is_downloaded_to_the_empty_folder_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[Any, ...]] = []

    def download(*arguments: Any) -> None:
        seen.append(arguments)
        write_archive(arguments[1].parent, "bin")

    monkeypatch.setattr(cifar10, "download", download)
    (tmp_path / "here").mkdir()
    check("test", load(tmp_path / "here", "test"))
    url, path, digest, size, _ = seen[0]
    assert url.endswith("/cifar-10-binary.tar.gz")
    assert path == tmp_path / "here" / "cifar-10-binary.tar.gz"
    assert len(digest) == hashlib.sha256().digest_size * 2
    assert size == 170_052_171
    check("test", load(None, "test"))
    assert seen[1][1] == Path(os.environ["DDPM_DATA"]) / "cifar10" / "cifar-10-binary.tar.gz"


def test_a_path_without_the_files_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "download", no_download)
    write_folder(Path("data"), "bin")
    with pytest.raises(DataError, match=r"--data.path none cannot be read"):
        load(Path("none"))
    with pytest.raises(DataError, match=rf"--data.path {tmp_path} does not hold the files of cifar10"):
        load(tmp_path)


class Payload:
    """Unpickled by the book it would run a command."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    payloads = [
        Payload(os.system, f"touch {executed}"),
        Payload(eval, f"open({str(executed)!r}, 'w')"),
        Payload(getattr, b"", "hex"),
        Payload(np.load, str(executed)),
        Payload(__import__("_codecs").encode, "x", "rot13"),
    ]
    for payload in payloads:
        for batch in (payload, {b"data": payload, b"labels": [1]}, {b"data": b"", b"labels": [], b"more": payload}):
            for protocol in range(6):
                with pytest.raises(DataError) as error:
                    cifar10.parse_python(pickle.dumps(batch, protocol), "batch")
                assert "\n" not in str(error.value)
    assert not executed.exists()
    write_folder(tmp_path, "py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(payloads[0]))
    with pytest.raises(DataError, match=r"data_batch_3 is not a CIFAR-10 batch \(it asks for \w+\.system"):
        load(tmp_path)
    assert not executed.exists()


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": IMAGES[0].reshape(4, -1).astype(np.int64), b"labels": [1] * 4},
        {b"data": IMAGES[0].reshape(4, -1), b"labels": [1] * 3},
        {b"data": IMAGES[0].reshape(4, -1), b"labels": [11] * 4},
        {b"data": IMAGES[0].reshape(4, -1)[:, :-1].copy(), b"labels": [1] * 4},
        {b"data": np.asfortranarray(IMAGES[0].reshape(4, -1)), b"labels": [1] * 4},
        {b"labels": [1] * 4},
        [1, 2],
        {b"data": IMAGES[0].reshape(4, -1), b"labels": None},
    ],
)
def test_pickles_of_something_else_are_refused(batch: object) -> None:
    with pytest.raises(DataError, match="batch"):
        cifar10.parse_python(pickle.dumps(batch, 2), "batch")


@pytest.mark.parametrize("data", [b"", b"\0" * 3072, binary(0)[:-1], b"\x0a" + binary(0)[1:]])
def test_damaged_binaries_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="is damaged"):
        cifar10.parse_binary(data, "batch")


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 12_000), bit=st.integers(-1, 7))
def test_damaged_pickles_are_read_or_refused(place: int, bit: int) -> None:
    data = bytearray(pickled_by_python_2(0))
    place = min(place, len(data) - 1) if place % 2 else place % 200
    if bit < 0:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    try:
        images, labels = cifar10.parse_python(bytes(data), "batch")
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert images.shape == (4, 3, 32, 32)
        assert labels.max() < 10
