"""Rows on disk: what was written stays, what was not is done again, in any order and by any split."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm import files
from ddpm.distributed import World
from ddpm.errors import DataError
from ddpm.evaluation.features import Features
from ddpm.evaluation.store import Store, extract, feature_arrays

ARRAYS = {"pixels": ("uint8", (2, 3)), "label": ("int64", ())}


def fill(store: Store, rows: list[int]) -> None:
    at = np.array(rows)
    store.write(at, pixels=np.broadcast_to(at[:, None, None], (len(rows), 2, 3)), label=10 * at)


def network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = images.flatten(1).float()
    return x[:, :4] / 7, x.sum(1, keepdim=True)


@pytest.fixture
def opened() -> Features:
    return Features(name="toy", spec="toy", network=network, dim=4, sha256="0", resize="none", channels=1, chunk=8)


def test_rows_come_back_in_any_order_and_over_calls(tmp_path: Path) -> None:
    with Store(tmp_path / "s", 7, ARRAYS) as store:
        assert store.missing().tolist() == list(range(7))
        fill(store, [5, 0])
    with Store(tmp_path / "s", 7, ARRAYS) as store:
        assert store.missing().tolist() == [1, 2, 3, 4, 6]
        fill(store, [6, 1, 2, 3, 4])
        store.sync()
        assert store.read("label").tolist() == [0, 10, 20, 30, 40, 50, 60]
        assert (store.read("pixels") == np.arange(7)[:, None, None]).all()


@pytest.mark.parametrize("arrays", [{"pixels": ("uint8", (2, 4)), "label": ("int64", ())}, {"label": ("int64", ())}])
def test_other_shapes_start_anew(tmp_path: Path, arrays: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    with Store(tmp_path / "s", 7, ARRAYS) as store:
        fill(store, [0])
    with Store(tmp_path / "s", 7, arrays) as store:
        assert len(store.missing()) == 7


@pytest.mark.parametrize("name", ["pixels", "label", "done"])
def test_a_damaged_file_starts_anew(tmp_path: Path, name: str) -> None:
    with Store(tmp_path / "s", 7, ARRAYS) as store:
        fill(store, [0])
    (tmp_path / f"s/{name}.npy").write_bytes(b"\x93NUMPY")
    with Store(tmp_path / "s", 7, ARRAYS) as store:
        assert len(store.missing()) == 7


def test_a_killed_process_leaves_whole_rows(tmp_path: Path) -> None:
    program = (
        "import os, sys, numpy as np; from pathlib import Path; from ddpm.evaluation.store import Store\n"
        "with Store(Path(sys.argv[1]), 5, {'label': ('int64', ())}) as store:\n"
        "    store.write(np.array([3]), label=np.array([33])); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "s")]).returncode == -9
    with Store(tmp_path / "s", 5, {"label": ("int64", ())}) as store:
        assert store.missing().tolist() == [0, 1, 2, 4]
        assert store.read("label")[3] == 33


def test_one_group_at_a_time(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "s", 7, ARRAYS),
        pytest.raises(DataError, match="is held by"),
        Store(tmp_path / "s", 7, ARRAYS),
    ):
        pass


def test_no_room_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    with pytest.raises(DataError, match="needs 105 bytes, but only 10 are free"), Store(tmp_path / "s", 7, ARRAYS):
        pass


def test_features_are_those_of_the_network_however_they_were_split(tmp_path: Path, opened: Features) -> None:
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 4, 4), dtype=np.uint8)
    wanted = [part.numpy() for part in network(torch.from_numpy(images))]
    arrays = feature_arrays(opened, (1, 4, 4))
    assert arrays == {"features": ("float32", (4,)), "logits": ("float32", (1,))}

    @dataclass(frozen=True)
    class Part(World):
        def barrier(self) -> None:
            pass

    told: list[tuple[int, int]] = []
    with Store(tmp_path / "s", 600, arrays, Part(0, 2)) as store:
        extract(images, opened, store, lambda done, total: told.append((done, total)))
        assert store.missing().tolist() == list(range(256, 512))
    with Store(tmp_path / "s", 600, arrays) as store:
        extract(images, opened, store, lambda done, total: told.append((done, total)))
        store.sync()
        assert np.array_equal(store.read("features"), wanted[0]) and np.array_equal(store.read("logits"), wanted[1])
    assert told[-1] == (600, 600)
