"""Pictures: the only place where uint8 becomes [-1, 1] and back, and the files that people look at.

Arrays are channels first, (C, H, W) or (N, C, H, W), with one channel (grey) or three (RGB).
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from ddpm.errors import ConfigError, DataError
from ddpm.files import atomic_path

Pixels = NDArray[np.uint8]

_PLEASANT_SIDE = 32
_MAX_PIXELS = 64_000_000


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8, or `to_pixels`' float32, in 0..255 -> float32 in [-1, 1], any shape."""
    assert images.dtype in (torch.uint8, torch.float32), images.dtype
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped to it; NaN becomes 0) -> nearest uint8; the exact inverse of `to_float`."""
    return to_pixels(images).round().to(torch.uint8)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped to it; NaN becomes 0) -> float32 in 0..255, not rounded."""
    return (images.detach().float().nan_to_num(-1.0, 1.0, -1.0).clamp(-1, 1) + 1) * 127.5


def grid(
    images: Pixels, columns: int | None = None, padding: int = 2, scale: int | None = None, background: int = 255
) -> Pixels:
    """Tile uint8 images (N, C, H, W), row by row, into one (C, H', W').

    Default columns: near square. `scale` repeats every pixel; by default small images grow to a side of about 32.
    Raises ConfigError when there is nothing to tile.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise ConfigError(f"grid: expected uint8 images (N, C, H, W), found {images.dtype} {images.shape}.")
    scale = scale or max(1, _PLEASANT_SIDE // max(images.shape[2:]))
    count, channels, height, width = images.repeat(scale, axis=2).repeat(scale, axis=3).shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.full((rows * columns, channels, height + padding, width + padding), background, np.uint8)
    tiles[:count, :, :height, :width] = images.repeat(scale, axis=2).repeat(scale, axis=3)
    tiled = tiles.reshape(rows, columns, channels, height + padding, width + padding).transpose(2, 0, 3, 1, 4)
    sheet = tiled.reshape(channels, rows * (height + padding), columns * (width + padding))
    return np.pad(sheet, ((0, 0), (padding, 0), (padding, 0)), constant_values=background)


def save_png(path: Path, image: Pixels, metadata: Mapping[str, str] | None = None) -> None:
    """Write uint8 (C, H, W) as PNG, whole or not at all, with `metadata` as text chunks; raises DataError."""
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value)
    with atomic_path(path) as temporary:
        _picture(image).save(temporary, format="PNG", pnginfo=text)


def save_gif(path: Path, frames: Iterable[Pixels], fps: float, last_frame_s: float = 1.5) -> None:
    """Write uint8 frames (C, H, W) as an endless GIF that rests on its last frame; raises ConfigError, DataError."""
    pictures = [_picture(frame) for frame in frames]
    if not pictures:
        raise ConfigError(f"{path}: a GIF needs at least one frame.")
    each_ms = max(20, round(100 / fps) * 10)
    durations = [each_ms] * (len(pictures) - 1) + [max(each_ms, round(last_frame_s * 100) * 10)]
    with atomic_path(path) as temporary:
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def read_image(path: Path) -> Pixels:
    """An image file as uint8 (1, H, W) or (3, H, W): upright, transparency on white, 16 bits cut to 8; raises DataError."""
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                raise DataError(
                    f"{path}: {picture.width} x {picture.height} pixels are too many; the limit is {_MAX_PIXELS:,}."
                )
            return _pixels(ImageOps.exif_transpose(picture))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: cannot be read as an image ({' '.join(str(error).split())[:160]}).") from None


def _picture(image: Pixels) -> Image.Image:
    assert image.ndim == 3 and image.shape[0] in (1, 3) and image.dtype == np.uint8, (image.shape, image.dtype)
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _pixels(picture: Image.Image) -> Pixels:
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
        return (deep.clip(0, 65535) >> 8).astype(np.uint8)[None]
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if picture.mode in ("L", "1"):
        return np.array(picture.convert("L"))[None]
    return np.ascontiguousarray(np.array(picture.convert("RGB")).transpose(2, 0, 1))
