"""Image files of every sort against Pillow's own pixels or a closed form; damaged and oversized ones are left out."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ddpm.data.decode import UnreadableImageError, choose_size, convert_arrays, decode, fit, inspect, quiet

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (12, 20), dtype=np.uint8)


def read(path: Path, channels: int = 3, size: tuple[int, int] = (12, 20), resize: str = "crop") -> NDArray[np.uint8]:
    """(H, W, C) or (H, W)."""
    pixels = decode(path, size, channels, resize)
    assert pixels.shape == (channels, *size)
    return pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)


def over_white(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    alpha = ALPHA.reshape(12, 20, *([1] * (colours.ndim - 2))) / 255
    return colours * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_rgb(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a.{suffix}", lossless=True)
    header = inspect(tmp_path / f"a.{suffix}")
    assert (header.height, header.width, header.grey) == (12, 20, False)
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), RGB)
    luma = RGB.astype(int) @ [19595, 38470, 7471] + 0x8000 >> 16
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}", 1), luma)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "pgm", "gif"])
def test_lossless_grey(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(GREY).save(tmp_path / f"a.{suffix}")
    assert inspect(tmp_path / f"a.{suffix}").grey
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}", 1), GREY)
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}", 3), np.stack([GREY] * 3, -1))


def test_an_rgb_file_that_looks_grey_counts_as_colour(tmp_path: Path) -> None:
    Image.fromarray(np.stack([GREY] * 3, -1)).save(tmp_path / "a.png")
    assert not inspect(tmp_path / "a.png").grey


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(GREY > 127).save(tmp_path / "a.png")
    assert inspect(tmp_path / "a.png").grey
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1), np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    values = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)
    values[0, :3] = 0, 257 * 77 + 128, 65535
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert inspect(tmp_path / f"a.{suffix}").grey
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}", 1), np.rint(values / 257))


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    values = np.arange(240, dtype=np.uint16).reshape(12, 20) * 273
    Image.frombytes("I;16B", (20, 12), values.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path / "a.tif", 1), np.rint(values / 257))


def test_pixels_of_unknown_range_are_left_out(tmp_path: Path) -> None:
    for name, dtype in (("float.tif", np.float32), ("int.tif", np.int32)):
        Image.fromarray(GREY.astype(dtype)).save(tmp_path / name)
        with pytest.raises(UnreadableImageError, match="unknown range"):
            read(tmp_path / name)


def test_alpha_is_composited_over_white(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "rgba.png")
    assert not inspect(tmp_path / "rgba.png").grey
    np.testing.assert_allclose(read(tmp_path / "rgba.png"), over_white(RGB), atol=1)
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]).save(tmp_path / "la.png")
    assert inspect(tmp_path / "la.png").grey
    np.testing.assert_allclose(read(tmp_path / "la.png", 1), over_white(GREY), atol=1)


def test_a_transparent_colour_becomes_white(tmp_path: Path) -> None:
    grey = Image.fromarray(GREY)
    grey.save(tmp_path / "a.png", transparency=int(GREY[0, 0]))
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1), np.where(GREY[0, 0] == GREY, 255, GREY))


def palette_image(colours: NDArray[np.uint8]) -> tuple[Image.Image, NDArray[np.uint8]]:
    indices = RNG.integers(0, len(colours), (12, 20)).astype(np.uint8)
    image = Image.fromarray(indices, "L").copy()
    image.putpalette(colours.tobytes())
    return image, indices


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp"])
def test_palettes(tmp_path: Path, suffix: str) -> None:
    colours = RNG.integers(0, 256, (7, 3), dtype=np.uint8)
    image, indices = palette_image(colours)
    image.save(tmp_path / f"a.{suffix}")
    assert not inspect(tmp_path / f"a.{suffix}").grey
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), colours[indices])


def test_a_palette_is_grey_by_the_colours_in_use(tmp_path: Path) -> None:
    colours = np.array([[9, 9, 9], [200, 200, 200], [3, 90, 3]], np.uint8)
    indices = RNG.integers(0, 2, (12, 20)).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "a.png")
    assert inspect(tmp_path / "a.png").grey
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1), colours[indices, 0])


def test_a_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    colours = RNG.integers(0, 256, (7, 3), dtype=np.uint8)
    image, indices = palette_image(colours)
    for name, transparency in (("index.png", 2), ("bytes.png", bytes([255, 255, 0, 255, 255, 255, 255]))):
        image.save(tmp_path / name, transparency=transparency)
        with quiet():
            found = read(tmp_path / name)
        np.testing.assert_array_equal(found, np.where(indices[..., None] == 2, 255, colours[indices]))


def test_cmyk(tmp_path: Path) -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    cmyk.save(tmp_path / "a.tif")
    assert not inspect(tmp_path / "a.tif").grey
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), RGB)
    cmyk.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - RGB).mean() < 3


TURNS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif, lossless=True)
    expected = TURNS[orientation](RGB)
    header = inspect(path)
    assert (header.height, header.width) == expected.shape[:2]
    np.testing.assert_array_equal(read(path, size=expected.shape[:2]), expected)


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01\0\x12\x01")
    with quiet():
        np.testing.assert_array_equal(read(tmp_path / "a.png"), RGB)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_many(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 12), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), np.broadcast_to([255, 0, 0], (12, 20, 3)))


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    for resize in ("crop", "fit", "stretch"):
        np.testing.assert_array_equal(
            read(tmp_path / "a.png", 3, (5, 5), resize), np.broadcast_to([1, 2, 3], (5, 5, 3))
        )


def bomb(path: Path, side: int = 20000) -> Path:
    """A 1-bit PNG, row after row of zeros: small as a file, huge as an image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


