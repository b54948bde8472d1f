"""Models whose best denoiser is known exactly, so that samplers have an answer to reach."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ddpm.objectives import Prediction, eps_from_x0
from ddpm.schedules import Level, Schedule


@dataclass
class Mixture:
    """Predicts E[x0 | x_t] for a mixture of Gaussians in d dimensions; points are images (B, 1, 1, d), float64.

    weights (K,), means (K, d), covariances (K, d, d).
    """

    schedule: Schedule
    weights: Tensor
    means: Tensor
    covariances: Tensor
    variance_fraction: float | Tensor = 1.0

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        x, d = x_t.flatten(1), self.means.shape[1]
        alpha, sigma = level.alpha, level.sigma
        total = alpha**2 * self.covariances + sigma**2 * torch.eye(d, dtype=torch.float64)  # (K, d, d)
        off = x[:, None] - alpha * self.means  # (B, K, d)
        solved = torch.einsum("kij,bkj->bki", torch.linalg.inv(total), off)
        log_likelihood = -0.5 * ((off * solved).sum(-1) + torch.linalg.slogdet(total).logabsdet)
        share = torch.softmax(self.weights.log() + log_likelihood, dim=1)
        best = self.means + alpha * torch.einsum("kij,bkj->bki", self.covariances, solved)
        x0 = (share[..., None] * best).sum(1).reshape(x_t.shape)
        return Prediction(x0, eps_from_x0(x0, x_t, level), self.variance_fraction)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 1, 1, d) points of the mixture itself."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], 1, generator=generator, dtype=torch.float64)
        points = self.means[which] + (torch.linalg.cholesky(self.covariances)[which] @ z)[..., 0]
        return points[:, None, None]


MakeMixture = Callable[..., Mixture]


@pytest.fixture
def gaussian() -> MakeMixture:
    """gaussian(schedule): one correlated Gaussian in two dimensions."""

    def make(schedule: str, variance_fraction: float | Tensor = 1.0) -> Mixture:
        mean = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
        covariance = torch.tensor([[[0.25, 0.1], [0.1, 0.09]]], dtype=torch.float64)
        weight = torch.ones(1, dtype=torch.float64)
        return Mixture(Schedule.parse(schedule), weight, mean, covariance, variance_fraction)

    return make


@pytest.fixture
def mixture() -> MakeMixture:
    """mixture(schedule): three Gaussians in two dimensions, of different weights and shapes."""

    def make(schedule: str, variance_fraction: float | Tensor = 1.0) -> Mixture:
        means = torch.tensor([[0.7, 0.5], [-0.6, 0.4], [0.0, -0.8]], dtype=torch.float64)
        spread = torch.tensor([[[0.2, 0.0], [0.05, 0.1]], [[0.1, 0.0], [-0.05, 0.15]], [[0.3, 0.0], [0.0, 0.05]]])
        spread = spread.double()
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        return Mixture(Schedule.parse(schedule), weights, means, spread @ spread.mT, variance_fraction)

    return make
