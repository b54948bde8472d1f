"""Metrics lines, checkpoints and previews come when they are due, and only from the main process."""

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ddpm import checkpoint
from ddpm.config import RunConfig, TrainConfig
from ddpm.distributed import World
from ddpm.errors import DataError
from ddpm.rundir import RunDir
from ddpm.training.hooks import Checkpoints, Every, Metrics, memory_bytes
from ddpm.training.trainer import StepResult

ALONE = World()


def a_trainer(steps=10, world=ALONE, **config):
    """What hooks look at of a trainer."""
    trainer = SimpleNamespace(
        config=TrainConfig(steps=steps, batch_size=4, **config), runtime=SimpleNamespace(device=torch.device("cpu")),
        world=world, skipped=0, step=0,
    )  # fmt: skip
    trainer.tensors = lambda: {"model": {"w": torch.full((2,), float(trainer.step))}}
    trainer.state = lambda: {"emas": [], "skipped": trainer.skipped}
    return trainer


def go(hooks, trainer, steps, skipped=()):
    """Steps with loss n and gradient norm n²."""
    for n in steps:
        trainer.step = n
        trainer.skipped += n in skipped
        result = StepResult(n, float("nan") if n in skipped else n, n**2, lr=0.5, skipped=n in skipped)
        for hook in hooks:
            hook.after(trainer, result)


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_means_since_the_line_before(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 4, [])
    go([metrics], a_trainer(), range(1, 11))
    found = read(tmp_path / "m.jsonl")
    assert [line["step"] for line in found] == [4, 8, 10]
    assert [line["images"] for line in found] == [16, 32, 40]
    assert [line["loss"] for line in found] == [2.5, 6.5, 9.5]
    assert [line["grad_norm"] for line in found] == [7.5, 43.5, 90.5]
    assert [line["lr"] for line in found] == [0.5] * 3
    assert all("skipped" not in line for line in found)


def test_skipped_steps_are_counted_and_left_out_of_the_means(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 2, [])
    go([metrics], a_trainer(steps=6), range(1, 7), skipped=(2, 3, 4))
    found = read(tmp_path / "m.jsonl")
    assert [line.get("loss") for line in found] == [1.0, None, 5.5]
    assert [line.get("skipped") for line in found] == [1, 3, 3]


def test_an_unfinished_window_goes_on_from_its_sums(tmp_path):
    first, second = Metrics(tmp_path / "m.jsonl", 4, []), Metrics(tmp_path / "m.jsonl", 4, [])
    go([first], a_trainer(), range(1, 7))
    second.sums.copy_(first.sums)
    go([second], a_trainer(), range(7, 11))
    assert [line["loss"] for line in read(tmp_path / "m.jsonl")] == [2.5, 6.5, 9.5]


def test_speed_counts_the_seconds_of_the_steps_since_the_line_before(tmp_path):
    metrics, trainer = Metrics(tmp_path / "m.jsonl", 2, []), a_trainer(steps=8)
    for step, seconds in ((5, 0.5), (6, 1.5), (7, 0.25), (8, 0.75)):
        metrics.after(trainer, StepResult(step, 1.0, 1.0, 1.0, seconds=seconds))
    batch = trainer.config.batch_size
    expected = [(2 * batch / 2.0, 2.0), (2 * batch / 1.0, 1.0)]
    assert [(line["images_per_s"], line["seconds"]) for line in read(tmp_path / "m.jsonl")] == expected


def test_listeners_see_the_very_lines_and_other_processes_write_none(tmp_path):
    seen: list[dict[str, float]] = []
    go([Metrics(tmp_path / "m.jsonl", 3, [seen.append]), Metrics(None, 3, [])], a_trainer(), range(1, 11))
    assert seen == read(tmp_path / "m.jsonl")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.jsonl"]


def test_a_line_that_cannot_be_written_ends_its_window_all_the_same(tmp_path):
    seen: list[dict[str, float]] = []
    metrics = Metrics(Path("/proc/m.jsonl"), 2, [seen.append])
    with pytest.raises(DataError):
        go([metrics], a_trainer(), (1, 2))
    assert [line["loss"] for line in seen] == [1.5]
    assert metrics.sums.tolist() == [0, 0, 0]


FACTS = {"images": 0, "shape": [1, 8, 8], "classes": [], "data": {"name": "digits", "images": 9, "fingerprint": "0"}}


@pytest.fixture
def saver(tmp_path):
    """Checkpoints of a run that saves every third step and keeps them all."""
    warnings: list[str] = []
    config = RunConfig(train=TrainConfig(steps=10, checkpoint_every=3, keep_last=9))
    run = RunDir(tmp_path / "run")
    run.create()
    hook = Checkpoints(run, config, FACTS, Metrics(None, 5, []), warnings.append)
    hook.warnings = warnings
    return hook


def saved(saver) -> list[int]:
    return [checkpoint.load(path).step for path in reversed(checkpoint.listing(saver.run.checkpoints))]


def test_checkpoints_come_every_so_often_and_at_the_end(saver):
    trainer = a_trainer()
    go([saver], trainer, range(1, 11))
    assert saved(saver) == [3, 6, 9]
    saver.finish(trainer)
    assert saved(saver) == [3, 6, 9, 10]
    before = (saver.run.checkpoints / "step-00000010/model.safetensors").stat().st_mtime_ns
    saver.finish(trainer)
    assert (saver.run.checkpoints / "step-00000010/model.safetensors").stat().st_mtime_ns == before
    found = checkpoint.latest(saver.run.checkpoints, pytest.fail)
    assert found.state == {"format": 1, "step": 10, "emas": [], "skipped": 0, **FACTS}
    assert found.tensors("model")["w"].tolist() == [10.0, 10.0]


def test_the_sums_of_the_window_are_saved(saver):
    trainer = a_trainer()
    go([saver.metrics, saver], trainer, range(1, 7))
    assert checkpoint.latest(saver.run.checkpoints, pytest.fail).tensors("state")["metrics.sums"].tolist() == [6, 36, 1]


def test_a_save_that_fails_on_the_way_is_told_and_the_last_one_raises(saver, monkeypatch):
    def full(*_):
        raise DataError("no room.")

    trainer = a_trainer()
    monkeypatch.setattr(checkpoint, "save", full)
    go([saver], trainer, range(1, 7))
    assert saver.warnings == [f"checkpoint of step {n} not saved: no room. Training goes on." for n in (3, 6)]
    with pytest.raises(DataError):
        saver.finish(trainer)
    monkeypatch.undo()
    saver.finish(trainer)
    assert saved(saver) == [6]


def test_only_the_main_process_saves_and_acts(saver):
    trainer, acted = a_trainer(world=World(1, 2)), []
    hooks = [saver, Every(1, acted.append)]
    go(hooks, trainer, range(1, 11))
    for hook in hooks:
        hook.finish(trainer)
    assert saved(saver) == acted == []


@pytest.mark.parametrize(("every", "wanted"), [(4, [4, 8, 10]), (5, [5, 10]), (50, [10]), (0, [])])
def test_every(every, wanted):
    acted: list[int] = []
    go([Every(every, lambda trainer: acted.append(trainer.step))], a_trainer(), range(1, 11))
    assert acted == wanted


def test_memory_is_the_peak_of_this_process():
    now = psutil.Process().memory_info().rss
    assert 0.9 * now <= memory_bytes(torch.device("cpu")) < 100 * now
