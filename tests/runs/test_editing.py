"""`ddpm edit`: image files in, image files out; known pixels stay, folders keep their recipe, mistakes get a sentence."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import ddpm
from ddpm import images, runs
from ddpm.cli import main
from ddpm.editing import estimate_sigma
from ddpm.errors import ConfigError, DataError
from ddpm.files import sha256
from ddpm.guidance import Autoguided
from ddpm.images import read_image
from ddpm.runs import editing
from ddpm.runs.editing import Common
from ddpm.runs.pictures import read_mask, read_pictures


@pytest.fixture
def place(tmp_path: Path, digits: Any) -> Path:
    """Four digits as files in a folder, and a mask whose white part is a corner."""
    for k in range(4):
        images.save_png(tmp_path / f"digits/{k}.png", digits.images[k].copy())
    hole = np.zeros((1, 8, 8), np.uint8)
    hole[:, :5, 4:] = 255
    images.save_png(tmp_path / "hole.png", hole)
    return tmp_path


def common(trained: Path, place: Path, **options: Any) -> Common:
    return Common(source=trained, out=place / "out", quiet=True, **options)


def png(path: Path) -> np.ndarray:
    return read_image(path)


def test_inpainting_writes_a_file_for_each_image_and_seed_and_keeps_the_rest(trained, place):
    how = common(trained, place, seed=3, labels=["3"], sampler="ddpm:steps=6")
    result = editing.inpaint(how, place / "digits", place / "hole.png", num_images=2, jump=2, resamplings=2)
    made = [f"{name}-{seed:06d}.png" for name in range(4) for seed in (3, 4)]
    extra = [".lock", "grid.png", "recipe.json", "trajectory.gif", "trajectory.png"]
    assert sorted(path.name for path in result.out.iterdir()) == sorted([*made, *extra])
    fill = png(place / "hole.png")[0] > 127
    for name in range(4):
        original = png(place / f"digits/{name}.png")
        filled = [png(result.out / f"{name}-{seed:06d}.png") for seed in (3, 4)]
        for image in filled:
            np.testing.assert_array_equal(image[:, ~fill], original[:, ~fill])
        assert (filled[0] != filled[1]).any()
    by_hand = ddpm.editor(trained, labels=[3], sampler="ddpm:steps=6")
    expected = by_hand.inpaint(png(place / "digits/2.png"), fill, [4], jump=2, resamplings=2)
    np.testing.assert_array_equal(png(result.out / "2-000004.png"), expected[0])


def test_the_grid_shows_what_was_given_and_what_came_of_it(trained, place):
    how = common(trained, place)
    out = editing.inpaint(how, place / "digits/1.png", place / "hole.png", num_images=2, jump=1, resamplings=1).out
    given = png(place / "digits/1.png").copy()
    given[:, png(place / "hole.png")[0] > 127] = 128
    row = np.stack([given, *(png(out / f"1-{seed:06d}.png") for seed in (0, 1))])
    np.testing.assert_array_equal(png(out / "grid.png"), images.grid(row, 3))


def test_the_recipe_holds_all_that_decides(trained, place):
    result = editing.img2img(common(trained, place, seed=2), place / "digits/0.png", strength=0.6)
    held = json.loads((result.out / "recipe.json").read_text())
    assert held.pop("seeds") == [2, 3]
    weights = sha256(trained / "checkpoints/step-00000006/ema-0.9.safetensors")
    assert held == result.recipe
    wanted = {
        "edit": "img2img", "weights_sha256": weights, "step": 6, "labels": [-1], "chunk": 1, "strength": 0.6, "resize": "crop",
        "images": [["0.png", sha256(place / "digits/0.png")]], "device": "cpu", "thresholding": "clip",
    }  # fmt: skip
    assert {name: held[name] for name in wanted} == wanted


def test_more_seeds_are_added_and_another_recipe_is_refused(trained, place, tree):
    editing.img2img(common(trained, place), place / "digits/0.png", num_images=2)
    first = tree(place / "out")
    editing.img2img(common(trained, place, seed=2), place / "digits/0.png", num_images=2)
    both = tree(place / "out")
    assert {name: both[name] for name in first} == first
    assert both.keys() - first.keys() == {
        "0-000002.png", "0-000003.png", "grid-000002-000003.png", "trajectory-000002-000003.gif", "trajectory-000002-000003.png",
    }  # fmt: skip
    whole = editing.img2img(common(trained, place, seed=1), place / "digits/0.png", num_images=2)
    assert {name: data for name, data in tree(whole.out).items() if name in both} == both
    before = tree(place / "out")
    for how, strength, image in (({}, 0.4, "0"), ({}, 0.5, "1"), ({"labels": ["1"]}, 0.5, "0")):
        with pytest.raises(DataError, match=r"holds images of another recipe \(\w+ differs\)"):
            editing.img2img(common(trained, place, **how), place / f"digits/{image}.png", strength=strength)
    with pytest.raises(DataError, match="holds images of another recipe"):
        runs.sample(trained, out=place / "out")
    with pytest.raises(DataError, match="is not empty and was not written by `ddpm edit img2img`"):
        editing.img2img(Common(source=trained, out=place / "digits"), place / "digits/0.png")
    assert tree(place / "out") == before


def test_a_photo_is_brought_to_the_models_size_and_its_mask_alike(trained, place):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(place / "photo.png")
    mask = np.zeros((60, 80), np.uint8)
    mask[:30] = 255
    Image.fromarray(mask).save(place / "mask.png")
    for resize in ("crop", "fit", "stretch"):
        pictures = read_pictures(place / "photo.png", (1, 8, 8), resize)
        fill = read_mask(place / "mask.png", pictures, resize)
        upper = {"crop": slice(0, 4), "fit": slice(1, 4), "stretch": slice(0, 4)}[resize]
        expected = np.zeros((8, 8), bool)
        expected[upper] = True
        np.testing.assert_array_equal(fill, expected)
        how = Common(source=trained, out=place / resize, resize=resize, quiet=True)
        out = editing.inpaint(how, place / "photo.png", place / "mask.png", jump=1, resamplings=1).out
        np.testing.assert_array_equal(png(out / "photo-000000.png")[:, ~fill], pictures[0].pixels[:, ~fill])


def test_interpolation_between_images(trained, place):
    ends = [place / "digits/0.png", place / "digits/1.png"]
    result = editing.interpolate(common(trained, place, seed=5), ends, frames=4, level=0.4)
    frames = [png(result.out / f"frame-{k:03d}.png") for k in range(4)]
    np.testing.assert_array_equal(frames[0], ddpm.editor(trained).img2img(png(ends[0]), 0.4, [5])[0])
    row = np.stack([png(ends[0]), *frames, png(ends[1])])
    np.testing.assert_array_equal(png(result.out / "grid.png"), images.grid(row, 6))
    with Image.open(result.out / "interpolation.gif") as gif:
        assert gif.n_frames == 4 + 2


def test_interpolation_between_seeds_ends_in_samples(trained, place):
    how = common(trained, place, labels=["4"], sampler="ddim:steps=3", chunk=4)
    result = editing.interpolate(how, between_seeds=(2, 3), frames=3)
    drawn = runs.sample(
        trained, num_images=2, seed=2, labels=["4"], chunk=4, out=place / "drawn", guidance=result.recipe["guidance"]
    )
    for frame, seed in ((0, 2), (2, 3)):
        np.testing.assert_array_equal(png(result.out / f"frame-{frame:03d}.png"), png(drawn.out / f"{seed:06d}.png"))


def test_inversion_gives_latents_with_their_recipe_and_how_near_it_comes_back(trained, place, capsys):
    result = editing.invert(Common(source=trained, out=place / "out"), place / "digits", steps=(4, 12, 40))
    path = result.out / "latents.safetensors"
    latents = safetensors.numpy.load_file(path)["latents"]
    pixels = np.stack([png(place / f"digits/{k}.png") for k in range(4)])
    by_hand = ddpm.editor(trained, sampler="ddim:steps=40", thresholding="none")
    np.testing.assert_array_equal(by_hand.invert(pixels), latents)
    again = by_hand.reconstruct(latents)
    np.testing.assert_array_equal(np.stack([png(result.out / f"{k}.png") for k in range(4)]), again)
    with safetensors.safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["recipe"]) == result.recipe
        assert json.loads(file.metadata()["images"]) == [f"{k}.png" for k in range(4)]
    rows = list(csv.DictReader((result.out / "psnr.csv").read_text().splitlines()))
    found = {int(row["steps"]): float(row["psnr_db"]) for row in rows}
    assert found == result.found["psnr_db"]
    assert list(found) == [4, 12, 40]
    assert found[4] < found[12] < found[40]
    assert (result.out / "psnr.png").exists()
    assert f"40 steps there and 40 back: PSNR {found[40]:.2f} dB." in capsys.readouterr().out


def test_denoising_finds_the_noise_or_is_told(trained, place, capsys):
    noisy = png(place / "digits/0.png") + 30 * np.random.default_rng(1).standard_normal((1, 8, 8))
    images.save_png(place / "noisy.png", noisy.round().clip(0, 255).astype(np.uint8))
    sigma = estimate_sigma(png(place / "noisy.png"))
    how = Common(source=trained, out=place / "out")
    result = editing.denoise(how, place / "noisy.png", one_step=True)
    assert result.found == {"sigma": {"noisy.png": sigma}}
    assert f"noisy.png: noise of {sigma:.1f} grey levels of 255, estimated." in capsys.readouterr().out
    by_hand = ddpm.editor(trained).denoise(png(place / "noisy.png"), sigma, one_step=True)
    np.testing.assert_array_equal(png(result.out / "noisy-000000.png"), by_hand[0])
    told = editing.denoise(Common(source=trained, out=place / "told", quiet=True), place / "digits", sigma=40.0)
    by_hand = ddpm.editor(trained).denoise(png(place / "digits/3.png"), 40.0)
    np.testing.assert_array_equal(png(told.out / "3-000000.png"), by_hand[0])


MISTAKES = [
    (["inpaint", "no.png", "hole.png"], 3, "no.png: does not exist; give an image file, or a folder of them."),
    (["inpaint", "digits/0.png", "no.png"], 3, "no.png: does not exist; give a mask, an image that is white where"),
    (["inpaint", "digits/0.png", "large.png"], 3, "the mask is 16x8 (height x width) and digits/0.png is 8x8; give a mask of"),
    (["inpaint", "digits/0.png", "white.png"], 3, "the mask is white, so nothing would be kept; for a whole new image use"),
    (["inpaint", "digits/0.png", "black.png"], 3, "the mask is black, so nothing would be filled; paint white what"),
    (["inpaint", "digits/0.png", "hole.png", "--jump", "10"], 2, "a jump of 10 levels needs a sampler of more than 10 steps, not 3"),
    (["img2img", "text.png"], 3, "text.png: cannot be read as an image (is not an image of a known format)."),
    (["img2img", "empty"], 3, "empty: holds no image; files that end in"),
    (["img2img", "twins"], 3, "twins: 2 images are called a; give each a name of its own."),
    (["img2img", "digits/0.png", "--labels", "12"], 2, "12 is no class of this model"),
    (["img2img", "digits/0.png", "--guidance", "2"], 2, "--guidance=2 needs --labels: without a class"),
    (["img2img", "digits/0.png", "--out", "digits"], 3, "was not written by `ddpm edit img2img`"),
    (["img2img", "digits/0.png", "--sampler", "ddim:steps=5000"], 2, "steps=5000 are more than"),
    (["interpolate", "digits/0.png"], 2, "interpolate: give two image files, or --between-seeds A,B."),
    (["interpolate", "digits/0.png", "digits/1.png", "--between-seeds", "1,2"], 2, "give two image files, or"),
    (["interpolate", "digits", "digits/0.png"], 2, "interpolate: give two image files, not folders."),
    (["invert", "digits/0.png", "--sampler", "ddpm:steps=5"], 2, "walks from noise to image only"),
    (["invert", "digits/0.png", "--steps", "5,5000"], 2, "steps=5000 are more than"),
    (["denoise", "digits/0.png", "--num-images", "2"], 2, "sampler 'ddim' draws no noise, so every result would be the same"),
    (["denoise", "digits/0.png", "--sigma", "0.001"], 2, "noise of 0.001 grey levels is not what this model can take away"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "said"), MISTAKES, ids=[" ".join(words) for words, *_ in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_made(trained, place, tree, monkeypatch, capsys, words, code, said):
    monkeypatch.chdir(place)
    for name, shade, shape in (("white", 255, (1, 8, 8)), ("black", 0, (1, 8, 8)), ("large", 0, (1, 16, 8))):
        images.save_png(place / f"{name}.png", np.full(shape, shade, np.uint8))
    (place / "text.png").write_text("no image")
    (place / "empty").mkdir()
    for suffix in ("png", "jpg"):
        images.save_png(place / f"twins/a.{suffix}", np.zeros((1, 8, 8), np.uint8))
    before = tree(place)
    assert main(["edit", words[0], str(trained), "--out=out", *words[1:]]) == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("ddpm edit: ")
    assert said in line
    assert tree(place) == before
    assert not (place / "out").exists()


def test_results_go_to_a_folder_of_the_run_for_every_recipe(trained, place):
    import shutil

    shutil.copytree(trained, place / "run")
    outs = [
        editing.img2img(
            Common(source=place / "run", quiet=True, gif=False), place / "digits/0.png", strength=strength
        ).out
        for strength in (0.4, 0.6)
    ]
    assert len(set(outs)) == 2
    assert {out.parent for out in outs} == {place / "run/edits"}
    assert all(out.name.startswith("img2img-00000006-") for out in outs)
    assert sorted(path.name for path in outs[0].iterdir()) == [".lock", "0-000000.png", "grid.png", "recipe.json"]


def test_guidance_goes_with_a_label(trained, tiny, tmp_path):
    guided = ddpm.editor(trained, labels=[1], guidance=3.0)
    assert guided.labels == (1,)
    assert ddpm.editor(trained).labels == (-1,)
    assert ddpm.editor(trained).predictor is not guided.predictor
    weak = f"autoguidance:model={trained}/checkpoints/step-00000003"
    assert isinstance(ddpm.editor(trained, guidance=weak).predictor, Autoguided)
    with pytest.raises(ConfigError, match=r"--guidance=cfg:weight=2.0,rescale=0.5,.* needs --labels"):
        ddpm.editor(trained, guidance="cfg:rescale=0.5")
    runs.train(tiny({"model.conditioning": "none", "train.steps": 1}), tmp_path / "run")
    assert ddpm.editor(tmp_path / "run").labels == ()
    with pytest.raises(ConfigError, match="trained without classes"):
        ddpm.editor(tmp_path / "run", labels=[1])
