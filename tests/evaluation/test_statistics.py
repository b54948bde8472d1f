import pickle
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.distributed import World
from ddpm.errors import DataError
from ddpm.evaluation.statistics import Moments, ReferenceStatistics, check_comparable, load_npz, save_npz

MU, SIGMA = np.array([1.0, -2.0]), np.array([[2.0, 0.5], [0.5, 1.0]])


def _moments(features: np.ndarray, batch: int) -> Moments:
    moments = Moments(features.shape[1])
    for start in range(0, len(features), batch):
        moments.add(features[start : start + batch])
    return moments


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_batches_of_any_size_give_numpys_mean_and_covariance(batch: int) -> None:
    features = np.random.default_rng(0).normal(size=(301, 5)) + 1e6
    moments = _moments(features, batch)
    assert moments.count == 301
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=0, atol=1e-9)
    assert np.array_equal(moments.covariance, moments.covariance.T)


def test_float32_batches_and_tensors_are_summed_in_float64() -> None:
    features = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    moments = Moments(3)
    moments.add(torch.from_numpy(features))
    moments.add(np.empty((0, 3)))
    np.testing.assert_allclose(moments.covariance, np.cov(features.astype(np.float64).T), rtol=1e-13)


def test_merged_moments_are_those_of_all() -> None:
    features = np.random.default_rng(0).normal(size=(50, 4))
    total, part = _moments(features[:20], 6), _moments(features[20:], 11)
    total.merge(part)
    total.merge(Moments(4))
    np.testing.assert_allclose(total.covariance, np.cov(features.T), rtol=1e-12)


@dataclass(frozen=True)
class _ThreadWorld(World):
    """Processes as threads: `sum` meets the others."""

    barrier_: Barrier = field(default_factory=lambda: Barrier(1))
    box: list[Tensor | None] = field(default_factory=list)

    def sum(self, value: Tensor) -> Tensor:
        self.box[self.rank] = value.clone()
        self.barrier_.wait()
        total = torch.stack([part for part in self.box if part is not None]).sum(dim=0)
        self.barrier_.wait()
        value.copy_(total)
        return value


