"""Ancestral sampling (Ho et al. 2020, algorithm 2)."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import register
from ddpm.samplers.base import Denoise, Sampler
from ddpm.schedules import Level, posterior


@register("ddpm")
class DDPM(Sampler):
    """Draw x_s from N(posterior mean at the predicted x0, variance), on any grid.

    The variance is the model's own (its log interpolated between beta-tilde and beta), or forced.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    variance: Literal["model", "fixed-large", "fixed-small"] = "model"

    def step(
        self, x: Tensor, level: Level, following: Level, denoise: Denoise, noise: Callable[[], Tensor], history: Any
    ) -> Tensor:
        """Ho et al. (2020), equation 7 for the mean, section 3.2 for the variances; no noise in the last step."""
        prediction = denoise(x, level)
        mean, _ = posterior(prediction.x0, x, level, following)
        if following.is_clean:
            return mean
        forced = {"model": None, "fixed-large": 1.0, "fixed-small": 0.0}[self.variance]
        return mean + torch.exp(0.5 * prediction.log_variance(level, following, forced)).to(x.dtype) * noise()
