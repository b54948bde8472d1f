"""Errors between what a network says and what it should say, and the terms of the variational bound.

Bits per dimension are nats / (ln 2 x C x H x W): the mean over an image's elements, divided by ln 2.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddpm.objectives import Prediction, beside
from ddpm.registry import Component, register
from ddpm.schedules import Level, posterior_coefficients, posterior_variance

LOSSES: dict[str, Callable[..., Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
"""Elementwise errors by name: squared, absolute, Huber with delta = 1."""


class Criterion(Component, kind="criterion"):
    """What training minimises: `of_error` times the error plus `of_bound` times the variational bound in bits per dimension.

    trains_mean: whether the bound's gradient reaches what the network predicts, or its variance alone.
    """

    of_error: ClassVar[float] = 1.0
    trains_mean: ClassVar[bool] = True

    @property
    @abstractmethod
    def of_bound(self) -> float:
        """The weight of the bound; 0: it is not computed."""


@register("simple")
class Simple(Criterion):
    """The error between output and target: L_simple for eps and l2 (Ho et al. 2020, equation 14)."""

    of_bound = 0.0


@register("vlb")
class VLB(Criterion):
    """The variational bound: T times the term of one t (Nichol & Dhariwal 2021, section 3.3)."""

    of_error = 0.0
    of_bound = 1.0


@register("hybrid")
class Hybrid(Criterion):
    """The error for the mean and `weight` times the bound for the variance (Nichol & Dhariwal 2021, equation 16).

    The bound is in bits per dimension, as in their code.
    """

    weight: Annotated[float, Field(gt=0)] = 0.001
    trains_mean = False

    @property
    def of_bound(self) -> float:
        return self.weight


def per_image_loss(name: str, output: Tensor, target: Tensor) -> Tensor:
    """(B,) float32: the mean error of each image. For eps and l2 this is L_simple (Ho et al. 2020, equation 14)."""
    return LOSSES[name](output.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """Elementwise KL(q || p) of two Gaussians, in nats."""
    difference = log_variance_q - log_variance_p
    return 0.5 * ((mean_q - mean_p) ** 2 * torch.exp(-log_variance_p) + torch.expm1(difference) - difference)


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Elementwise ln p(x0) of 8-bit images under a Gaussian, in nats (Ho et al. 2020, equation 13).

    Each of the 256 values stands for a bin of width 2/255 around it; the outermost bins reach to infinity.
    """
    centred, inverse = x0 - mean, torch.exp(-log_std)
    upper, lower = (inverse * (centred + step / 255.0) for step in (1.0, -1.0))
    log_cdf_upper, log_survival_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    # In the upper tail the difference is taken of survival functions, so that nothing cancels.
    high, low = torch.where(centred > 0, -lower, upper), torch.where(centred > 0, -upper, lower)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-12)))
    edges = torch.where(x0 > 0.999, log_survival_lower, inside)
    return torch.where(x0 < -0.999, log_cdf_upper, edges)


def bound_terms(x0: Tensor, level: Level, previous: Level, prediction: Prediction, floor: Tensor) -> Tensor:
    """(B,) float64 bits per dimension: the term of the bound that the step from t to s = `previous` adds.

    KL(q(x_s | x_t, x0) || p(x_s | x_t)), or where s is the clean image -ln p(x0 | x_t), the discretised decoder: L_{t-1}
    and L_0 of Ho et al. (2020), equation 5. The sum over a path, and `prior_term`, bound -log2 p(x0) per dimension.

    Args:
        x0: (B, C, H, W), 8-bit images in [-1, 1].
        level, previous: (B,) or (); rows whose `previous` is the clean image may stand among others.
        prediction: of x_t at `level`; its x0 is not clipped here.
        floor: float64 (), what the decoder has for its zero beta-tilde: that of the step before it in the path, as Ho et
            al. and Nichol & Dhariwal (2021) clip it, both in code; for a table, posterior_variance(at(1), at(0)).
    """
    clean = previous.sigma == 0
    log_variance = prediction.log_variance(level, previous, floor=floor).expand_as(x0)
    true_log_variance = torch.where(clean, floor, posterior_variance(level, previous)).log()
    at_x0, _ = posterior_coefficients(level, previous)
    difference = beside(at_x0, x0) * (x0 - prediction.x0)  # of the two means, which share their x_t
    kl = gaussian_kl(difference, beside(true_log_variance, x0), torch.zeros_like(difference), log_variance)
    if clean.ndim == 0 and not clean:
        return in_bits(kl)
    decoder = -discretised_log_likelihood(x0, prediction.x0, 0.5 * log_variance)
    return in_bits(torch.where(beside(clean, x0), decoder, kl))


def prior_term(x0: Tensor, level: Level) -> Tensor:
    """(B,) bits per dimension: L_T = KL(q(x_T | x0) || N(0, I)) at the noisiest level (Ho et al. 2020, equation 5)."""
    at = level.like(x0)
    log_variance = 2.0 * at.sigma.log()
    return in_bits(gaussian_kl(at.alpha * x0, log_variance.expand_as(x0), torch.zeros_like(x0), torch.zeros_like(x0)))


def in_bits(nats: Tensor) -> Tensor:
    """Elementwise nats (B, ...) -> bits per dimension (B,)."""
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
