"""The best linear denoiser of a set of images: what any network has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.schedules import Level

MOST_NUMBERS = 4_000_000
"""Images x elements that the covariance is found from, at most: a second or two of work."""


@dataclass(frozen=True, eq=False)
class LinearDenoiser:
    """E[x0 | x_t] if images were Gaussian: the least squares estimate of x0 that is linear in x_t, class by class.

    means: (K, d) float64, of each class (one row without classes); basis: (k, d) principal axes within the classes;
    variances: (k,) along them; rest: along every other axis.
    """

    means: Tensor
    basis: Tensor
    variances: Tensor
    rest: float

    @classmethod
    def fit(cls, images: Tensor, labels: Tensor | None = None, num_classes: int = 1) -> "LinearDenoiser":
        """From float images (N, C, H, W), N >= 2; with labels (N,) every class has a mean of its own.

        Half as many axes as images are kept at most, so that what is found holds for other images too.
        """
        x = images.flatten(1).double().cpu()
        x = x[: max(2, MOST_NUMBERS // x.shape[1])]
        n, d = x.shape
        of = torch.zeros(n, dtype=torch.int64) if labels is None else labels[:n].cpu()
        means = x.mean(dim=0).repeat(num_classes, 1)
        for label in of.unique():
            means[label] = x[of == label].mean(dim=0)
        _, values, axes = torch.linalg.svd(x - means[of], full_matrices=False)
        variances, k = values**2 / (n - 1), min(n // 2, d)
        rest = float(variances[k:].sum()) / (d - k) if k < d else 0.0
        return cls(means, axes[:k], variances[:k], rest)

    def x0(self, x_t: Tensor, level: Level, labels: Tensor | None = None) -> Tensor:
        """The estimate, like x_t (B, C, H, W), at levels () or (B,); the gain along an axis is alpha v / (alpha^2 v + sigma^2)."""
        alpha, variance = (value.cpu().reshape(-1, 1) for value in (level.alpha, level.sigma**2))
        mean = self.means[0] if labels is None else self.means[labels.cpu()]
        centred = x_t.flatten(1).double().cpu() - alpha * mean
        gain = alpha * self.variances / (alpha**2 * self.variances + variance)
        rest = alpha * self.rest / (alpha**2 * self.rest + variance)
        found = mean + rest * centred + (centred @ self.basis.T * (gain - rest)) @ self.basis
        return found.reshape(x_t.shape).to(x_t)


def largest_moment(images: Tensor) -> float:
    """The largest mean square of float images (N, C, H, W) along any axis, the mean not taken off."""
    x = images.flatten(1).double().cpu()
    x = x[: max(2, MOST_NUMBERS // x.shape[1])]
    return float(torch.linalg.matrix_norm(x, ord=2)) ** 2 / len(x)
