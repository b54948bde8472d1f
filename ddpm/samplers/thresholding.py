"""What is done to the predicted x0 before a step uses it."""

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ddpm.registry import Component, register


class Thresholding(Component, kind="thresholding"):
    """A correction of the predicted x0; of each image by itself."""

    @abstractmethod
    def apply(self, x0: Tensor) -> Tensor:
        """The corrected x0, like x0 (B, ...)."""


@register("clip")
class Clip(Thresholding):
    """Clamp x0 to the range of images, [-1, 1] (Ho et al. 2020, code; Saharia et al. 2022 call it static thresholding)."""

    def apply(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1.0, 1.0)


@register("dynamic")
class Dynamic(Thresholding):
    """Clamp x0 to [-s, s] and divide by s, a percentile of its absolute values (Saharia et al. 2022, section 2.3).

    s is at least 1, where this is `clip`, and at most `max`; each image has its own. Made for strong guidance.
    """

    percentile: Annotated[float, Field(gt=0, le=1)] = 0.995
    max: Annotated[float, Field(ge=1)] | None = None

    def apply(self, x0: Tensor) -> Tensor:
        wide = x0.float() if x0.element_size() < 4 else x0
        # One image at a time: torch.quantile takes 16 million elements at most.
        found = torch.stack([torch.quantile(image.abs().flatten(), self.percentile) for image in wide])
        s = found.clamp(1.0, self.max).reshape(-1, *(1,) * (x0.ndim - 1))
        return (torch.maximum(torch.minimum(wide, s), -s) / s).to(x0.dtype)


@register("none")
class Unbounded(Thresholding):
    """Leave x0 as predicted."""

    def apply(self, x0: Tensor) -> Tensor:
        return x0


@register("model")
class OfModel(Unbounded):
    """What the checkpoint remembers as its own."""
