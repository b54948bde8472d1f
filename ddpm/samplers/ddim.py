"""Denoising diffusion implicit models (Song, Meng & Ermon 2021)."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.samplers.base import Denoise, Sampler
from ddpm.schedules import Level, posterior_variance


@register("ddim")
class DDIM(Sampler):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - s^2) eps + s z, with s = eta times the posterior's deviation.

    eta = 0 is deterministic; eta = 1 is ancestral sampling with the small variance.
    """

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0

    def step(
        self,
        x: Tensor,
        level: Level,
        following: Level,
        denoise: Denoise,
        noise: Callable[[], Tensor],
        history: list[Any],
    ) -> Tensor:
        """Song et al. (2021), equations 12 and 16."""
        prediction = denoise(x, level)
        variance = self.eta**2 * posterior_variance(level, following)
        x = following.alpha * prediction.x0 + (following.sigma**2 - variance).clamp(min=0).sqrt() * prediction.eps
        return x + variance.sqrt() * noise() if self.eta and not following.is_clean else x