def test_any_number_of_processes_gives_the_same_moments() -> None:
    features = np.random.default_rng(0).normal(size=(101, 4)) + 100.0
    alone = _moments(features, 101)
    size = 4  # the last of them has seen nothing
    barrier, box, found = Barrier(size), [None] * size, [Moments(4)] * size

    def work(rank: int) -> None:
        world = _ThreadWorld(rank, size, rank, barrier, box)
        found[rank] = _moments(features[: 0 if rank == 3 else 101][rank::3], 8).over(world)

    threads = [Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for moments in found:
        assert moments.count == 101
        np.testing.assert_allclose(moments.mean, alone.mean, rtol=1e-13)
        np.testing.assert_allclose(moments.covariance, alone.covariance, rtol=1e-10)
    assert alone.over(World()) is alone


def test_moments_refuse_what_they_cannot_sum() -> None:
    with pytest.raises(DataError, match="at least 2"):
        _ = _moments(np.zeros((1, 3)), 1).covariance
    with pytest.raises(DataError, match="NaN"):
        Moments(2).add(np.array([[1.0, np.nan]]))
    with pytest.raises(DataError, match="one extractor"):
        Moments(2).add(np.zeros((4, 3)))
    with pytest.raises(DataError, match="merged"):
        Moments(2).merge(Moments(3))


def test_statistics_come_back_as_they_were_saved(tmp_path: Path) -> None:
    saved = ReferenceStatistics(MU, SIGMA, 50000, "tiny-cnn", "ab" * 32, (28, 28), "none", "uint8")
    save_npz(tmp_path / "stats.npz", saved)
    loaded = load_npz(tmp_path / "stats.npz")
    assert np.array_equal(loaded.mu, MU) and np.array_equal(loaded.sigma, SIGMA)
    assert {name: value for name, value in vars(loaded).items() if name not in ("mu", "sigma")} == {
        name: value for name, value in vars(saved).items() if name not in ("mu", "sigma")
    }
    first = (tmp_path / "stats.npz").read_bytes()
    save_npz(tmp_path / "stats.npz", saved)
    assert (tmp_path / "stats.npz").read_bytes() == first


def test_what_is_unknown_stays_unknown(tmp_path: Path) -> None:
    save_npz(tmp_path / "stats.npz", ReferenceStatistics(MU, SIGMA, n=10))
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == ["mu", "n", "sigma"]
    assert load_npz(tmp_path / "stats.npz").extractor is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("names", [("mu", "sigma"), ("m2", "s2")])
def test_files_of_other_projects_are_read(tmp_path: Path, names: tuple[str, str], dtype: type) -> None:
    # pytorch-ddpm, EDM, pytorch-fid and guided-diffusion (which adds the last three): mu, sigma; lucidrains: m2, s2
    others = {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    np.savez(tmp_path / "foreign.npz", **{names[0]: MU.astype(dtype), names[1]: SIGMA.astype(dtype)}, **others)
    loaded = load_npz(tmp_path / "foreign.npz")
    assert loaded.mu.dtype == loaded.sigma.dtype == np.float64
    assert np.array_equal(loaded.mu, MU) and np.array_equal(loaded.sigma, SIGMA)
    assert loaded.n is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU}, "has no sigma, only mu; make"),
        ({"m2": MU}, "has no s2"),
        ({"arr_0": np.zeros(3)}, "has no mu and no sigma"),
        ({"mu": MU, "sigma": np.eye(3)}, "must be"),
        ({"mu": np.zeros((1, 2)), "sigma": SIGMA}, "must be"),
        ({"mu": np.array([1.0, np.nan]), "sigma": SIGMA}, "NaN"),
        ({"mu": MU, "sigma": SIGMA * np.inf}, "infinity"),
        ({"mu": MU, "sigma": np.array([[1.0, 5.0], [0.0, 1.0]])}, "no covariance"),
        ({"mu": MU, "sigma": -SIGMA}, "negative variance"),
        ({"mu": MU.astype(complex), "sigma": SIGMA}, "real numbers"),
        ({"mu": np.array([{}, {}], dtype=object), "sigma": SIGMA}, "plain arrays"),
        ({"mu": MU, "sigma": SIGMA, "n": 1}, "n is 1"),
        ({"mu": MU, "sigma": SIGMA, "n": 2.5}, "n is float64"),
        ({"mu": MU, "sigma": SIGMA, "image_size": 32}, "image_size is"),
        ({"mu": MU, "sigma": SIGMA, "extractor": 3}, "extractor is"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, arrays: dict, message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_npz(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    for content in (b"", b"text", pickle.dumps({"fid": 1}), b"PK\x03\x04 torn"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            load_npz(path)
    np.save(tmp_path / "one.npy", MU)
    for missing in (tmp_path / "one.npy", tmp_path / "absent.npz"):
        with pytest.raises(DataError, match="cannot be read"):
            load_npz(missing)


def test_two_protocols_are_not_compared() -> None:
    known = ReferenceStatistics(MU, SIGMA, 10, "tiny-cnn", "aa", (28, 28))
    check_comparable(known, ReferenceStatistics(MU, SIGMA))
    check_comparable(known, ReferenceStatistics(MU, SIGMA, 99, "tiny-cnn", "aa", (28, 28)))
    for other, message in [
        (ReferenceStatistics(MU, SIGMA, extractor="clip"), "tiny-cnn and of extractor clip"),
        (ReferenceStatistics(MU, SIGMA, extractor_sha256="bb"), "weights aa"),
        (ReferenceStatistics(MU, SIGMA, image_size=(32, 32)), "image size"),
        (ReferenceStatistics(np.zeros(3), np.eye(3)), "2 and 3 features"),
    ]:
        with pytest.raises(DataError, match=message):
            check_comparable(known, other)
