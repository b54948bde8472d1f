"""Augmentation that does not leak: the network is told what was done to each image, and at sampling that nothing was.

Images are changed on the device, by numbers of the batch's stream.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddpm.randomness import Stream
from ddpm.registry import Component, register


class Augmentation(Component, kind="augmentation"):
    """What is done to training images on their way in; `num_labels` numbers tell the network of it."""

    num_labels: ClassVar[int] = 0

    @abstractmethod
    def apply(self, images: Tensor, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """Change images.

        Args:
            images: (B, C, H, W) float32 in [-1, 1].
            stream: the batch's random numbers; an image depends on its own alone.

        Returns:
            Images like the given ones, and (B, num_labels) float32, all zero for an untouched image (None: no labels).
        """


@register("none")
class Unchanged(Augmentation):
    """Images as they are."""

    def apply(self, images: Tensor, stream: Stream) -> tuple[Tensor, Tensor | None]:
        return images, None


@dataclass(frozen=True)
class Geometry:
    """What is done to each of B images, in the order of the fields; each is zero where nothing is.

    flip_x, flip_y: (B,) bool; scale: (B,) enlargement by 2^(0.2 scale); rotation: (B,) radians; stretch: (B,) enlargement by
    2^(0.2 stretch) along an axis, and by its inverse across; stretch_axis: (B,) radians from the x axis; shift: (B, 2) right
    and down, in eighths of the width and height. All but the flips are float64.
    """

    flip_x: Tensor
    flip_y: Tensor
    scale: Tensor
    rotation: Tensor
    stretch: Tensor
    stretch_axis: Tensor
    shift: Tensor

    def labels(self) -> Tensor:
        """(B, 9) float32 (Karras et al. 2022, table 6)."""
        columns = [self.flip_x, self.flip_y, self.scale, self.rotation.cos() - 1.0, self.rotation.sin()]
        columns += [self.stretch * self.stretch_axis.cos(), self.stretch * self.stretch_axis.sin()]
        return torch.stack([*columns, *self.shift.unbind(1)], dim=1).float()

    def source(self) -> Tensor:
        """(B, 2, 2): the vector from the centre (x, y) where a pixel of the result, shifted back, is taken from."""
        shrink = torch.exp2(-0.2 * self.scale)[:, None, None]
        along = torch.exp2(-0.2 * self.stretch)
        stretched = _rotation(-self.stretch_axis) @ torch.diag_embed(torch.stack([along, 1.0 / along], 1))
        return shrink * _rotation(self.rotation) @ stretched @ _rotation(self.stretch_axis)


@register("edm")
class EDM(Augmentation):
    """Geometric augmentation (Karras et al. 2022, appendix F.2): half of all images are mirrored; and with this probability
    each, an image is turned upside down (half of the time), scaled, rotated, stretched along an axis, shifted.

    Beyond its border an image goes on as its mirror image.
    """

    num_labels: ClassVar[int] = 9
    probability: Annotated[float, Field(ge=0, le=1)] = 0.12

    def apply(self, images: Tensor, stream: Stream) -> tuple[Tensor, Tensor | None]:
        geometry = self.draw(stream)
        return transform(images, geometry), geometry.labels()

    def draw(self, stream: Stream) -> Geometry:
        """The geometry of each image of a stream."""
        done = stream.at("augment-done").uniform(5) < self.probability  # up-down, scale, rotation, stretch, shift
        uniform = stream.at("augment-uniform").uniform(5)
        normal = stream.at("augment-normal").normal(4).double()
        angle = (2.0 * uniform - 1.0) * math.pi
        oblique = uniform[:, 4] < 0.5
        return Geometry(
            flip_x=uniform[:, 0] < 0.5,
            flip_y=done[:, 0] & (uniform[:, 1] < 0.5),
            scale=normal[:, 0] * done[:, 1],
            rotation=angle[:, 2] * done[:, 2],
            stretch=normal[:, 1] * done[:, 3],
            stretch_axis=angle[:, 3] * oblique,
            shift=normal[:, 2:] * done[:, 4:],
        )


def transform(images: Tensor, geometry: Geometry) -> Tensor:
    """Images (B, C, H, W) after flips, scaling, rotation, stretching and shifting; the untouched ones bit for bit.

    In between, an image stands at twice its size, up and down by a wavelet filter that keeps it sharp (Karras et al. 2020,
    "Training generative adversarial networks with limited data", appendix B). This part is done in float64: so autocast
    leaves it alone, and rounding to float32 hides the order of summation, which may depend on the batch.
    """
    flip_x, flip_y = geometry.flip_x[:, None, None, None], geometry.flip_y[:, None, None, None]
    images = torch.where(flip_x, images.flip(-1), images)
    images = torch.where(flip_y, images.flip(-2), images)
    moved = torch.stack([geometry.scale, geometry.rotation, geometry.stretch, *geometry.shift.unbind(1)]) != 0
    source, shift = geometry.source(), geometry.shift
    at_once = max(1, _MOST_VALUES // (36 * images[0].numel()))
    for rows in moved.any(dim=0).nonzero().flatten().split(at_once):
        images[rows] = _resample(images[rows].double(), source[rows], shift[rows]).to(images.dtype)
    return images


_MOST_VALUES = 2**24
"""Float64 values of enlarged images that are held at once."""


def _resample(images: Tensor, source: Tensor, shift: Tensor) -> Tensor:
    """Enlarge, take each pixel from where it comes, shrink again; float64."""
    height, width = images.shape[-2:]
    (up_y, down_y), (up_x, down_x) = _filters(height, images.device), _filters(width, images.device)
    large = up_y @ images @ up_x.T
    # Places from the centre, in pixels; of the samples of the enlarged image every second one is a pixel.
    x, y = (torch.arange(1 - n - 6, n + 7, device=images.device).double() / 2 for n in (width, height))
    ends = (
        torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        - (shift * _pair(width, height, shift) / 8)[:, None, None]
    )
    starts = torch.einsum("bij,bmnj->bmni", source, ends)
    grid = (4.0 * starts - 1.0) / _pair(large.shape[-1], large.shape[-2], starts)  # the image's ends are at -1 and 1
    return down_y @ F.grid_sample(large, grid, mode="bilinear", padding_mode="zeros", align_corners=False) @ down_x.T


@cache
def _filters(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices for a side of n pixels: to twice the size with n - 1 mirrored pixels at each end, (2 (3n - 2), n); and back
    from twice the size with a margin of 3 pixels at each end, (n, 2 (n + 6))."""
    taps = torch.tensor(_SYM6, dtype=torch.float64)

    def up(length: int) -> Tensor:
        tap = torch.arange(2 * length)[:, None] - 2 * torch.arange(length) + 5
        return torch.where((tap >= 0) & (tap < len(taps)), taps[tap.clamp(0, len(taps) - 1)], 0.0)

    period = max(2 * n - 2, 1)
    mirrored = (n - 1) - ((n - 1) - torch.arange(1 - n, 2 * n - 1).remainder(period)).abs()
    padded = F.one_hot(mirrored, n).double()
    return (up(3 * n - 2) @ padded).to(device), up(n + 6).T[3 : n + 3].to(device)


def _pair(x: int, y: int, like: Tensor) -> Tensor:
    return torch.tensor([x, y], dtype=like.dtype, device=like.device)


def _rotation(angle: Tensor) -> Tensor:
    """(B,) -> (B, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)


_SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""Low-pass filter of the least asymmetric wavelet with six vanishing moments (Daubechies 1992, "Ten lectures on wavelets")."""
