"""Mean and covariance of features: gathered as a stream, over processes, and kept in npz files with their protocol."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ddpm.distributed import World
from ddpm.errors import DataError
from ddpm.evaluation.metrics import Float64, check_features, finite
from ddpm.files import atomic_path, reason

_NAMES = (("mu", "sigma"), ("m2", "s2"))  # m2 and s2 are denoising-diffusion-pytorch's


@dataclass
class Moments:
    """Count, mean and scatter of features that come in batches, in float64.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque 1983, so that no large numbers
    cancel, and neither the batch size nor the number of processes changes more than rounding.

    Attributes:
        width: D, the features of one image.
        count: images so far.
        mean: (D,).
        scatter: (D, D), the sum of (x - mean)(x - mean)'.
    """

    width: int
    count: int = 0

    def __post_init__(self) -> None:
        self.mean: Float64 = np.zeros(self.width)
        self.scatter: Float64 = np.zeros((self.width, self.width))

    @property
    def covariance(self) -> Float64:
        """(D, D), with n - 1 below. Raises DataError for fewer than two images."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 images, and there are {self.count}; add images.")
        return self.scatter / (self.count - 1)

    def add(self, features: ArrayLike) -> None:
        """Take in a batch (B, D), maybe empty. Raises DataError for another width, NaN or infinity."""
        batch = np.asarray(features)
        check_features(batch, "a batch's features", at_least=0, width=self.width)
        if len(batch):
            block = finite(batch)
            mean = block.mean(axis=0)
            centred = block - mean
            self._join(len(block), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Take in everything that other moments have seen."""
        if other.width != self.width:
            raise DataError(f"moments of {self.width} and {other.width} features cannot be merged; use one extractor.")
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def over(self, world: World) -> "Moments":
        """The moments of all processes together, on each of them; every process must call."""
        if world.size == 1:
            return self
        count = int(world.sum(torch.tensor(self.count)).item())
        total = Moments(self.width, count)
        if count:
            total.mean = world.sum(torch.from_numpy(self.mean * (self.count / count))).numpy()
            gap = self.mean - total.mean
            total.scatter = world.sum(torch.from_numpy(self.scatter + self.count * np.outer(gap, gap))).numpy()
        return total

    def _join(self, count: int, mean: Float64, scatter: Float64) -> None:
        total = self.count + count
        gap = mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(gap, gap) * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Moments of a reference set and the protocol they were taken by; None is unknown, as in foreign files.

    Attributes:
        mu, sigma: (D,) and (D, D), float64.
        n: images.
        extractor, extractor_sha256: the feature extractor's name, and the checksum of its weights.
        image_size: (height, width) of the images before the extractor's own resizing.
        resize: how the extractor resized them.
        quantisation: how pixels were rounded, such as "uint8" or "none".

    Raises DataError where shapes do not fit, a number is not finite or a variance is negative.
    """

    mu: Float64
    sigma: Float64
    n: int | None = None
    extractor: str | None = None
    extractor_sha256: str | None = None
    image_size: tuple[int, int] | None = None
    resize: str | None = None
    quantisation: str | None = None

    def __post_init__(self) -> None:
        mu, sigma = (_floats(value, name) for value, name in ((self.mu, "mu"), (self.sigma, "sigma")))
        if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
            raise DataError(
                f"mu is of shape {mu.shape} and sigma of shape {sigma.shape}; they must be (D,) and (D, D)."
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DataError("mu or sigma holds NaN or infinity; make the statistics again.")
        if (
            not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-5 * float(np.abs(sigma).max()))
            or (sigma.diagonal() < 0).any()
        ):
            raise DataError("sigma is not symmetric or has a negative variance, so it is no covariance matrix.")
        if self.n is not None and self.n < 2:
            raise DataError(f"n is {self.n}; a covariance needs at least 2 images.")
        object.__setattr__(self, "mu", mu)
        object.__setattr__(self, "sigma", (sigma + sigma.T) / 2)


def save_npz(path: Path | str, statistics: ReferenceStatistics) -> None:
    """Write statistics as .npz, whole or not at all: mu and sigma in float64, and what is known of the protocol.

    The arrays are called as the attributes; other projects' tools read mu and sigma. Raises DataError.
    """
    known: dict[str, Any] = {name: value for name, value in vars(statistics).items() if value is not None}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **known)


def load_npz(path: Path | str) -> ReferenceStatistics:
    """Read statistics: ours, and the .npz of pytorch-ddpm, EDM, pytorch-fid (mu, sigma), guided-diffusion's
    reference batches (the same names, other arrays left alone) and denoising-diffusion-pytorch (m2, s2).

    No pickled object is ever loaded. Raises DataError of one sentence that names the file.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in _READ}
            names = archive.files
    except (
        OSError,
        ValueError,
        EOFError,
        AttributeError,
        TypeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(f"{path}: cannot be read as an .npz file of plain arrays ({reason(error)}).") from None
    mean, covariance = next((pair for pair in _NAMES if pair[0] in arrays), _NAMES[0])
    missing = [name for name in (mean, covariance) if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: has no {' and no '.join(missing)}, only {', '.join(names) or 'nothing'}; "
            "make statistics from the images with `ddpm stats`."
        )
    try:
        return ReferenceStatistics(mu=arrays[mean], sigma=arrays[covariance], **_protocol(arrays))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def check_comparable(a: ReferenceStatistics, b: ReferenceStatistics) -> None:
    """Raise DataError where two statistics come from two extractors or image sizes; the unknown is let pass."""
    if a.mu.size != b.mu.size:
        raise DataError(
            f"statistics of {a.mu.size} and {b.mu.size} features cannot be compared; use one extractor for both."
        )
    for name, said in (
        ("extractor", "extractor"),
        ("extractor_sha256", "extractor weights"),
        ("image_size", "image size"),
    ):
        first, second = getattr(a, name), getattr(b, name)
        if first is not None and second is not None and first != second:
            raise DataError(
                f"statistics of {said} {first} and of {said} {second} cannot be compared; make both by one protocol."
            )


_TEXTS = ("extractor", "extractor_sha256", "resize", "quantisation")
_READ = frozenset((*(name for pair in _NAMES for name in pair), *_TEXTS, "n", "image_size"))


def _protocol(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The known attributes beside mu and sigma."""
    known: dict[str, Any] = {}
    for name in _TEXTS:
        if name in arrays:
            known[name] = str(_of_kind(arrays, name, "U", 1))
    if "n" in arrays:
        known["n"] = int(_of_kind(arrays, "n", "iu", 1))
    if "image_size" in arrays:
        height, width = _of_kind(arrays, "image_size", "iu", 2).tolist()
        known["image_size"] = (height, width)
    return known


def _of_kind(arrays: dict[str, NDArray[Any]], name: str, kinds: str, size: int) -> NDArray[Any]:
    array = arrays[name]
    if array.dtype.kind not in kinds or array.size != size:
        raise DataError(f"{name} is {array.dtype} of shape {array.shape}, which is not what it should be; remove it.")
    return array.reshape(-1) if size > 1 else array.reshape(())


def _floats(array: NDArray[Any], name: str) -> Float64:
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} is {array.dtype}; it must hold real numbers.")
    return np.asarray(array, dtype=np.float64)
