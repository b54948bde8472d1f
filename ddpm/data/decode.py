"""Image files to uint8 arrays: what is read, how it is flattened to grey or RGB, how it is brought to one size.

The header is read first, and the pixels only of an image that is not too large, so that a small file which unpacks to
gigabytes costs nothing. Everything a decoder raises becomes `UnreadableImageError`.
"""

import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ddpm.errors import DataError
from ddpm.files import reason

MAX_PIXELS = 64_000_000
"""Images of more pixels are left out."""

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""File name endings that are taken for images, in lower case."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # decoders that run nothing and fetch nothing
_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.32, tag 0x0112


class UnreadableImageError(Exception):
    """An image file that is left out; the message is the reason."""


@dataclass(frozen=True)
class Header:
    """What the target size and channels are chosen from: the upright height and width, and whether it is grey."""

    height: int
    width: int
    grey: bool


def inspect(path: Path) -> Header:
    """Read an image's header. Grey is decided by the mode, and for palettes by the colours in use.

    Raises UnreadableImageError: not an image, damaged, more than MAX_PIXELS.
    """
    with _opened(path) as image:
        turned = _orientation(image) >= 5
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        return Header(height, width, image.mode in _GREY or (image.mode in ("P", "PA") and _grey_palette(image)))


def decode(path: Path, size: tuple[int, int], channels: int, resize: str) -> NDArray[np.uint8]:
    """Read an image: (channels, height, width) uint8, upright, over white, its first frame if it is animated.

    Args:
        size: (height, width).
        channels: 1 grey, 3 RGB.
        resize: "crop", "fit" or "stretch"; see `fit`.

    Raises UnreadableImageError.
    """
    with _opened(path) as image:
        upright = _UPRIGHT.get(_orientation(image))
        flat = _flatten(image).convert("L" if channels == 1 else "RGB")
        return to_array(fit(flat if upright is None else flat.transpose(upright), size, resize))


def fit(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """Bring a grey or RGB image to (height, width) by Lanczos resampling with antialiasing.

    "crop" covers the target and keeps the centre, "fit" shows the whole image on white, "stretch" changes its shape.
    An image of that size already is returned as it is.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if resize == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if resize == "fit":
        scale = min(width / image.width, height / image.height)
        inner = image.resize((_scaled(image.width, scale), _scaled(image.height, scale)), Image.Resampling.LANCZOS)
        white = Image.new(image.mode, (width, height), "white")
        white.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
        return white
    scale = max(width / image.width, height / image.height)
    if scale == 1:  # whole pixels are cut off, none is interpolated
        x, y = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((x, y, x + width, y + height))
    wide, high = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    box = (left, top, min(left + wide, image.width), min(top + high, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def convert_arrays(images: NDArray[np.uint8], size: tuple[int, int], channels: int, resize: str) -> NDArray[np.uint8]:
    """Bring (N, C, H, W) uint8 images to a size and channels as `decode` does; the same array where nothing changes.

    Raises DataError: channels other than 1 and 3 can only be kept.
    """
    if images.shape[1:] == (channels, *size):
        return images
    if images.shape[1] not in (1, 3) or channels not in (1, 3):
        raise DataError(
            f"images with {images.shape[1]} channels cannot be resized or made to have {channels}; use grey or RGB images."
        )
    converted = np.empty((len(images), channels, *size), np.uint8)
    for image, place in zip(images, converted, strict=True):
        place[:] = to_array(fit(to_image(image).convert("L" if channels == 1 else "RGB"), size, resize))
    return converted


def to_image(array: NDArray[np.uint8]) -> Image.Image:
    """(1 or 3, H, W) uint8 -> a grey or RGB image."""
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """A grey or RGB image -> (1 or 3, H, W) uint8."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def choose_size(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], str]:
    """The size that images (height, width) are brought to when none is asked for, and a note on why, or "".

    One size with its longer side up to 256 is kept. Otherwise: the median aspect ratio, longer side 64 (the shorter one
    a multiple of 8, so that networks can halve it), or the longest side present where that is less.
    """
    different = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    if len(different) == 1 and max(different[0]) <= 256:
        return different[0], ""
    longer = min(64, max(max(size) for size in different))
    aspect = statistics.median(width / height for height, width in sizes)
    narrow = longer * min(aspect, 1 / aspect)
    shorter = max(8, round(narrow / 8) * 8) if longer == 64 else max(1, round(narrow))
    size = (longer, shorter) if aspect < 1 else (shorter, longer)
    seen = f"of {_written(different[0])}"
    if len(different) > 1:
        seen = f"of {len(different)} sizes, {_written(different[0])} to {_written(different[-1])}"
    return (
        size,
        f"The images are {seen} (height x width) and become {_written(size)}; --data.size and --data.resize change that.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep decoders' warnings about odd files off the screen; the reasons of skipped files say what matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and its size checked; whatever its decoder raises becomes UnreadableImageError."""
    too_large = f"has more than {MAX_PIXELS // 1_000_000} megapixels"
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{too_large} ({image.width}x{image.height})")
            yield image
    except UnreadableImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImageError(too_large) from None
    except UnidentifiedImageError:
        raise UnreadableImageError("is not an image of a known format") from None
    except Exception as error:  # a decoder raises whatever the damage leads it to
        raise UnreadableImageError(reason(error)) from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 as far as the header tells; TIFF files are turned upright by their decoder."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data is no reason to lose the image
        return 1
    return found if found in _UPRIGHT else 1


def _grey_palette(image: Image.Image) -> bool:
    used = np.unique(np.asarray(image.getchannel("P") if image.mode == "PA" else image))
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours = palette[used[used < len(palette)]]
    return bool((colours == colours[:, :1]).all())


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode -> L or RGB: alpha over white, 16 bits scaled to 8."""
    grey = image.mode in _GREY
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise UnreadableImageError(f"has 32-bit pixels (mode {image.mode}), of unknown range")
    if image.mode.startswith("I"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return image.convert("RGB").convert("L") if grey else image.convert("RGB")


def _scaled(side: int, scale: float) -> int:
    return max(1, round(side * scale))


def _written(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
