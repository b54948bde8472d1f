"""`ddpm sample`: image k is seed k's, whoever draws it; every file says the same; no folder mixes two recipes."""

import csv
import errno
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm import checkpoint, images, runs
from ddpm.errors import CheckpointError, ConfigError, DataError
from ddpm.files import sha256
from ddpm.images import read_image
from ddpm.runs import drawing

S_0_3 = "-000000-000003"


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """Twenty-three images from seed 5 on, and all other files."""
    return runs.sample(trained, num_images=23, seed=5, out=tmp_path_factory.mktemp("drawn") / "out", npz=True)


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


def stack(folder: Path, seeds) -> np.ndarray:
    return np.stack([read_image(folder / f"{seed:06d}.png") for seed in seeds])


def test_files_are_named_by_seed(drawn):
    names = [f"{seed:06d}.png" for seed in range(5, 28)]
    extra = [".lock", "grid.png", "images.csv", "recipe.json", "samples.npz", "trajectory.gif", "trajectory.png"]
    assert sorted(path.name for path in drawn.out.iterdir()) == sorted([*names, *extra])
    assert stack(drawn.out, range(5, 28)).shape == (23, 1, 8, 8)
    assert drawn.num_images == 23


def test_the_table_lists_files_seeds_and_classes_in_turn(drawn):
    rows = list(csv.DictReader((drawn.out / "images.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == [f"{seed:06d}.png" for seed in range(5, 28)]
    assert [int(row["seed"]) for row in rows] == list(range(5, 28))
    assert [int(row["label"]) for row in rows] == [seed % 10 for seed in range(5, 28)]
    assert [row["class"] for row in rows] == [row["label"] for row in rows]


def test_the_archive_equals_the_pictures(drawn):
    with np.load(drawn.out / "samples.npz", allow_pickle=False) as archive:
        assert archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], stack(drawn.out, range(5, 28)).transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(archive["arr_1"], np.arange(5, 28) % 10)
        np.testing.assert_array_equal(archive["seeds"], np.arange(5, 28))


def test_the_grid_and_the_way_there(drawn):
    grid = read_image(drawn.out / "grid.png")
    np.testing.assert_array_equal(grid, images.grid(stack(drawn.out, range(5, 28)), 10))
    with Image.open(drawn.out / "trajectory.gif") as gif:
        assert gif.n_frames == 3


def test_the_grid_of_the_way_ends_in_the_images_themselves(trained, tmp_path):
    out = runs.sample(trained, num_images=16, sampler="ddim:steps=12", out=tmp_path / "out").out
    scale, padding, columns = 4, 2, 10
    sheet, side = read_image(out / "trajectory.png"), 8 * scale + padding
    assert sheet.shape == (1, 2 * 8 * side + padding, columns * side + padding)
    last = sheet[:, padding:, -side:].reshape(1, 16, side, side)[:, :, :-padding:scale, :-padding:scale]
    np.testing.assert_array_equal(last[0, 0::2], stack(out, range(8))[:, 0])  # x after the last step
    np.testing.assert_array_equal(last[0, 1::2], stack(out, range(8))[:, 0])  # is the x0 predicted in it


def test_the_recipe_holds_all_that_decides(drawn, trained):
    newest = trained / "checkpoints/step-00000006"
    held = json.loads((drawn.out / "recipe.json").read_text())
    assert held.pop("seeds") == [5, 28]
    assert held == drawn.recipe == {
        "weights_sha256": sha256(newest / "ema-0.9.safetensors"),
        "weights": "ema-0.9",
        "step": 6,
        "sampler": "ddim:steps=3,grid=trailing,thresholding=model,eta=0.0,eps=derived,analytic=false",
        "thresholding": "clip",
        "guidance": 1.0,
        "labels": [],
        "chunk": 16,
        "precision": drawn.recipe["precision"],
        "device": "cpu",
    }  # fmt: skip


def test_an_image_depends_on_its_seed_alone(drawn, trained, tmp_path):
    out = runs.sample(trained, num_images=3, seed=14, out=tmp_path / "out", gif=False).out
    assert pngs(out) == {name: data for name, data in pngs(drawn.out).items() if name in pngs(out)}
    assert not list(out.glob("trajectory*"))


def test_more_seeds_into_the_same_folder_are_added(trained, tmp_path):
    for seed in (4, 0):
        runs.sample(trained, num_images=4, seed=seed, out=tmp_path / "out", npz=True)
    assert list(pngs(tmp_path / "out")) == [f"{seed:06d}.png" for seed in range(8)]
    together = ("grid{}.png", "trajectory{}.gif", "trajectory{}.png", "samples{}.npz")
    assert all((tmp_path / "out" / name.format(suffix)).exists() for name in together for suffix in ("", S_0_3))
    for suffix, seeds in (("", range(4, 8)), (S_0_3, range(4))):
        grid = images.grid(stack(tmp_path / "out", seeds), 10)
        np.testing.assert_array_equal(read_image(tmp_path / f"out/grid{suffix}.png"), grid)
        with np.load(tmp_path / f"out/samples{suffix}.npz") as archive:
            assert archive["seeds"].tolist() == list(seeds)
    before = sorted((tmp_path / "out").iterdir())
    runs.sample(trained, num_images=4, seed=4, out=tmp_path / "out", npz=True)
    assert sorted((tmp_path / "out").iterdir()) == before
    rows = list(csv.DictReader((tmp_path / "out/images.csv").read_text().splitlines()))
    assert [int(row["seed"]) for row in rows] == list(range(8))


@pytest.mark.parametrize("how", [{"guidance": 2.0}, {"sampler": "ddpm:steps=3"}, {"labels": ["3"]}, {"ema": "0.5"}])
def test_another_recipe_is_refused_and_nothing_is_touched(drawn, trained, tree, how):
    before = tree(drawn.out)
    with pytest.raises(DataError, match=r"holds images of another recipe \(\w+ differs\)"):
        runs.sample(trained, num_images=1, out=drawn.out, **how)
    assert tree(drawn.out) == before


@pytest.mark.parametrize("recipe", ["[]", '"text"', "5"])
def test_a_folder_of_somebody_else_is_refused(trained, tmp_path, tree, recipe):
    (tmp_path / "recipe.json").write_text(recipe)
    (tmp_path / "000000.png").write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"choose another folder\.$"):
        runs.sample(trained, num_images=1, out=tmp_path)
    assert tree(tmp_path) == before


def test_every_recipe_has_a_folder_of_its_own(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    hows = ({}, {"guidance": 2.0}, {"labels": ["3", "7"]}, {"ema": "none"}, {"sampler": "ddim:steps=2"})
    folders = [runs.sample(tmp_path / "run", num_images=1, gif=False, **how).out for how in hows]
    assert len(set(folders)) == len(hows)
    assert {folder.parent for folder in folders} == {tmp_path / "run/samples"}
    assert all(folder.name.startswith("ddim-00000006-") for folder in folders)
    assert runs.sample(tmp_path / "run", num_images=2, gif=False).out == folders[0]


def test_labels_by_name_and_number_and_none(tiny, tmp_path):
    runs.train(tiny({"data.dataset": "shapes:num_images=60,size=8", "train.steps": 1}), tmp_path / "run")
    named = runs.sample(tmp_path / "run", num_images=4, labels=["red disc", "4", "-1"], gif=False, npz=True).out
    rows = list(csv.DictReader((named / "images.csv").read_text().splitlines()))
    assert [(row["label"], row["class"]) for row in rows] == [
        ("0", "red disc"), ("4", "green square"), ("-1", ""), ("0", "red disc"),
    ]  # fmt: skip
    numbered = runs.sample(tmp_path / "run", num_images=4, labels=["0", "4", "-1"], gif=False).out
    assert numbered == named
    with pytest.raises(ConfigError, match="'pink disc' is no class of this model; its classes: red disc, "):
        runs.sample(tmp_path / "run", labels=["pink disc"], out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_numbers_that_are_names_of_other_classes_are_refused_unless_explicit():
    classes = ["7", "1", "0", "-1"]
    assert [drawing.class_index(k, classes) for k in (0, np.int64(2), "7", "1", "#2", "#0", "#-1", "3")] == [
        0, 2, 0, 1, 2, 0, -1, 3,
    ]  # fmt: skip
    for text, wanted in (("0", "'#2' for the class of that name, '#0'"), ("-1", "'#3' for the class of that name")):
        with pytest.raises(ConfigError, match=wanted):
            drawing.class_index(text, classes)
    for wrong in (True, 1.0, None):
        with pytest.raises(ConfigError, match="is no class; give numbers or names"):
            drawing.class_index(wrong, classes)


@pytest.mark.parametrize("labels", [["3", 7], (3, 7), np.array([3, 7]), torch.tensor([3, 7]), np.array(["3", "7"])])
def test_labels_are_any_list(trained, labels):
    expected = ddpm.sample(trained, range(4), labels=[3, 7])
    np.testing.assert_array_equal(ddpm.sample(trained, range(4), labels=labels), expected)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"labels": "37"}, r"labels='37' is wrong: give a list of classes, such as labels=\['37'\]\."),
        ({"labels": 3}, "labels=3 is wrong: give a list"),
        ({"labels": [10]}, "10 is no class of this model"),
        ({"seeds": []}, "seeds: is empty"),
        ({"seeds": np.array([1.0])}, "whole numbers from 0"),
        ({"seeds": [2**62]}, "whole numbers from 0"),
        ({"seeds": [-1]}, "-1 is negative"),
        ({"chunk": 0}, "--chunk=0"),
        ({"guidance": float("nan")}, "--guidance=nan"),
        ({"guidance": -1}, "--guidance=-1"),
        ({"precision": "fp8"}, "precision='fp8' is wrong"),
        ({"device": "gpu"}, "device='gpu' is wrong"),
    ],
)
def test_python_tells_mistakes_in_a_sentence(trained, how, said):
    with pytest.raises(ConfigError, match=said) as caught:
        ddpm.sample(trained, **how)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_averages_by_name_raw_weights_and_unknown_ones(trained, tmp_path):
    drawn = {name: runs.sample(trained, num_images=1, ema=name, out=tmp_path / str(name), gif=False) for name in
             (None, "0.9", "ema-0.9", "0.5", "none")}  # fmt: skip
    assert [result.recipe["weights"] for result in drawn.values()] == ["ema-0.9"] * 3 + ["ema-0.5", "model"]
    assert pngs(tmp_path / "None") == pngs(tmp_path / "0.9") != pngs(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"--ema 0\.7: .* choose from 0\.9, 0\.5, none\.$"):
        runs.sample(trained, ema="0.7", out=tmp_path / "0.7")
    assert not (tmp_path / "0.7").exists()


