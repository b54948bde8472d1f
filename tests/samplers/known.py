"""Models whose best denoiser, and whose probability flow, are known exactly, so that samplers have an answer to reach."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.models import GaussianDiffusion
from ddpm.objectives import Objective, Prediction, eps_from_x0
from ddpm.samplers import Sampler, Thresholding
from ddpm.schedules import Level, Schedule

SAMPLERS = [
    "ddpm",
    "ddpm:variance=fixed-small",
    "ddim",
    "ddim:eta=0.5,eps=predicted",
    "ddim:eta=1",
    "euler",
    "euler:s_churn=8",
    "heun",
    "heun:s_churn=8,s_noise=1.003",
    "dpm-solver:order=2",
    "dpm-solver:order=3",
    "dpm++2s",
    "dpm++2m",
    "dpm++2m:eta=1",
    "dpm++3m",
    "unipc:order=2,b=bh1",
    "unipc:order=3",
    "unipc:order=3,predicted=eps",
    "deis",
    "deis:variable=log-rho",
    "lms",
    "pndm",
    "pndm:warm_up=euler",
]
"""Every sampler, with the options that change what it does."""

NONE, CLIP = Thresholding.parse("none"), Thresholding.parse("clip")


@dataclass
class Mixture:
    """Predicts E[x0 | x_t] for a mixture of Gaussians in d dimensions; points are images (B, 1, 1, d), float64.

    weights (K,), means (K, d), covariances (K, d, d). `analytic`: also tell the mean of Var(x0 | x_t), which is exact for one
    Gaussian.
    """

    schedule: Schedule
    weights: Tensor
    means: Tensor
    covariances: Tensor
    variance_fraction: float | Tensor = 1.0
    analytic: bool = False

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
        variance = None
        if self.analytic:
            inside = sigma**2 * torch.linalg.solve(total[0], self.covariances[0])  # Cov[x0 | x_t]
            variance = float(inside.diagonal().mean())
        return Prediction(x0, eps_from_x0(x0, x_t, level), self.variance_fraction, variance)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 1, 1, d) points of the mixture itself."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], 1, generator=generator, dtype=torch.float64)
        points = self.means[which] + (torch.linalg.cholesky(self.covariances)[which] @ z)[..., 0]
        return points[:, None, None]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d)."""
        weights = self.weights[:, None]
        mean = (weights * self.means).sum(0)
        off = self.means - mean
        return mean, (weights[..., None] * (self.covariances + off[:, :, None] * off[:, None])).sum(0)


def gaussian(schedule: str, variance_fraction: float | Tensor = 1.0) -> Mixture:
    """One correlated Gaussian in two dimensions."""
    mean = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    covariance = torch.tensor([[[0.25, 0.1], [0.1, 0.09]]], dtype=torch.float64)
    weight = torch.ones(1, dtype=torch.float64)
    return Mixture(Schedule.parse(schedule), weight, mean, covariance, variance_fraction)


def mixture(schedule: str, variance_fraction: float | Tensor = 1.0) -> Mixture:
    """Three Gaussians in two dimensions, of different weights and shapes."""
    means = torch.tensor([[0.7, 0.5], [-0.6, 0.4], [0.0, -0.8]], dtype=torch.float64)
    spread = torch.tensor([[[0.2, 0.0], [0.05, 0.1]], [[0.1, 0.0], [-0.05, 0.15]], [[0.3, 0.0], [0.0, 0.05]]])
    spread = spread.double()
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return Mixture(Schedule.parse(schedule), weights, means, spread @ spread.mT, variance_fraction)


def start(model: Any, n: int, level: Level | None = None) -> Tensor:
    """Points at the noisiest level (or another) exactly as the forward process gives them."""
    generator = torch.Generator().manual_seed(3)
    level = level or model.schedule.at(torch.tensor(model.schedule.first))
    x0 = model.draw(n, generator)
    return level.alpha * x0 + level.sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


def exact_flow(model: Mixture, x: Tensor, level: Level, end: Level) -> Tensor:
    """Of Gaussian data the flow keeps (alpha^2 C + sigma^2)^(-1/2) (x_t - alpha mu)."""
    variances, axes = torch.linalg.eigh(model.covariances[0])
    spread = [(at.alpha**2 * variances + at.sigma**2).sqrt() for at in (level, end)]
    flow = axes @ torch.diag(spread[1] / spread[0]) @ axes.T
    off = x.flatten(1) - level.alpha * model.means[0]
    return (end.alpha * model.means[0] + off @ flow.T).reshape(x.shape)


def reference_flow(model: Mixture, x: Tensor, level: Level, end: Level) -> Tensor:
    """The flow by an eighth-order Runge-Kutta method to 1e-11: d(x / alpha) = eps d(rho), in ln(rho)."""
    from scipy.integrate import solve_ivp

    def slope(log_rho: float, y: np.ndarray) -> np.ndarray:
        at = model.schedule.at(model.schedule.t_of(torch.tensor(-2.0 * log_rho, dtype=torch.float64)))
        eps = model.predict(at.alpha * torch.from_numpy(y).reshape(x.shape), at).eps
        return (math.exp(log_rho) * eps).numpy().ravel()

    span = tuple(float(-0.5 * at.log_snr) for at in (level, end))
    solved = solve_ivp(slope, span, (x / level.alpha).numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-11)
    return end.alpha * torch.from_numpy(solved.y[:, -1]).reshape(x.shape)


def scores(found: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """The largest |z| of the mean and covariance of points (n, d) against exact ones."""
    n = len(found)
    z_mean = (found.mean(0) - mean) / (covariance.diagonal() / n).sqrt()
    products = (found - mean)[:, :, None] * (found - mean)[:, None]
    z_covariance = (products.mean(0) - covariance) / (products.var(0) / n).sqrt()
    return float(torch.cat([z_mean, z_covariance.flatten()]).abs().max())


def noises(shape: Sequence[int], seed: int = 0) -> Callable[[int], Tensor]:
    """noise(i): always the same for one i."""
    return lambda i: torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64)


def stepping(sampler: str, steps: int) -> str:
    """The spec with its number of steps."""
    return f"{sampler},steps={steps}" if ":" in sampler else f"{sampler}:steps={steps}"


def walk(
    sampler: str | Sampler,
    model: Any,
    x: Tensor,
    rule: Thresholding = NONE,
    seed: int = 1,
    path: Sequence[Level] | None = None,
) -> list[Tensor]:
    """x after every step, from x at the path's first level."""
    built, seen = Sampler.parse(sampler), list[Tensor]()
    path = path or built.path(model.schedule)
    end = built.walk(model, x, path, None, noises(x.shape, seed), rule, lambda i, x_i, x0: seen.append(x_i.clone()))
    assert torch.equal(end, seen[-1])
    return seen


class Wave(nn.Module):
    """A network whose predicted x0 leaves [-1, 1] often."""

    def forward(self, x: Tensor, noise_label: Tensor, condition: Any = None, stream: Any = None) -> Tensor:
        return torch.sin(2 * x + noise_label[:, None, None, None] / 50)


def wave_model(variance: str = "fixed-large", schedule: str = "linear") -> GaussianDiffusion:
    return GaussianDiffusion(
        Wave(), Schedule.parse(schedule), Objective.parse("eps"), shape=(1, 2, 3), variance=variance
    )