MEASURE = """
import resource, sys
from pathlib import Path
from ddpm.data.decode import UnreadableImageError, decode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(Path(sys.argv[1]), (32, 32), 3, "crop")
except UnreadableImageError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.parametrize("side", [8008, 20000])
def test_bombs_are_left_out_without_being_unpacked(tmp_path: Path, side: int) -> None:
    path = bomb(tmp_path / "bomb.png", side)
    assert path.stat().st_size < 100_000
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    grown_kb, reason = run.stdout.split(" ", 1)
    assert "more than 64 megapixels" in reason
    assert int(grown_kb) < 20_000
    with pytest.raises(UnreadableImageError, match="more than 64 megapixels"):
        inspect(path)


def test_files_that_are_no_images_are_left_out(tmp_path: Path) -> None:
    cases = {
        "text.png": b"hello",
        "empty.jpg": b"",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        for look in (inspect, read):
            with pytest.raises(UnreadableImageError, match="not an image of a known format"):
                look(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    for name in ("absent.png", "folder.png"):
        with pytest.raises(UnreadableImageError) as error:
            read(tmp_path / name)
        assert str(tmp_path) not in str(error.value)


def encoded(suffix: str, folder: Path) -> bytes:
    path = folder / f"whole.{suffix}"
    if suffix == "gif":
        palette_image(RNG.integers(0, 256, (7, 3), dtype=np.uint8))[0].save(path)
    else:
        Image.fromarray(RGB).save(path)
    return path.read_bytes()


@settings(max_examples=500, deadline=None)
@given(
    suffix=st.sampled_from(["png", "jpg", "webp", "gif", "tif", "bmp", "ppm"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(-1, 7),
)
@example(suffix="jpg", place=0.5, bit=-1)
def test_damaged_files_are_decoded_or_left_out(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, place: float, bit: int
) -> None:
    """bit -1 cuts the file there, another one flips a bit there."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    data = bytearray(encoded(suffix, folder))
    at = int(place * len(data))
    if bit < 0:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path = folder / f"damaged.{suffix}"
    path.write_bytes(data)
    for look in (inspect, read):
        try:
            with quiet():
                look(path)
        except UnreadableImageError as error:
            assert str(error)
            assert "\n" not in str(error)


