"""What people get wrong, through the front door: the exit code, one line that says what to do, nothing touched."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from ddpm import images
from ddpm.cli import main


@pytest.fixture
def place(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a trained run and all sorts of broken things."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs/good")
    shutil.copytree(trained, tmp_path / "runs/damaged")
    for path in (tmp_path / "runs/damaged/checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-4])
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("no image")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"\x89PNG no more")
    for name, count in (("cats", 3), ("dogs", 0)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(count):
            images.save_png(tmp_path / f"classes/{name}/{k}.png", np.full((1, 8, 8), 40 * k, np.uint8))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "bad.yaml").write_text("train: {stepz: 3}")
    (tmp_path / "tag.yaml").write_text("seed: !!python/object/apply:os.getcwd []")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/mine.png").write_bytes(b"mine")
    return tmp_path


def train(*more: object) -> list[str]:
    return ["train", "digits", "--steps=2", "--model.channels=8", "--model.blocks=1", "--device=cpu", *map(str, more)]


def folder(path: str, *more: str) -> list[str]:
    return ["train", "folder", "--steps=2", "--model.channels=8", "--data.path", path, *more]


def sample(*more: str) -> list[str]:
    return ["sample", "runs/good", "--num-images=2", "--device=cpu", *more]


CASES: list[tuple[str, list[str], int, str]] = [
    ("verb", ["trian", "digits"], 2, "did you mean 'train'?"),
    ("flag", train("--bacth-size=3"), 2, "'--batch-size'"),
    ("field", train("--model.channelz=8"), 2, "'--model.channels'"),
    ("group", train("--models.channels=8"), 2, "'--model.channels'"),
    ("preset", ["train", "digitz"], 2, "did you mean 'digits'?"),
    ("no preset", ["train"], 2, "presets: digits"),
    ("type", train("--lr=fast"), 2, "--lr='fast' is wrong"),
    ("range", train("--lr=-1"), 2, "--lr='-1' is wrong: input should be greater than 0"),
    ("nan", train("--lr=nan"), 2, "--lr='nan' is wrong"),
    ("zero steps", train("--steps=0"), 2, "--steps='0' is wrong"),
    ("huge", train("--batch-size=" + "9" * 30), 2, "--batch-size="),
    ("choice", train("--precision=fp8"), 2, "--precision='fp8' is wrong"),
    ("missing value", train("--lr"), 2, "--lr/--train.lr needs a value"),
    ("config field", ["train", "--config", "bad.yaml"], 2, "train.stepz is not known (did you mean 'steps'?)"),
    ("config tag", ["train", "--config", "tag.yaml"], 2, "is not plain YAML"),
    ("config missing", ["train", "--config", "none.yaml"], 2, "--config none.yaml: cannot be read"),
    ("duration", train("--stop-after=soon"), 2, "is not a duration"),
    ("schedule", train("--diffusion.schedule=linearr"), 2, "did you mean 'linear'?"),
    ("option", train("--diffusion.schedule=linear:steps=5"), 2, "steps"),
    (
        "zero terminal SNR",
        train("--dry-run", "--diffusion.schedule=zero-snr", "--diffusion.objective=eps"),
        2,
        "--diffusion.objective=eps divides by alpha, which is 0 at the last time of schedule 'zero-snr': use v or x0.",
    ),
    ("objective", train("--diffusion.objective=epsilon"), 2, "objective 'epsilon' is not known"),
    ("network", train("--model.network=unett"), 2, "did you mean 'unet'?"),
    ("network module", train("--model.network=no_such.module:Net"), 2, "cannot be imported"),
    ("attention level", train("--model.attention=7"), 2, "--model.attention=7 is no level"),
    ("heads", train("--model.heads=3"), 2, "--model.heads=3 does not divide"),
    ("average", train("--train.ema=1.5"), 2, "decay"),
    ("average name", train("--train.ema=constnt:decay=0.9"), 2, "did you mean 'constant'?"),
    ("equal averages", train("--train.ema=0.9", "--train.ema=warmup:decay=0.9"), 2, "two averages have the same decay"),
    ("nan rule", train("--nan=ignore"), 2, "--nan='ignore' is wrong"),
    ("sampler", train("--sample.sampler=ddmi"), 2, "did you mean 'ddpm'?"),
    ("sampler steps", train("--sample.sampler=ddim:steps=5000"), 2, "more than the schedule's 1000 timesteps"),
    ("guidance", train("--sample.guidance=-2"), 2, "it must be a finite number of at least 0, or a spec"),
    ("sink", train("--logging.sinks=tensorbord"), 2, "did you mean 'tensorboard'?"),
    ("device", train("--device=cuda:99"), 2, "--runtime.device=cuda:99"),
    ("data set", train("--data.dataset=cifar11"), 2, "did you mean 'cifar10'?"),
    ("path for digits", train("--data.path=empty"), 2, "--data.path is not used by the data set 'digits'"),
    ("name escapes", train("--name=../../x"), 2, "cannot name a run"),
    ("name is a path", train("--name=/tmp/x"), 2, "cannot name a run"),
    ("no path", ["train", "folder"], 2, "needs --data.path DIR"),
    ("missing folder", folder("nowhere"), 3, "nowhere"),
    ("empty folder", folder("empty"), 3, "empty"),
    ("no images", folder("texts"), 3, "texts"),
    ("broken images", folder("broken"), 3, "broken"),
    ("class without image", folder("classes"), 3, "dogs"),
    ("a file for a folder", folder("notes.txt"), 3, "notes.txt: is not a folder"),
    ("label file", folder("classes", "--data.labels=none.csv"), 3, "none.csv"),
    ("test split", train("--data.dataset=npz", "--data.path=none.npz"), 3, "none.npz"),
    ("other config", [*train("--run-dir=runs/good")], 2, "--run-dir runs/good: holds a run with model."),
    ("foreign folder", train("--run-dir=samples"), 3, "holds files but no run"),
    ("run dir is a file", train("--run-dir=notes.txt"), 3, "is a file, not a folder"),
    ("run dir in a file", train("--run-dir=notes.txt/run"), 3, "cannot be written to"),
    ("run dir too long", train("--run-dir=" + "x" * 300), 3, "cannot be used (File name too long)"),
    ("read-only", train("--run-dir=/proc/run"), 3, "--run-dir /proc/run: cannot be written to"),
    ("must", train("--run-dir=fresh", "--resume=must"), 4, "--resume must: fresh holds no checkpoint"),
    ("resume nowhere", train("--run-dir=fresh", "--resume=nowhere"), 4, "nowhere: does not exist"),
    (
        "resume misfit",
        train("--run-dir=fresh", "--steps=9", "--resume=runs/good"),
        2,
        "was trained with model.attention=",
    ),
    ("sample nothing", ["sample"], 2, "SOURCE is missing"),
    ("sample nowhere", ["sample", "runs/nowhere"], 4, "runs/nowhere: does not exist"),
    ("sample no run", ["sample", "empty"], 4, "empty: holds no checkpoint"),
    ("sample damaged", ["sample", "runs/damaged"], 4, "none of its checkpoints is whole"),
    ("sample damaged one", ["sample", "runs/damaged/checkpoints/step-00000003"], 4, "model.safetensors: is damaged"),
    ("sample long name", ["sample", "x" * 300], 4, "cannot be read (File name too long)"),
    ("sample sampler", sample("--sampler=ddmi"), 2, "did you mean 'ddpm'?"),
    ("sample option", sample("--sampler=ddim:step=3"), 2, "did you mean 'steps'?"),
    ("sample steps", sample("--sampler=ddim:steps=1001"), 2, "more than the schedule's 1000 timesteps"),
    ("sample label", sample("--labels=10"), 2, "--labels: 10 is no class of this model; its classes are 0 to 9"),
    ("sample label name", sample("--labels=cat"), 2, "'cat' is no class of this model"),
    ("sample labels", sample("--labels=1,,2"), 2, "--labels='1,,2' is wrong"),
    ("sample average", sample("--ema=0.7"), 2, "choose from 0.9, 0.5, none"),
    ("sample none", sample("--num-images=0"), 2, "--num-images: '0' is wrong"),
    ("sample guidance", sample("--guidance=-1"), 2, "--guidance='-1' is wrong"),
    ("sample guidance option", sample("--guidance=cfg:wieght=2"), 2, "did you mean 'weight'?"),
    (
        "sample guidance file",
        sample("--guidance=classifier:model=c.safetensors"),
        3,
        "c.safetensors is no file; make one",
    ),
    ("sample guidance run", sample("--guidance=autoguidance:model=nowhere"), 4, "nowhere: does not exist"),
    ("guidance without a model", train("--sample.guidance=autoguidance"), 2, "'autoguidance' needs model=..."),
    ("sample seeds", sample(f"--seed={2**63 - 1}"), 2, "--seed"),
    ("sample into others", sample("--out=samples"), 3, "was not written by `ddpm sample`"),
    ("sample into a file", sample("--out=notes.txt"), 3, "notes.txt"),
    ("sample read-only", sample("--out=/proc/out"), 3, "/proc/out"),
    ("sample long out", sample("--out=" + "x" * 300), 3, "File name too long"),
    ("info nowhere", ["info", "nowhere"], 4, "nowhere: does not exist"),
    ("info damaged", ["info", "runs/damaged"], 4, "none of its checkpoints is whole"),
    ("data unknown", ["data", "info", "digitz"], 2, "did you mean 'digits'?"),
    ("data sheet", ["data", "info", "digits", "--out=notes.txt/sheet.png"], 3, "notes.txt"),
    ("demo in use", ["demo", "--run-dir=samples"], 3, "holds files but no run"),
]


@pytest.mark.parametrize(("words", "code", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_line_the_right_code_and_nothing_touched(place, tree, capsys, words, code, said):
    before, folders = tree(place), {path for path in place.rglob("*") if path.is_dir()}
    assert main(words) == code
    err = capsys.readouterr().err
    *warnings, line = err.splitlines()
    assert all(warning.startswith("warning: ") for warning in warnings)
    assert line.startswith("ddpm")
    assert said in line
    assert "Traceback" not in err and "a bug" not in err
    assert tree(place) == before
    assert {path for path in place.rglob("*") if path.is_dir()} - folders <= {place / "runs"}


def test_unconditional_models_refuse_guidance_and_labels(tiny, tmp_path, capsys):
    from ddpm import runs

    runs.train(tiny({"model.conditioning": "none", "train.steps": 1}), tmp_path / "run")
    for words in (["--guidance=2"], ["--labels=1"]):
        assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *words]) == 2
        assert "trained without classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_folder_whose_config_was_spoilt_is_named(place, words, capsys):
    (place / "runs/good/config.yaml").write_text("train: {steps: many}")
    assert main(["train", "digits", *words(), "--run-dir=runs/good"]) == 2
    assert "runs/good/config.yaml: train.steps='many' is wrong" in capsys.readouterr().err


def test_a_newer_checkpoint_asks_for_an_upgrade(place, capsys):
    path = place / "runs/good/checkpoints/step-00000006/MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}, indent=1))
    assert main(["sample", str(path.parent), "--out=out"]) == 4
    assert "was written by a newer ddpm (format 2, this one reads 1); upgrade ddpm." in capsys.readouterr().err


def test_the_config_of_a_refused_run_is_still_valid_yaml(place):
    assert yaml.safe_load((place / "runs/good/config.yaml").read_text())["train"]["steps"] == 6
