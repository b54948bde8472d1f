"""A run folder: what it holds, who may use it, and what happens when the disk is full or numbers break."""

import json
import math
import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from ddpm import checkpoint, cli, files, images, runs
from ddpm.config import build, read_yaml, to_yaml
from ddpm.errors import CheckpointError, ConfigError, DataError, DivergedError
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.rundir import RunDir, read_jsonl
from ddpm.runs import training
from ddpm.runtime import resolve
from ddpm.training.loggers import SinkGroup


def events(run: Path) -> list[str]:
    return [record["event"] for record in read_jsonl(run / "events.jsonl")]


def test_the_folder_is_as_documented(trained, tiny):
    assert sorted(p.name for p in trained.iterdir()) == [
        "checkpoints", "config.yaml", "env.json", "events.jsonl", "lock", "metrics.jsonl", "samples",
    ]  # fmt: skip
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    settings = tiny({"train.ema": ("0.9", "warmup:decay=0.5")})
    assert build(read_yaml(trained / "config.yaml")) == settings
    assert (trained / "config.yaml").read_text() == to_yaml(settings)
    assert (trained / "lock").read_bytes() == b""


def test_events_tell_the_story(trained, tiny):
    told = read_jsonl(trained / "events.jsonl")
    assert [record["event"] for record in told] == ["started", "saved", "saved", "finished"]
    assert [record.get("step") for record in told[1:]] == [3, 6, 6]
    assert told[1]["path"] == "step-00000003"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["time"]) for record in told)
    assert told[0]["environment"] == json.loads((trained / "env.json").read_text())


def test_metrics_lines(trained):
    records = read_jsonl(trained / "metrics.jsonl")
    assert [(record["step"], record["images"]) for record in records] == [(2, 16), (4, 32), (6, 48)]
    assert [record["lr"] for record in records] == [5e-4, 1e-3, 1e-3]
    for record in records:
        assert set(record) == {
            "step", "images", "loss", "grad_norm", "lr", "images_per_s", "memory_bytes", "seconds",
        }  # fmt: skip
        assert all(math.isfinite(value) and value > 0 for value in record.values())


def test_the_environment_has_no_secrets(tiny, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t-value")
    runs.train(tiny({"train.steps": 1}), tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes(), path
    facts = json.loads((tmp_path / "run/env.json").read_text())
    assert facts["pid"] == os.getpid()
    assert facts["threads"] == 1
    assert set(facts["versions"]) >= {"torch", "numpy", "safetensors"}


def test_the_same_call_again_is_done_and_changes_nothing(trained, tiny, tree, capsys):
    before = tree(trained)
    result = runs.train(tiny({"train.ema": ("0.9", "warmup:decay=0.5")}), trained)
    assert result == runs.TrainResult(trained, 6, stopped=False)
    assert "is at step 6 already" in capsys.readouterr().out
    assert tree(trained) == before


def test_config_yaml_makes_the_same_run_anew(zygote, trained, lines, tmp_path):
    done = zygote.run("train", "--config", trained / "config.yaml", "--run-dir=again", cwd=tmp_path)
    assert done.wait() == 0, done.errors
    assert lines(tmp_path / "again") == lines(trained)
    name = "checkpoints/step-00000006/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_a_dry_run_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = {"variance": "learned-range", "criterion": "hybrid", "weighting": "min-snr", "times": "stratified"}
    settings = tiny({f"diffusion.{field}": spec for field, spec in parts.items()})
    assert runs.train(settings, Path("run"), dry_run=True).step == 0
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert build(yaml.safe_load(out[: out.index("\nplan\n")])) == settings
    assert all(f"{field}: {spec}" in out for field, spec in parts.items())
    for word in ("parameters", "FLOP an image forward", "activations about", "a step"):
        assert word in out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.dropout": 0.3}, "model.dropout=0.0, not 0.3"),
        ({"seed": 5}, "seed=0, not 5"),
        ({"train.lr": 0.5, "train.batch_size": 4}, "and 1 more field"),
        ({"train.ema": ("0.9",)}, "train.ema="),
        ({"diffusion.schedule": "linear"}, "diffusion.schedule=cosine, not linear"),
        ({"data.flip": True}, "data.flip=False, not True"),
    ],
)
def test_another_recipe_is_refused_and_nothing_is_touched(trained, tiny, tree, changes, named):
    before = tree(trained)
    with pytest.raises(ConfigError) as caught:
        runs.train(tiny({"train.ema": ("0.9", "warmup:decay=0.5"), "train.steps": 9, **changes}), trained)
    assert named in str(caught.value)
    assert str(trained) in str(caught.value)
    assert tree(trained) == before