def test_a_truncated_file_is_left_out(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "gif"):
        data = encoded(suffix, tmp_path)
        (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) * 3 // 4])
        with pytest.raises(UnreadableImageError):
            read(tmp_path / f"cut.{suffix}")


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def test_crop_covers_and_keeps_the_centre() -> None:
    image = Image.fromarray(RGB)
    np.testing.assert_array_equal(pixels(fit(image, (12, 13), "crop")), RGB[:, 3:16])
    np.testing.assert_array_equal(pixels(fit(image, (5, 20), "crop")), RGB[3:8])
    half = image.resize((8, 6), Image.Resampling.LANCZOS, box=(2, 0, 18, 12))
    np.testing.assert_array_equal(pixels(fit(image, (6, 8), "crop")), pixels(half))


def test_fit_shows_everything_on_white() -> None:
    image = Image.fromarray(RGB)
    found = pixels(fit(image, (30, 20), "fit"))
    np.testing.assert_array_equal(found[9:21], RGB)
    assert (found[:9] == 255).all()
    assert (found[21:] == 255).all()
    small = pixels(fit(image, (10, 10), "fit"))
    np.testing.assert_array_equal(small[2:8], pixels(image.resize((10, 6), Image.Resampling.LANCZOS)))


def test_stretch_fills_and_resizing_is_antialiased() -> None:
    image = Image.fromarray(RGB)
    np.testing.assert_array_equal(
        pixels(fit(image, (7, 5), "stretch")), pixels(image.resize((5, 7), Image.Resampling.LANCZOS))
    )
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(pixels(fit(board, (8, 8), "crop")).astype(int) - 127).max() <= 1, "a chequered board becomes grey"


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_every_size_comes_out_as_asked(width: int, height: int, wide: int, high: int) -> None:
    image = Image.new("RGB", (width, height), (10, 20, 30))
    for resize in ("crop", "fit", "stretch"):
        found = pixels(fit(image, (high, wide), resize))
        assert found.shape == (high, wide, 3)
        inside = (found == [10, 20, 30]).all(-1)
        assert inside.any()
        assert resize == "fit" or inside.all()


def test_a_very_long_image_costs_no_more_than_its_own_pixels() -> None:
    assert fit(Image.new("L", (60_000, 1)), (64, 64), "crop").size == (64, 64)


def test_arrays_are_treated_as_files_are(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for resize in ("crop", "fit", "stretch"):
        for channels in (1, 3):
            found = convert_arrays(RGB.transpose(2, 0, 1)[None], (9, 9), channels, resize)
            np.testing.assert_array_equal(found[0], decode(tmp_path / "a.png", (9, 9), channels, resize))


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ([(28, 28)] * 3, (28, 28)),
        ([(256, 200)] * 3, (256, 200)),
        ([(257, 257)] * 3, (64, 64)),
        ([(480, 640)] * 3, (48, 64)),
        ([(640, 480)] * 3, (64, 48)),
        ([(30, 30), (300, 300), (40, 40)], (64, 64)),
        ([(300, 200), (200, 300), (400, 260)], (64, 40)),
        ([(20, 30), (10, 15)], (20, 30)),
        ([(1000, 10), (999, 10)], (64, 8)),
        ([(1, 9), (9, 1), (1, 9)], (1, 9)),
    ],
)
def test_the_size_that_is_chosen(sizes: list[tuple[int, int]], size: tuple[int, int]) -> None:
    found, note = choose_size(sizes)
    assert found == size
    kept = len(set(sizes)) == 1 and sizes[0] == size
    assert bool(note) is not kept
    assert kept or f"{size[0]}x{size[1]}" in note
    assert kept or "--data.size" in note
