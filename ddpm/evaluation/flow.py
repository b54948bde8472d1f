"""Likelihood by the probability-flow ODE."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ddpm.evaluation.likelihood import Likelihood, Rows, ends
from ddpm.models.diffusion import Predictor
from ddpm.randomness import Stream
from ddpm.registry import register
from ddpm.samplers import Thresholding
from ddpm.schedules import Level, Schedule

BIN = 2.0 / 255.0
"""Width of an 8-bit value's bin on the scale of [-1, 1]."""


@register("ode")
class ProbabilityFlow(Likelihood):
    """Density by the probability-flow ODE (Song et al. 2021b, appendix D.2), of uniformly dequantised images.

    It is the density at the schedule's least noisy level, where the flow starts. The mean of -log2 density
    over an 8-bit value's bin bounds -log2 of its probability from above (Theis et al. 2016, section 3.1). The predicted x0
    is not thresholded, since the flow has to be smooth.

    Options: steps, of the Runge-Kutta method, four evaluations each; repeats, solves with noise and probe of their own,
    whose mean counts; probe, the distribution of Hutchinson's probes, or `exact`: no estimate, a backward pass a pixel.
    """

    parts: ClassVar[dict[str, str]] = {
        "latent": "density of the latent that the flow takes the image to",
        "volume": "change of volume on the way",
        "bin": "width of an 8-bit value's bin",
    }
    thresholds = False
    steps: Annotated[int, Field(ge=1)] = 50
    repeats: Annotated[int, Field(ge=1)] = 1
    probe: Literal["rademacher", "gaussian", "exact"] = "rademacher"

    def groups(self, schedule: Schedule) -> dict[str, slice]:
        """The density of the latent, the change of volume on the way to it, the width of a bin. Raises ConfigError."""
        ends(schedule)
        return {"latent": slice(0, 1), "volume": slice(1, 2), "bin": slice(2, 3)}

    def shapes(self, schedule: Schedule) -> dict[str, tuple[int, ...]]:
        """Beside bits (3,), the totals of the repeats, (repeats,)."""
        return {"bits": (3,), "totals": (self.repeats,)}

    def facts(self, schedule: Schedule, rows: Rows) -> dict[str, Any]:
        """With several repeats also the part of the standard error that comes from dequantisation and probes."""
        facts = {"evaluations": 4 * self.steps * self.repeats, "dequantisation": "uniform"}
        if self.repeats == 1:
            return facts
        within = rows["totals"].var(axis=1, ddof=1) / self.repeats
        return {**facts, "standard_error_of_repeats": float(np.sqrt(within.sum()) / len(within))}

    def measure(
        self, predictor: Predictor, x0: Tensor, condition: Tensor | None, stream: Stream, thresholding: Thresholding
    ) -> dict[str, Tensor]:
        solves = []
        for repeat in range(self.repeats):
            place = stream.at("dequantise", repeat).uniform(*x0.shape[1:]) - 0.5
            x = (x0.double() + BIN * place).to(x0)
            nats = -torch.stack(
                log_density(predictor, x, condition, self._probes(x, stream.at("probe", repeat)), self.steps), dim=1
            )
            solves.append(nats / (x0[0].numel() * math.log(2.0)))
        each = torch.stack(solves, dim=2)  # (B, 2, repeats)
        width = torch.full_like(each[:, :1, 0], -math.log2(BIN))
        return {"bits": torch.cat([each.mean(dim=2), width], dim=1), "totals": each.sum(dim=1) + width}

    def _probes(self, x: Tensor, stream: Stream) -> Sequence[Tensor]:
        if self.probe == "exact":
            basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
            return [direction.expand_as(x) for direction in basis]
        if self.probe == "gaussian":
            return [stream.normal(*x.shape[1:]).to(x)]
        return [torch.where(stream.uniform(*x.shape[1:]) < 0.5, -1.0, 1.0).to(x)]


def log_density(
    predictor: Predictor, x: Tensor, condition: Tensor | None, probes: Sequence[Tensor], steps: int
) -> tuple[Tensor, Tensor]:
    """ln p(x) of images at the least noisy level as two parts: ln density of their latent, ln change of volume.

    With r = sigma / alpha the flow is d(x / alpha) / dr = eps: equation 13 of Song et al. (2021b) without f and g, after
    Song et al. (2021a), equation 14. It is solved for z = x / (alpha^2 + sigma^2)^(1/2), which keeps the size of the
    images, along ln r, by the classical Runge-Kutta method: z' = s eps - s^2 z with s = sigma / (alpha^2 + sigma^2)^(1/2).
    The divergence of that, sigma div eps - s^2 D, is integrated along (Song et al. 2021b, equations 39 and 40).

    Args:
        predictor: the model.
        x: (B, C, H, W).
        condition: (B,) int64 labels, or None.
        probes: like x; the sum of v v^T over these is the identity in expectation.
        steps: of equal length in ln r.

    Returns:
        (B,) and (B,), float64. Raises ConfigError where the schedule's noisiest level is pure noise.
    """
    noisiest, cleanest = ends(predictor.schedule)
    dimension = x[0].numel()

    def slope(z: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        level = predictor.schedule.at(predictor.schedule.t_of(log_snr))
        size = float(_size(level))
        share = float(level.sigma) / size
        eps, divergence = _eps(predictor, (size * z).to(x.dtype), level, condition, probes)
        return share * eps.double() - share**2 * z, float(level.sigma) * divergence - share**2 * dimension

    z = x.double() / float(_size(cleanest))
    volume = torch.full((len(x),), -dimension * math.log(float(_size(cleanest))), dtype=torch.float64, device=x.device)
    grid = torch.linspace(float(cleanest.log_snr), float(noisiest.log_snr), steps + 1, dtype=torch.float64)
    for start, end in pairwise(grid):
        step, gain = _runge_kutta(slope, z, start, end)
        z, volume = z + step, volume + gain
    std = predictor.schedule.prior_std / float(_size(noisiest))
    latent = -0.5 * (z / std).square().flatten(1).sum(1) - dimension * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return latent, volume


Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _runge_kutta(slope: Slope, z: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """One classical step of fourth order between two log-SNRs: what z and the logarithm of volume gain."""
    h, middle = float(start - end) / 2.0, (start + end) / 2.0  # d ln r = -d log_snr / 2
    a = slope(z, start)
    b = slope(z + h / 2 * a[0], middle)
    c = slope(z + h / 2 * b[0], middle)
    d = slope(z + h * c[0], end)
    step, gain = (h / 6 * (p + 2 * q + 2 * r + s) for p, q, r, s in zip(a, b, c, d, strict=True))
    return step, gain


def _eps(
    predictor: Predictor, x: Tensor, level: Level, condition: Tensor | None, probes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The predicted eps and its divergence, (B,) float64, as the sum of v^T (d eps / dx) v over the probes v."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        eps = predictor.predict(x, level, condition).eps
    divergence = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for k, probe in enumerate(probes, 1):
        (pulled,) = torch.autograd.grad(eps, x, probe, retain_graph=k < len(probes))
        divergence += (pulled * probe).flatten(1).sum(1, dtype=torch.float64)
    return eps.detach(), divergence


def _size(level: Level) -> Tensor:
    """Standard deviation of x of data of unit variance."""
    return (level.alpha**2 + level.sigma**2).sqrt()
