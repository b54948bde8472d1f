"""The Frechet distance between Gaussians fitted to features: FID with Inception features, an FD with any others.

    FD = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S2^1/2 S1 S2^1/2)^1/2)

(Dowson and Landau 1982; Heusel et al. 2017, eq. 6), the squared 2-Wasserstein distance. The last trace is the
sum of the singular values of S2^1/2 S1^1/2, which keeps full precision where covariances are singular.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import DataError
from ddpm.evaluation.metrics import Z95, Estimate, Features, Float64, blocks, check_features, finite
from ddpm.evaluation.statistics import Moments
from ddpm.randomness import permutation

_PAIR_ROWS = 4096
_PAIRS_A_ROW = 4


def frechet_distance(mu1: Float64, sigma1: Float64, mu2: Float64, sigma2: Float64) -> float:
    """The Frechet distance of two Gaussians, at least 0.

    Args:
        mu1, mu2: (D,) means.
        sigma1, sigma2: (D, D) symmetric positive semi-definite covariances, singular ones too (fewer images than D).

    Raises DataError where the dimensions differ.
    """
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise DataError(
            f"statistics of {mu1.size} and of {mu2.size} features cannot be compared; use one extractor for both."
        )
    singular = np.linalg.svd(_root(sigma2) @ _root(sigma1), compute_uv=False)
    return _distance(mu1 - mu2, sigma1, sigma2, singular)


def frechet_estimate(features: Features, mu: Float64, sigma: Float64, reference_images: int | None = None) -> Estimate:
    """The Frechet distance of features (N, D), N >= 2, to a reference, with an interval for its expectation at this N.

    Args:
        mu, sigma: (D,) and (D, D), the reference.
        reference_images: how many images the reference was taken from, if its sampling is to count as well (features
            are then taken as Gaussian, as only moments are known); None takes the reference as it is.

    The distance grows as N falls, so the interval is for E[FD] at this very N, not for the limit; compare equal N only.

    Method. Write the distance as a function of the empirical distribution to second order: gradient g, kernel q. With
    A = S2^1/2 (S2^1/2 S1 S2^1/2)^-1/2 S2^1/2 (pseudo-inverse: the map that carries one Gaussian to the other) and
    z = x - mu1, the derivative towards an image is 2 z.(mu1 - mu2) + z'(I - A)z. It is taken at the sample, so its
    variance counts q twice (and the diagonal q(x, x) / N four times), which the plain delta method and the jackknife
    suffer from alike: for equal distributions, where g = 0, their 95 % intervals cover 99 to 100 %. So the diagonal is
    taken off the derivative and the excess 2 E[q^2] / N^2, from pairs of images, off the variance. As g^2 falls in
    proportion to the distance, the interval is the set of all E with
    (FD - E)^2 <= 1.96^2 (variance of the derivative x E / FD - excess): like Wilson's, it leans to the high side.

    On Gaussian data with D = 64 and N = 1,000 it covers 93 to 97 % for flat and random spectra and 89 to 96 % where the
    eigenvalues fall as k^-1.5. It has not been shown to hold for N < 3 D. Raises DataError.
    """
    check_features(features, "the images", at_least=2, width=mu.size)
    n = len(features)
    moments = Moments(mu.size)
    for _, block in blocks(features):
        moments.add(block)
    value = frechet_distance(moments.mean, moments.covariance, mu, sigma)
    expansion = _Expansion.at(moments, mu, sigma)
    variance = expansion.gradient_variance(features)
    excess = 2.0 * expansion.pair_square(features) / n**2
    if reference_images is not None:
        variance += expansion.reference_variance(sigma) / reference_images
        excess *= (1.0 + n / reference_images) ** 2
    return _interval(value, variance, excess)


@dataclass(frozen=True)
class _Expansion:
    """The distance's first and second derivative in the image distribution, at the sample.

    With S2^1/2 S1 S2^1/2 = U diag(s^2) U' and y = s^-1/2 U' S2^1/2 z: z'Az = y.y, and the second differential of the
    trace term is 1/2 sum_ij dM_ij^2 / (s_i s_j (s_i + s_j)); hence `kernel`.
    """

    mean: Float64
    shift: Float64
    singular: Float64
    projection: Float64

    @classmethod
    def at(cls, moments: Moments, mu: Float64, sigma: Float64) -> "_Expansion":
        root = _root(sigma)
        vectors, singular, _ = np.linalg.svd(root @ _root(moments.covariance))
        kept = singular > _tolerance(singular)
        s = singular[kept]
        return cls(moments.mean, moments.mean - mu, s, root @ vectors[:, kept] / np.sqrt(s))

    def kernel(self, y1: Float64, y2: Float64) -> Float64:
        """q of images paired by row: (B,)."""
        s, t = self.singular, y1 * y2
        covariance = 0.5 * np.einsum("bi,bi->b", t @ (1.0 / (s[:, None] + s)), t)
        own = np.einsum("bi,bi->b", y1, y1) + np.einsum("bi,bi->b", y2, y2)
        return np.asarray(covariance - 0.25 * own + 0.25 * s.sum() + t.sum(axis=1))

    def gradient_variance(self, features: Features) -> float:
        """Variance of the mean derivative without the kernel's diagonal (with it, where that is less: equal sets)."""
        n = len(features)
        derivative, diagonal = np.empty(n), np.empty(n)
        for where, block in blocks(features):
            z = block - self.mean
            y = z @ self.projection
            derivative[where] = 2.0 * z @ self.shift + np.einsum("bi,bi->b", z, z) - np.einsum("bi,bi->b", y, y)
            diagonal[where] = self.kernel(y, y)
        return float(min(derivative.var(ddof=1), (derivative - diagonal / n).var(ddof=1))) / n

    def pair_square(self, features: Features) -> float:
        """Mean of q^2 over pairs of different images, drawn always alike."""
        rows = permutation(0, 0, len(features)).numpy()[:_PAIR_ROWS]
        y = (finite(features[rows]) - self.mean) @ self.projection
        shifts = range(1, min(_PAIRS_A_ROW, len(rows) - 1) + 1)
        return float(np.mean([np.mean(self.kernel(y, np.roll(y, k, axis=0)) ** 2) for k in shifts]))

    def reference_variance(self, sigma: Float64) -> float:
        """Variance of the derivative towards a reference image, features taken as Gaussian.

        4 d'S2 d + 2 tr((S2 (I - B))^2) with S2^1/2 B S2^1/2 = U diag(s) U', B the map the other way.
        """
        crossed = np.sum((self.projection * self.singular) ** 2)  # tr(S2 U diag(s) U')
        spread = np.sum(sigma * sigma) - 2.0 * crossed + np.sum(self.singular**2)
        return float(4.0 * self.shift @ sigma @ self.shift + 2.0 * max(0.0, spread))


def _interval(value: float, variance: float, excess: float) -> Estimate:
    """All E with (value - E)^2 <= z^2 (variance E / value - excess)."""
    if value == 0.0:
        return Estimate(0.0, 0.0, 0.0)
    slope = Z95**2 * variance / value
    half = math.sqrt(slope * slope / 4 + Z95**2 * (variance - min(excess, variance / 2)))
    return Estimate(value, value + slope / 2 - half, value + slope / 2 + half)


def _distance(shift: Float64, sigma1: Float64, sigma2: Float64, singular: NDArray[np.floating[Any]]) -> float:
    distance = shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2.0 * singular.sum()
    return max(0.0, float(distance))


def _root(sigma: Float64) -> Float64:
    """The symmetric square root; eigenvalues below rounding are 0."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > _tolerance(values)
    return np.asarray((vectors[:, kept] * np.sqrt(values[kept])) @ vectors[:, kept].T)


def _tolerance(values: Float64) -> float:
    return float(len(values) * np.finfo(np.float64).eps * values.max())
