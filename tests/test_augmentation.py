"""Augmentation that does not leak: against NVlabs/edm's pipeline, closed forms, and the promises of a stream.

The outputs of NVlabs' pipeline are stored in augmentation.npz: its random functions were made to give the numbers of
`geometry()`, in float64. To make it again, with a clone of github.com/NVlabs/edm (commit 008a4e5) in EDM:

    PYTHONPATH=.:EDM python tests/test_augmentation.py
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.augmentation import _SYM6, EDM, Augmentation, Geometry, transform
from ddpm.randomness import Stream

STORED = Path(__file__).parent / "augmentation.npz"
SIZES = [(16, 16), (9, 14)]


def stream(n: int, step: int = 0, first: int = 0) -> Stream:
    return Stream(5, torch.arange(first, first + n), step=step)


def pictures(n: int, height: int, width: int) -> Tensor:
    """Smooth float64 images: sums of slow waves."""
    numbers = stream(n).at("waves").uniform(3, 4, 3)
    y, x = (torch.arange(size, dtype=torch.float64) for size in (height, width))
    return waves(numbers, x.expand(height, width).expand(n, -1, -1), y[:, None].expand(n, height, width))


def waves(numbers: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """numbers (B, C, 4, 3), places (B, H, W) -> (B, C, H, W) in [-1, 1]."""
    across, down, phase = (numbers[..., i, None, None] for i in range(3))
    angle = 0.3 * (across * x[:, None, None] + down * y[:, None, None]) + 6.0 * phase
    return angle.cos().mean(dim=2)


def geometry(n: int, **only: Any) -> Geometry:
    """No change but for the fields given, for all images alike."""
    still: dict[str, Any] = {name: torch.zeros(n, dtype=torch.float64) for name in vars(nothing(0))}
    still |= {"flip_x": torch.zeros(n, dtype=torch.bool), "flip_y": torch.zeros(n, dtype=torch.bool)}
    still |= {"shift": torch.zeros(n, 2, dtype=torch.float64)}
    for name, value in only.items():
        still[name] = torch.as_tensor(value, dtype=still[name].dtype).expand_as(still[name])
    return Geometry(**still)


def nothing(n: int) -> Geometry:
    return EDM(probability=0.0).draw(stream(n))


def everything(n: int) -> Geometry:
    """All at once, but for the last image: that one shrinks so far that NVlabs' margin, one for the whole batch and as
    wide as the farthest image needs, is the widest."""
    drawn = EDM(probability=1.0).draw(stream(n))
    for value in vars(drawn).values():
        value[-1] = 0
    drawn.scale[-1] = -20.0
    return drawn


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_and_labels_are_those_of_nvlabs_edm(size: tuple[int, int], exactness: Callable[..., None]) -> None:
    stored, drawn = np.load(STORED), everything(8)
    found = transform(pictures(8, *size), drawn)
    for mine, key in ((found, "images"), (drawn.labels(), "labels")):
        theirs = torch.from_numpy(stored[f"{size} {key}"])
        assert theirs.std() > 0.2
        exactness(
            "augmentation edm", f"NVlabs/edm AugmentPipe, {key} {size}", "exact", (mine - theirs).abs().max(), 1e-6
        )


# --- closed forms


def test_the_filter_is_daubechies(exactness: Callable[..., None]) -> None:
    """Orthonormal to its shifts by two, and its high-pass partner takes out polynomials up to the fifth degree."""
    taps = torch.tensor(_SYM6, dtype=torch.float64)
    errors = [taps[2 * k :] @ taps[: 12 - 2 * k] - float(k == 0) for k in range(6)]
    high, n = taps.flip(0) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6), torch.arange(12).double() - 5.5
    errors += [high @ n**degree / 5.5**degree for degree in range(6)]
    exactness("augmentation edm", "conditions on the wavelet", "exact", torch.stack(errors).abs().max(), 1e-9)


@pytest.mark.parametrize("shift", [(1, 0), (0, -3), (2, 5)])
def test_a_shift_by_whole_pixels_is_a_shift_over_mirrored_borders(
    shift: tuple[int, int], exactness: Callable[..., None]
) -> None:
    images = pictures(2, 16, 24)
    eighths = [shift[0] / 3, shift[1] / 2]
    found = transform(images, geometry(2, shift=eighths))
    rows, columns = (torch.arange(n) - by for n, by in ((16, shift[1]), (24, shift[0])))
    mirror = [
        torch.where(i < 0, -i, torch.where(i > n - 1, 2 * (n - 1) - i, i)) for i, n in ((rows, 16), (columns, 24))
    ]
    expected = images[:, :, mirror[0]][..., mirror[1]]
    exactness("augmentation edm", f"whole pixels, {shift}", "exact", (found - expected).abs().max(), 1e-9)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_flips_are_exact(axis: str) -> None:
    images = pictures(3, 8, 6)
    turned = geometry(3, **{f"flip_{axis}": [True, False, True]})
    found, expected = transform(images, turned), images.flip(-1 if axis == "x" else -2)
    assert torch.equal(found[::2], expected[::2])
    assert torch.equal(found[1], images[1])


def test_nothing_is_nothing_bit_for_bit() -> None:
    images = pictures(4, 8, 6).float()
    assert torch.equal(transform(images, geometry(4)), images)
    found, labels = EDM(probability=0.0).apply(images, stream(4))
    assert labels is not None
    mirrored = labels[:, 0].bool()
    assert torch.equal(found, torch.where(mirrored[:, None, None, None], images.flip(-1), images))
    assert (labels[:, 1:] == 0).all()
    same, none = Augmentation.parse("none").apply(images, stream(4))
    assert same is images
    assert none is None


@pytest.mark.parametrize(
    ("only", "source"),
    [
        ({"scale": 2.0}, lambda x, y: (x / 2**0.4, y / 2**0.4)),
        ({"scale": -1.0}, lambda x, y: (x * 2**0.2, y * 2**0.2)),
        ({"rotation": math.pi / 6}, lambda x, y: (x * 0.75**0.5 - y / 2, x / 2 + y * 0.75**0.5)),
        ({"stretch": 1.5}, lambda x, y: (x / 2**0.3, y * 2**0.3)),
        ({"stretch": 1.5, "stretch_axis": math.pi / 2}, lambda x, y: (x * 2**0.3, y / 2**0.3)),
        ({"shift": [0.3, -0.2]}, lambda x, y: (x - 0.3 * 32 / 8, y + 0.2 * 24 / 8)),
        ({"rotation": math.pi / 2, "shift": [0.5, 0.0]}, lambda x, y: (-y, x - 2.0)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_pixel_comes_from_where_the_formula_says(only: dict[str, Any], source: Callable[..., Any]) -> None:
    """On slow waves, whose value anywhere is known, away from the border; the filter is not quite symmetric, so to 0.02."""
    n, height, width = 4, 24, 32
    numbers = stream(n).at("waves").uniform(3, 4, 3)
    found = transform(pictures(n, height, width), geometry(n, **only))
    y, x = torch.meshgrid(torch.arange(height).double() - 11.5, torch.arange(width).double() - 15.5, indexing="ij")
    from_x, from_y = (place.expand(n, -1, -1) for place in source(x, y))
    inside = (from_x.abs() < 10) & (from_y.abs() < 6)
    expected = waves(numbers, from_x + 15.5, from_y + 11.5)
    error = torch.where(inside[:, None], found - expected, torch.zeros(())).abs().max()
    assert inside[0].sum() > 100
    assert error < 0.02
    assert (found - pictures(n, height, width)).abs().max() > 0.1


def test_labels_say_what_was_done() -> None:
    drawn = geometry(1, flip_y=True, scale=0.5, rotation=0.2, stretch=-2.0, stretch_axis=1.0, shift=[0.1, -0.3])
    expected = [0, 1, 0.5, math.cos(0.2) - 1, math.sin(0.2), -2 * math.cos(1), -2 * math.sin(1), 0.1, -0.3]
    assert drawn.labels().dtype == torch.float32
    assert drawn.labels()[0].tolist() == pytest.approx(expected, abs=1e-6)


# --- chance


def test_each_change_is_as_likely_as_it_says(exactness: Callable[..., None]) -> None:
    """Table 6 of the paper: half of all images mirrored; 0.12 each of the others, of which the upside-down ones are half."""
    n, p = 20_000, 0.12
    drawn = EDM(probability=p).draw(stream(n))
    shares = {
        "flip_x": (drawn.flip_x, 0.5),
        "flip_y": (drawn.flip_y, p / 2),
        "scale": (drawn.scale != 0, p),
        "rotation": (drawn.rotation != 0, p),
        "stretch": (drawn.stretch != 0, p),
        "stretch_axis": (drawn.stretch_axis != 0, 0.5),
        "shift": (drawn.shift != 0, p),
    }
    z = [abs(float(hit.double().mean()) - q) / (q * (1 - q) / n) ** 0.5 for hit, q in shares.values()]
    moved = [drawn.scale, drawn.stretch, *drawn.shift.unbind(1)]
    for value in moved:
        normal = value[value != 0]
        z += [
            abs(float(normal.mean())) * len(normal) ** 0.5,
            abs(float((normal**2).mean()) - 1) * (len(normal) / 2) ** 0.5,
        ]
    turns = (drawn.rotation[drawn.rotation != 0] / math.pi, drawn.stretch_axis[drawn.stretch_axis != 0] / math.pi)
    z += [abs(float(turn.mean())) * (3 * len(turn)) ** 0.5 for turn in turns]
    z += [abs(float((turn**2).mean()) - 1 / 3) * (45 / 4 * len(turn)) ** 0.5 for turn in turns]
    exactness("augmentation edm", "chances of Karras et al. (2022), table 6", "statistical", max(z), 4.0)


def test_an_image_depends_on_its_own_numbers_alone() -> None:
    """Bit for bit, whatever batch it is in; another step changes it."""
    images, edm = pictures(21, 8, 8).float(), EDM(probability=0.6)
    whole, labels = edm.apply(images, stream(21))
    parts = [edm.apply(images[i:j], stream(j - i, first=i)) for i, j in ((0, 1), (1, 2), (2, 9), (9, 21))]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert torch.equal(torch.cat([told for _, told in parts]), labels)
    again, _ = edm.apply(images, stream(21, step=1))
    assert not torch.equal(again, whole)
    assert whole.dtype == torch.float32


def test_the_callers_images_and_their_memory_layout_stay() -> None:
    images = pictures(6, 8, 8).float().to(memory_format=torch.channels_last)
    before = images.clone()
    found, _ = EDM(probability=1.0).apply(images, stream(6))
    assert torch.equal(images, before)
    assert found.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found, EDM(probability=1.0).apply(images, stream(6))[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3)])
def test_tiny_images_are_no_trouble(size: tuple[int, int]) -> None:
    found, _ = EDM(probability=1.0).apply(pictures(5, *size).float(), stream(5))
    assert found.shape == (5, 3, *size)
    assert found.isfinite().all()


# --- the stored outputs


def remake() -> None:
    """Write augmentation.npz from a clone of NVlabs/edm on the path."""
    from training.augment import AugmentPipe

    torch.set_default_dtype(torch.float64)
    n, stored = 8, {}
    for size in SIZES:
        drawn, done = everything(n), torch.zeros(())
        turn, axis = (angle / (2.0 * math.pi) + 0.5 for angle in (drawn.rotation, drawn.stretch_axis))
        answers = {
            "randint": [flip.long().reshape(n, 1, 1, 1) for flip in (drawn.flip_x, drawn.flip_y)],
            "randn": [drawn.scale, drawn.stretch, drawn.shift.T],
            "rand": [done, done, done, turn, done, axis, done, done, done],
        }
        scripted = {name: mock.Mock(side_effect=values) for name, values in answers.items()}
        with mock.patch.multiple(torch, **scripted):
            pipe = AugmentPipe(p=1, xflip=1, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
            images, labels = pipe(pictures(n, *size))
        stored |= {f"{size} images": images.numpy(), f"{size} labels": labels.numpy()}
    np.savez_compressed(STORED, **stored)


if __name__ == "__main__":
    remake()
