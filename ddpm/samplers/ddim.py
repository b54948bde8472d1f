"""Denoising diffusion implicit models (Song, Meng & Ermon 2021)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.objectives import Prediction
from ddpm.registry import register
from ddpm.samplers.base import Denoise, Sampler
from ddpm.samplers.thresholding import Thresholding
from ddpm.schedules import Level, posterior_variance


@register("ddim")
class DDIM(Sampler):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - s^2) eps + s z, with s = eta times the posterior's deviation.

    eta = 0 is deterministic; eta = 1 is ancestral sampling with the small variance. `eps` is what stands for eps where x0
    was thresholded: derived again from it, or the model's own as predicted (Song et al., code). `analytic=true` adds the
    variance that x0 has given x_t, which makes the reverse step the best Gaussian one (Bao et al. 2022, Analytic-DDIM); it
    needs a model that knows it.
    """

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    eps: Literal["derived", "predicted"] = "derived"
    analytic: bool = False

    @property
    def rises(self) -> bool:
        return self.eta == 0 and not self.analytic

    def corrected(self, found: Prediction, x: Tensor, level: Level, rule: Thresholding) -> Prediction:
        if self.eps == "predicted":
            return replace(found, x0=rule.apply(found.x0))
        return super().corrected(found, x, level, rule)

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: Any
    ) -> Tensor:
        """Song et al. (2021), equations 12 and 16; the analytic variance: Bao et al. (2022), theorem 1."""
        found = denoise(x, level)
        variance = torch.zeros_like(following.sigma)
        if self.eta:
            variance = self.eta**2 * posterior_variance(level, following)
        at_eps = (following.sigma**2 - variance).clamp(min=0).sqrt()
        x = following.alpha * found.x0 + at_eps * found.eps
        if self.analytic:
            if found.x0_variance is None:
                raise ConfigError(
                    "sampler ddim:analytic=true: this model knows no analytic variance; leave analytic out, or estimate it."
                )
            variance = variance + (following.alpha - at_eps * level.alpha / level.sigma) ** 2 * found.x0_variance
        if following.is_clean or not (self.eta or self.analytic):
            return x
        return x + variance.clamp(min=0).sqrt().to(x.dtype) * noise()
