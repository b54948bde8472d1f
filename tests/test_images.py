"""Pictures: exact conversion, tiling by definition, files that read back as they were."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm import images
from ddpm.errors import ConfigError, DataError


@pytest.fixture
def photo() -> np.ndarray:
    """A smooth colour picture, uint8 (3, 20, 24)."""
    rows, columns = np.mgrid[0:20, 0:24]
    return np.stack([rows * 12, columns * 10, rows + columns]).astype(np.uint8)


def test_to_float_is_the_affine_map_onto_minus_one_to_one():
    floats = images.to_float(torch.arange(256, dtype=torch.uint8))
    assert floats.dtype == torch.float32
    assert floats[0] == -1
    assert floats[255] == 1
    torch.testing.assert_close(floats.double(), torch.arange(256, dtype=torch.float64) / 127.5 - 1, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_undoes_to_float_for_every_value(dtype):
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(every).to(dtype)), every)


def test_to_uint8_rounds_to_the_nearest_and_clamps():
    floats = torch.tensor(
        [-9.0, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 9.0, float("inf"), float("-inf"), float("nan")]
    )
    assert images.to_uint8(floats).tolist() == [0, 0, 1, 0, 255, 255, 255, 0, 0]


@settings(deadline=None)
@given(st.floats(-1, 1))
def test_to_uint8_is_never_off_by_more_than_half(value):
    assert abs(int(images.to_uint8(torch.tensor([value]))) - (value + 1) * 127.5) <= 0.5 + 1e-4


@settings(deadline=None)
@given(
    count=st.integers(1, 13),
    columns=st.integers(1, 15) | st.none(),
    padding=st.integers(0, 3),
    scale=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
)
def test_every_image_stands_where_the_grid_says(count, columns, padding, scale, channels):
    tiles = np.random.default_rng(count).integers(0, 255, (count, channels, 4, 5), dtype=np.uint8)
    sheet = images.grid(tiles, columns, padding, scale, background=255)
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    height, width = 4 * scale + padding, 5 * scale + padding
    assert sheet.shape == (channels, rows * height + padding, columns * width + padding)
    covered = np.zeros(sheet.shape[1:], bool)
    for place in range(count):
        top, left = padding + place // columns * height, padding + place % columns * width
        part = (slice(top, top + 4 * scale), slice(left, left + 5 * scale))
        assert np.array_equal(sheet[:, *part], np.kron(tiles[place], np.ones((scale, scale), np.uint8)))
        covered[part] = True
    assert (sheet[:, ~covered] == 255).all()


@pytest.mark.parametrize(("side", "scale"), [(8, 4), (16, 2), (28, 1), (32, 1), (256, 1)])
def test_small_images_are_enlarged_and_large_ones_are_not(side, scale):
    assert images.grid(np.zeros((1, 1, side, side), np.uint8), padding=0).shape == (1, side * scale, side * scale)


@pytest.mark.parametrize("bad", [np.zeros((0, 1, 4, 4), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((1, 1, 4, 4))])
def test_a_grid_of_nothing_or_of_floats_is_refused(bad):
    with pytest.raises(ConfigError, match="grid: expected uint8 images"):
        images.grid(bad)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_reads_back_bit_for_bit_with_its_text(tmp_path: Path, photo, channels):
    path = tmp_path / "new" / "a.png"
    images.save_png(path, photo[:channels], {"recipe": "ddim:steps=50", "who": "Ærø ✓"})
    assert np.array_equal(images.read_image(path), photo[:channels])
    with Image.open(path) as picture:
        assert picture.text == {"recipe": "ddim:steps=50", "who": "Ærø ✓"}
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_png_is_the_same_file_each_time(tmp_path: Path, photo):
    for name in ("a.png", "b.png"):
        images.save_png(tmp_path / name, photo, {"k": "v"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_gif_holds_every_frame_and_rests_on_the_last(tmp_path: Path):
    frames = [np.full((1, 6, 6), value, np.uint8) for value in (0, 90, 255)]
    images.save_gif(tmp_path / "a.gif", iter(frames), fps=10, last_frame_s=1.5)
    seen = []
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.info["loop"] == 0
        for index in range(picture.n_frames):
            picture.seek(index)
            seen.append((int(np.array(picture.convert("L"))[0, 0]), picture.info["duration"]))
    assert seen == [(0, 100), (90, 100), (255, 1500)]


def test_gif_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="at least one frame"):
        images.save_gif(tmp_path / "a.gif", [], fps=10)


def test_what_cannot_be_written_is_a_data_error(tmp_path: Path, photo):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError):
        images.save_png(tmp_path / "file" / "a.png", photo)


def test_read_turns_an_image_upright(tmp_path: Path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo.transpose(1, 2, 0)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(images.read_image(tmp_path / "a.png"), np.rot90(photo, -1, axes=(1, 2)))


def test_read_lays_transparency_on_white(tmp_path: Path):
    clear = np.array([[[200, 100, 50, 0], [200, 100, 50, 255]]], np.uint8)
    Image.fromarray(clear).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 255, 255], [200, 100, 50]]


def test_read_cuts_sixteen_bits_to_eight(tmp_path: Path):
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png").tolist() == [[[0, 1, 255]]]


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "LA", "YCbCr"])
def test_read_takes_every_common_mode(tmp_path: Path, photo, mode):
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(photo.transpose(1, 2, 0)).convert(mode).save(path)
    found = images.read_image(path)
    assert found.dtype == np.uint8
    assert found.shape in ((1, 20, 24), (3, 20, 24))


@settings(deadline=None)
@given(cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_a_damaged_file_is_a_data_error_or_an_image(tmp_path_factory, cut, flip):
    path = tmp_path_factory.mktemp("damaged") / "a.png"
    images.save_png(path, np.arange(192, dtype=np.uint8).reshape(3, 8, 8))
    whole = bytearray(path.read_bytes())
    whole[flip % len(whole)] ^= 0xFF
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    try:
        assert images.read_image(path).dtype == np.uint8
    except DataError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)


def test_missing_file_and_bomb_are_data_errors(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        images.read_image(tmp_path / "none.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="too many"):
        images.read_image(tmp_path / "bomb.png")