def test_more_steps_are_refused_where_the_rate_falls_towards_the_last(tiny, tmp_path):
    falling = {"train.lr_schedule": "cosine", "train.steps": 2}
    runs.train(tiny(falling), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.steps=2, not 4"):
        runs.train(tiny({**falling, "train.steps": 4}), tmp_path / "run")


def test_free_fields_may_change(tiny, tmp_path):
    runs.train(tiny({"train.steps": 2}), tmp_path / "run")
    changes = {
        "train.steps": 4, "train.log_every": 1, "train.checkpoint_every": 1, "train.keep_last": 5, "train.nan": "skip:3",
        "train.keep_every": 2, "train.preview_every": 4, "train.preview_images": 3, "train.micro_batch": 3,
        "data.workers": 1, "sample.sampler": "ddim:steps=2", "sample.guidance": 2.0, "logging.project": "else",
    }  # fmt: skip
    assert runs.train(tiny(changes), tmp_path / "run").step == 4
    assert build(read_yaml(tmp_path / "run/config.yaml")) == tiny(changes)
    assert [record["step"] for record in read_jsonl(tmp_path / "run/metrics.jsonl")] == [2, 3, 4]


def test_resume_never_and_must(trained, tiny, tmp_path):
    settings = tiny({"train.ema": ("0.9", "warmup:decay=0.5"), "train.steps": 9})
    with pytest.raises(DataError, match=r"--resume never: .* holds checkpoints"):
        runs.train(settings, trained, resume="never")
    with pytest.raises(CheckpointError, match=r"--resume must: .* holds no checkpoint"):
        runs.train(settings, tmp_path / "fresh", resume="must")
    assert not (tmp_path / "fresh").exists()
    assert runs.train(tiny({"train.steps": 1}), tmp_path / "fresh", resume="never").step == 1
    assert runs.train(tiny({"train.steps": 2}), tmp_path / "fresh", resume="must").step == 2


def test_resume_path_starts_a_new_run_from_anothers_checkpoint(trained, tiny, tree, lines, tmp_path):
    settings, before = tiny({"train.ema": ("0.9", "warmup:decay=0.5"), "train.steps": 8}), tree(trained)
    at_three = trained / "checkpoints/step-00000003"
    assert runs.train(settings, tmp_path / "new", resume=str(at_three)).step == 8
    assert tree(trained) == before
    assert events(tmp_path / "new") == ["resumed", "saved", "saved", "finished"]
    assert lines(tmp_path / "new")[:2] == lines(trained)[1:]
    six = "checkpoints/step-00000006/model.safetensors"
    assert (tmp_path / "new" / six).read_bytes() == (trained / six).read_bytes()
    assert runs.train(settings, tmp_path / "newest", resume=str(trained)).step == 8
    eight = "checkpoints/step-00000008/optimizer.safetensors"
    assert (tmp_path / "newest" / eight).read_bytes() == (tmp_path / "new" / eight).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.channels": 4}, "was trained with model.channels=8, not 4"),
        ({"train.ema": ("0.7",)}, "no moving average 0.7"),
        ({"diffusion.objective": "eps"}, "was trained with diffusion.objective=v, not eps"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_no_folder_behind(trained, tiny, tmp_path, changes, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        runs.train(tiny({"train.steps": 9, **changes}), tmp_path / "new", resume=str(trained))
    assert list(tmp_path.iterdir()) == []


def test_other_images_are_refused(tiny, tmp_path, digits):
    np.savez(tmp_path / "images.npz", arr_0=digits.images[:20], arr_1=digits.labels[:20])
    changes = {"data.dataset": "npz", "data.path": str(tmp_path / "images.npz"), "train.steps": 1}
    runs.train(tiny(changes), tmp_path / "run")
    changed = digits.images[:20].copy()
    changed[3, 0, 0, 0] ^= 1
    np.savez(tmp_path / "images.npz", arr_0=changed, arr_1=digits.labels[:20])
    with pytest.raises(DataError, match="was trained on other images than 'npz' holds now"):
        runs.train(tiny({**changes, "train.steps": 2}), tmp_path / "run")


def test_a_failed_start_leaves_nothing_and_does_not_spoil_the_name(tiny, tmp_path):
    for changes, how in (({"train.ema": ("0.9", "0.9")}, {}), ({}, {"resume": "must"}), ({}, {"resume": "nowhere"})):
        with pytest.raises((ConfigError, CheckpointError)):
            runs.train(tiny(changes), tmp_path / "run", **how)
        assert list(tmp_path.iterdir()) == []


def test_a_start_that_was_killed_before_it_began_does_not_spoil_the_name(tiny, tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    (run.path / "lock").write_text("{}")
    (run.path / ".config.tmp-1-abcdef01.yaml").write_text("half")
    assert runs.train(tiny({"train.steps": 1}), run.path).step == 1
    assert not list(run.path.glob(".*.tmp-*"))


def test_a_second_process_is_refused_with_the_first_named(zygote, words, wait_for, tmp_path):
    first = zygote.start("train", "digits", *words(), "--run-dir=run", cwd=tmp_path, hang_at=2)
    wait_for(lambda: (tmp_path / "run/lock").exists() and (tmp_path / "run/config.yaml").exists())
    second = zygote.run("train", "digits", *words(), "--run-dir=run", cwd=tmp_path)
    assert second.wait() == 3
    assert len(second.errors) == 1
    assert f"is held by process {first.pid} on " in second.errors[0]
    first.kill()
    first.wait()
    assert zygote.run("train", "digits", *words(), "--run-dir=run", cwd=tmp_path).wait() == 0


def test_a_torn_metrics_line_and_those_after_the_checkpoint_are_dropped(tiny, trained, lines, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 0.')
    runs.train(tiny({"train.ema": ("0.9", "warmup:decay=0.5")}), run)
    assert lines(run) == lines(trained)


def test_a_full_disk_is_a_warning_until_the_last_save(zygote, words, tree, tmp_path):
    given = ("train", "digits", *words(), "--run-dir=run")
    done = zygote.run(*given, cwd=tmp_path, file_bytes=50_000)
    assert done.wait() == 3
    assert [line.startswith("warning: ") for line in done.errors] == [True, True, False]
    assert "checkpoint of step 3 not saved" in done.errors[0]
    assert done.errors[0].endswith("Training goes on.")
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert [record["step"] for record in read_jsonl(tmp_path / "run/metrics.jsonl")] == [2, 4, 6]
    assert zygote.run(*given, cwd=tmp_path).wait() == 0


def test_a_later_save_works_once_there_is_room(tiny, tmp_path, monkeypatch, capsys):
    room = iter([0, 1 << 40])
    monkeypatch.setattr(files, "free_bytes", lambda path: next(room))
    assert runs.train(tiny(), tmp_path / "run").step == 6
    assert "checkpoint of step 3 not saved: " in capsys.readouterr().err
    assert [path.name for path in checkpoint.listing(tmp_path / "run/checkpoints")] == ["step-00000006"]
    assert events(tmp_path / "run") == ["started", "warned", "saved", "finished"]


def test_a_disk_without_room_for_a_line_does_not_end_training(tiny, tmp_path, monkeypatch, capsys):
    real, full = files.append_line, iter([False, True, True, True])

    def append(path: Path, text: str) -> None:
        if next(full, False):
            raise DataError(f"cannot write {path}: No space left on device; free some space.")
        real(path, text)

    monkeypatch.setattr(files, "append_line", append)
    assert runs.train(tiny(), tmp_path / "run").step == 6
    assert "metrics.jsonl: No space left on device; free some space. Training goes on." in capsys.readouterr().err
    assert [record["step"] for record in read_jsonl(tmp_path / "run/metrics.jsonl")][-1] == 6
    assert len(checkpoint.listing(tmp_path / "run/checkpoints")) >= 1


class Poisoned:
    """GaussianDiffusion.forward that gives NaN for one place of the batch at some steps."""

    def __init__(self, steps: tuple[int, ...], place: int) -> None:
        self.steps, self.place, self.real = steps, place, GaussianDiffusion.forward

    def __get__(self, model, owner):
        def forward(x0, labels, stream):
            loss = self.real(model, x0, labels, stream)
            bad = (stream.ids == self.place) & (stream.step in self.steps)
            return loss.masked_fill(bad, math.nan)

        return forward


def test_nan_stops_before_the_update_and_saves(tiny, trained, tmp_path, monkeypatch):
    settings = tiny({"train.ema": ("0.9", "warmup:decay=0.5")})
    with monkeypatch.context() as patch:
        patch.setattr(GaussianDiffusion, "forward", Poisoned((3,), place=5))
        with pytest.raises(DivergedError, match=r"^step 4: loss nan, .*\(images \d+\)") as caught:
            runs.train(settings, tmp_path / "run")
    assert [path.name for path in checkpoint.listing(tmp_path / "run/checkpoints")] == ["step-00000003"]
    name = "checkpoints/step-00000003/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()
    index = int(re.search(r"images (\d+)", str(caught.value))[1])
    data = runs.training.load_dataset(settings.data)
    assert index == int(training.Loader(data, 8, 0).batch(3).indices[5])
    assert runs.train(settings, tmp_path / "run").step == 6
    name = "checkpoints/step-00000006/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


def test_skipped_steps_are_counted_over_a_resume(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GaussianDiffusion, "forward", Poisoned((1, 4, 6), place=0))
    settings = {"train.nan": "skip:2", "train.log_every": 1}
    runs.train(tiny({**settings, "train.steps": 3}), tmp_path / "run")
    assert "step left out (1 of 2 allowed)." in capsys.readouterr().err
    with pytest.raises(DivergedError, match="step 7"):
        runs.train(tiny({**settings, "train.steps": 9}), tmp_path / "run")
    assert "step left out (2 of 2 allowed)." in capsys.readouterr().err
    assert checkpoint.latest(tmp_path / "run/checkpoints", pytest.fail).state["skipped"] == 2
    runs.train(tiny({**settings, "train.nan": "skip:3", "train.steps": 9}), tmp_path / "run")
    found = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [record.get("skipped", 0) for record in found] == [0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [record["step"] for record in found if "loss" not in record] == [2, 5, 7]
    assert all(math.isfinite(value) for record in found for value in record.values())


def test_previews_change_nothing_and_come_when_due(tiny, trained, tmp_path):
    changes = {"train.ema": ("0.9", "warmup:decay=0.5"), "train.preview_every": 4, "train.preview_images": 4}
    runs.train(tiny(changes), tmp_path / "run")
    shown = sorted((tmp_path / "run/samples").iterdir())
    assert [path.name for path in shown] == ["step-00000004.png", "step-00000006.png"]
    assert images.read_image(shown[0]).shape == (1, 70, 70)
    for name in ("model", "optimizer", "ema-0.9"):
        path = f"checkpoints/step-00000006/{name}.safetensors"
        assert (tmp_path / "run" / path).read_bytes() == (trained / path).read_bytes()


def test_precision_and_conditioning_that_were_left_open_are_resolved_once(tiny, tmp_path, monkeypatch, capsys):
    for shown, units in (("bf16", True), ("float32", False)):
        monkeypatch.setattr(training.runtime, "has_bf16_units", lambda device, units=units: units)
        changes = {"runtime.precision": "auto", "model.conditioning": "auto", "train.steps": 1}
        runs.train(tiny(changes), tmp_path / shown)
        assert f"{shown} on cpu" in capsys.readouterr().out
        found = build(read_yaml(tmp_path / shown / "config.yaml"))
        assert (found.runtime.precision, found.model.conditioning) == (shown, "global")
    runs.train(tiny({**changes, "train.steps": 2}), tmp_path / "bf16")
    assert build(read_yaml(tmp_path / "bf16/config.yaml")).runtime.precision == "bf16"


def test_left_out_images_are_listed(tiny, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for k in range(4):
        images.save_png(tmp_path / f"photos/{k}.png", np.full((1, 8, 8), 60 * k, np.uint8))
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    changes = {"data.dataset": "folder", "data.path": str(tmp_path / "photos"), "train.steps": 1, "train.batch_size": 2}
    runs.train(tiny({**changes, "data.split": "all", "model.conditioning": "auto"}), tmp_path / "run")
    assert "1 of the images left out, the first: " in capsys.readouterr().err
    assert "broken.png," in (tmp_path / "run/skipped.csv").read_text()
    assert build(read_yaml(tmp_path / "run/config.yaml")).model.conditioning == "none"


def test_stop_signals_take_one_ctrl_c_for_one_and_give_the_handlers_back(monkeypatch):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    clock = iter([10.0, 10.0, 10.5, 12.0])
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock, 99.0))
    with training.stop_signals() as event:
        assert not event.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert event.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == []
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_training_in_another_thread_leaves_signals_alone(tiny, tmp_path):
    before, done = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: done.append(runs.train(tiny({"train.steps": 1}), tmp_path / "run")))
    thread.start()
    thread.join()
    assert done[0].step == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_stop_after_saves_and_is_a_normal_end(tiny, tmp_path, lines, trained):
    settings = tiny({"train.ema": ("0.9", "warmup:decay=0.5")})
    result = runs.train(settings, tmp_path / "run", stop_after_s=1e-9)
    assert (result.step, result.stopped) == (1, False)
    assert runs.train(settings, tmp_path / "run").step == 6
    assert lines(tmp_path / "run") == lines(trained)


def test_a_variance_without_its_estimate_is_told_of_where_it_is_needed(tiny, tmp_path, capsys):
    """Stopped before the end: ddim draws, ancestral sampling says what is missing; finished, both draw."""
    settings = tiny({"diffusion.schedule": "cosine:timesteps=5", "diffusion.variance": "analytic:images=2"})
    runs.train(settings, tmp_path / "run", stop_after_s=1e-9)
    assert "until then previews" not in capsys.readouterr().out

    def draw(sampler):
        words = ["--num-images", "2", "--no-gif", "--device", "cpu", "--out", str(tmp_path / sampler), "--chunk", "2"]
        return cli.main(["sample", str(tmp_path / "run"), "--sampler", sampler, *words])

    assert draw("ddim:steps=2") == 0
    capsys.readouterr()
    assert draw("ddpm:steps=2") == 4
    told = capsys.readouterr().err
    assert (
        told.startswith("ddpm sample: these weights have no estimate of their variance yet") and told.count("\n") == 1
    )
    runs.train(settings, tmp_path / "run")
    assert "estimating the variance of 5 timesteps, by 2 images each." in capsys.readouterr().out
    assert draw("ddpm:steps=2,thresholding=clip") == 0


def test_previews_do_without_an_estimate_whatever_the_sampler_and_say_so_once(tiny, tmp_path, capsys):
    changes = {"diffusion.schedule": "cosine:timesteps=5", "diffusion.variance": "analytic:images=2"}
    changes |= {"train.preview_every": 2, "train.preview_images": 2, "sample.sampler": "ddim:steps=3,analytic=true"}
    runs.train(tiny(changes), tmp_path / "run")
    said = "--diffusion.variance=analytic is estimated after step 6; until then previews and scores are drawn with fixed-small.\n"
    assert capsys.readouterr().out.count(said) == 1
    plain = {**changes, "diffusion.variance": "fixed-small", "sample.sampler": "ddim:steps=3"}
    runs.train(tiny(plain), tmp_path / "plain")
    first, last = (
        [(tmp_path / name / "samples" / f"step-{step:08d}.png").read_bytes() for name in ("run", "plain")]
        for step in (2, 6)
    )
    assert first[0] == first[1]
    assert last[0] != last[1]


def test_parts_that_do_not_go_together_are_refused_before_anything_is_written(tiny, tmp_path):
    for changes, named in (
        ({"diffusion.variance": "learned-range"}, "is not trained by --diffusion.criterion=simple"),
        (
            {"diffusion.times": "loss-second-moment", "diffusion.schedule": "edm", "diffusion.objective": "x0"},
            "numbered steps",
        ),
    ):
        with pytest.raises(ConfigError, match=named):
            runs.train(tiny(changes), tmp_path / "run", dry_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_preview_breaks_off_when_a_stop_is_asked_for(tiny, tmp_path, digits):
    settings = tiny({"train.preview_images": 4})
    run = RunDir(tmp_path)
    model = build_diffusion(settings.model, settings.diffusion, digits.shape, 10)
    asked = iter([False, True])
    trainer = SimpleNamespace(
        module=model, drawing_weights=model.state_dict, runtime=resolve("cpu"), step=1, should_stop=lambda: next(asked)
    )
    training.Preview(settings, lambda model: model, run, SinkGroup({}, print))(trainer)
    assert list(tmp_path.rglob("*.png")) == []
    trainer.should_stop = lambda: False
    training.Preview(settings, lambda model: model, run, SinkGroup({}, print))(trainer)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["step-00000001.png"]


def test_a_path_in_the_home_folder_is_kept_whole(tiny, tmp_path, monkeypatch, digits):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "images.npz", arr_0=digits.images[:20], arr_1=digits.labels[:20])
    runs.train(tiny({"data.dataset": "npz", "data.path": "~/images.npz", "train.steps": 1}), tmp_path / "run")
    assert read_yaml(tmp_path / "run/config.yaml")["data"]["path"] == str(tmp_path / "images.npz")


@pytest.mark.parametrize("changes", [{"model.conditioning": "none"}, {"diffusion.label_drop": 0.0}])
def test_a_preset_guides_only_where_there_is_something_to_guide_by(tiny, tmp_path, changes):
    runs.train(tiny({"sample.guidance": 2.0, "train.steps": 1, **changes}), tmp_path / "run")
    assert read_yaml(tmp_path / "run/config.yaml")["sample"]["guidance"] == 1.0
    runs.train(tiny({"sample.guidance": 2.0, "train.steps": 1}), tmp_path / "guided")
    assert read_yaml(tmp_path / "guided/config.yaml")["sample"]["guidance"] == 2.0


def test_batch_norm_is_refused_where_it_would_see_a_part_of_the_batch(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"--model\.norm=batch sees only its own part"):
        runs.train(tiny({"model.norm": "batch", "train.micro_batch": 2}), tmp_path / "run")


def test_another_runs_checkpoint_may_go_on_with_other_images(trained, tiny, tmp_path, digits, capsys):
    np.savez(tmp_path / "images.npz", arr_0=digits.images[:20], arr_1=np.arange(20) % 10)
    changes = {"data.dataset": "npz", "data.path": str(tmp_path / "images.npz"), "train.steps": 7}
    settings = tiny({**changes, "train.ema": ("0.9", "warmup:decay=0.5")})
    assert runs.train(settings, tmp_path / "run", resume=str(trained)).step == 7
    assert "was trained on other images; going on with" in capsys.readouterr().err