def test_python_draws_the_same_images(drawn, trained):
    model = ddpm.load(trained)
    np.testing.assert_array_equal(ddpm.sample(model, range(5, 28)), stack(drawn.out, range(5, 28)))
    np.testing.assert_array_equal(ddpm.sample(trained, [21, 6, 21]), stack(drawn.out, [21, 6, 21]))


def test_two_processes_write_the_same_files(zygote, drawn, trained, tree, tmp_path):
    given = ("sample", trained, "--num-images=23", "--seed=5", "--chunk=4", "--npz", "--out=out")
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        assert zygote.run(*given, cwd=tmp_path / str(processes), processes=processes).wait() == 0
    one, two = tree(tmp_path / "1/out"), tree(tmp_path / "2/out")
    assert len(one) == 23 + 7
    for name in set(one) | set(two) - {"samples.npz"}:
        assert one.get(name) == two.get(name), name
    with np.load(tmp_path / "1/out/samples.npz") as a, np.load(tmp_path / "2/out/samples.npz") as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


def test_without_classes_there_is_no_table_and_no_guidance(tiny, tmp_path):
    runs.train(tiny({"model.conditioning": "none", "train.steps": 1}), tmp_path / "run")
    out = runs.sample(tmp_path / "run", num_images=2, png=False, npz=True).out
    names = [".lock", "grid.png", "recipe.json", "samples.npz", "trajectory.gif", "trajectory.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with np.load(out / "samples.npz") as archive:
        assert archive.files == ["arr_0", "seeds"]
    for how in ({"guidance": 2.0}, {"labels": ["1"]}):
        with pytest.raises(ConfigError, match="trained without classes"):
            runs.sample(tmp_path / "run", out=tmp_path / "none", **how)


def test_memory_does_not_grow_with_the_number_of_images(tiny, tmp_path):
    changes = {
        "data.dataset": "shapes:num_images=60,size=16", "model.channel_mults": (1,), "model.conditioning": "none",
        "train.steps": 1, "train.ema": (),
    }  # fmt: skip
    runs.train(tiny(changes), tmp_path / "run")
    how = {"sampler": "ddim:steps=1", "chunk": 50, "png": False, "gif": False}
    peaks = []
    for count in (100, 1000):
        tracemalloc.start()
        out = runs.sample(tmp_path / "run", num_images=count, **how).out
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    more_bytes = 900 * 3 * 16 * 16
    assert peaks[1] - peaks[0] < more_bytes / 4
    runs.sample(tmp_path / "run", num_images=1000, npz=True, **how)
    with np.load(out / "samples-000000-000999.npz") as archive:
        assert archive["arr_0"].shape == (1000, 16, 16, 3)
        np.testing.assert_array_equal(
            archive["arr_0"][[0, 777]],
            ddpm.sample(tmp_path / "run", [0, 777], sampler="ddim:steps=1", chunk=50).transpose(0, 2, 3, 1),
        )


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_drawn_from(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000006/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert runs.sample(tmp_path / "run", num_images=1, gif=False).recipe["step"] == 3
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1
    assert str(path) in err


def test_a_full_disk_is_one_sentence_and_leaves_no_scratch_file(zygote, trained, tmp_path):
    for limit, wanted in ((100, 3), (2000, 3)):
        done = zygote.run("sample", trained, f"--out=out{limit}", "--num-images=64", cwd=tmp_path, file_bytes=limit)
        assert done.wait() == wanted
        assert len(done.errors) == 1
        assert "File too large" in done.errors[0]
        assert not list(tmp_path.rglob("*.tmp-*"))
    assert not list(tmp_path.rglob(".pool*"))


def test_the_space_of_images_is_reserved_before_any_is_drawn(trained, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        assert length == 64 * 8 * 8
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drawing.os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"^cannot write .*: No space left on device; free some space .*\.$"):
        runs.sample(trained, num_images=64, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "recipe.json"]


def test_commands_may_share_a_folder(zygote, trained, tmp_path):
    given = ("sample", trained, "--num-images=16", "--chunk=4", "--npz", "--out=out")
    both = [zygote.run(*given, f"--seed={seed}", cwd=tmp_path) for seed in (0, 16)]
    assert [command.wait() for command in both] == [0, 0]
    rows = list(csv.DictReader((tmp_path / "out/images.csv").read_text().splitlines()))
    assert [int(row["seed"]) for row in rows] == list(range(32))
    found = []
    for path in (tmp_path / "out").glob("samples*.npz"):
        with np.load(path) as archive:
            pictures = stack(tmp_path / "out", archive["seeds"]).transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(archive["arr_0"], pictures)
            found += archive["seeds"].tolist()
    assert sorted(found) == list(range(32))
    assert not list(tmp_path.rglob(".pool*"))


def test_what_is_refused_is_refused_before_the_folder_is_made(trained, tmp_path):
    for error, how in (
        (ConfigError, {"sampler": "ddim:steps=5000"}),
        (ConfigError, {"sampler": "ddmi"}),
        (ConfigError, {"labels": ["10"]}),
        (ConfigError, {"thresholding": "clap"}),
        (ConfigError, {"device": "cuda:7"}),
        (ConfigError, {"device": "gpu"}),
        (ConfigError, {"chunk": 0}),
        (ConfigError, {"num_images": 0}),
        (ConfigError, {"seed": -1}),
        (ConfigError, {"seed": 2**62}),
        (ConfigError, {"labels": "3"}),
        (CheckpointError, {"source": tmp_path / "nowhere"}),
    ):
        with pytest.raises(error):
            runs.sample(**{"source": trained, "out": tmp_path / "out", **how})
        assert list(tmp_path.iterdir()) == []


def test_a_named_checkpoint_is_drawn_from(trained, tmp_path):
    three = trained / "checkpoints/step-00000003"
    assert runs.sample(three, num_images=1, out=tmp_path, gif=False).recipe["step"] == 3
    assert checkpoint.load(three).step == 3
