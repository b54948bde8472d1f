"""Sinks: what they receive, and that none of their failures reaches the training."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.errors import ConfigError
from ddpm.training import loggers
from ddpm.training.loggers import SinkGroup, open_sinks

CONFIG = {"train": {"lr": 1e-3}}
IMAGE = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)


class Fake:
    """A sink that remembers, and fails in the named calls."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise OSError(f"no {name}\nhere")

    def log(self, step: int, record: Any) -> None:
        self._call("log")

    def image(self, step: int, name: str, image: Any) -> None:
        self._call("image")

    def close(self) -> None:
        self._call("close")


def test_unknown_name_is_a_config_error_with_the_nearest(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        open_sinks(["tensorbord"], tmp_path, "p", "n", CONFIG, pytest.fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["log", "image", "close"])
def test_a_failing_sink_is_warned_of_once_and_dropped(call):
    warned: list[str] = []
    bad, good = Fake(call), Fake()
    group = SinkGroup({"bad": bad, "good": good}, warned.append)
    for step in range(3):
        group.log(step, {"loss": 1.0})
        group.image(step, "preview", IMAGE)
    group.close()
    group.log(9, {"loss": 1.0})
    assert len(warned) == 1
    assert "'bad'" in warned[0]
    assert "\n" not in warned[0]
    assert bad.calls.count(call) == 1
    assert good.calls == ["log", "image"] * 3 + ["close"]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_sink_that_is_not_installed_is_warned_of(tmp_path: Path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    warned: list[str] = []
    group = open_sinks([name, name], tmp_path, "p", "n", CONFIG, warned.append)
    group.log(1, {"loss": 1.0})
    group.close()
    assert group.names == []
    assert len(warned) == 1
    assert f"pip install {name}" in warned[0]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    pytest.importorskip("tensorboard")
    group = open_sinks(["tensorboard"], tmp_path, "p", "n", CONFIG, pytest.fail)
    group.log(5, {"loss": 0.5, "lr": 1e-3})
    group.log(10, {"loss": 0.25, "lr": 1e-3})
    group.image(10, "preview", IMAGE)
    group.close()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.5), (10, 0.25)]
    assert (events.Images("preview")[0].width, events.Images("preview")[0].step) == (8, 10)


class FakeRun:
    """What wandb.init and trackio.init return, as far as it is used."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def log(self, record: dict[str, Any], step: int) -> None:
        self.logged.append((record, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FakeRun]:
    """Stand-ins for wandb and trackio; the runs that were opened."""
    opened: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        opened.append(FakeRun(**settings))
        return opened[-1]

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init, Image=np.asarray, Settings=dict))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return opened


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_receive_config_numbers_and_pictures(tmp_path: Path, tracker, name):
    group = open_sinks([name], tmp_path, "project", "run", CONFIG, pytest.fail)
    group.log(3, {"loss": 0.5})
    group.image(3, "preview", IMAGE)
    group.close()
    (run,) = tracker
    assert (run.settings["project"], run.settings["name"], run.settings["config"]) == ("project", "run", CONFIG)
    assert run.logged[0] == ({"loss": 0.5}, 3)
    assert np.array_equal(run.logged[1][0]["preview"], np.stack([IMAGE[0]] * 3, axis=-1))
    assert run.finished


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "not-a-real-key"}, None, "online"),
        ({"WANDB_API_KEY": "not-a-real-key", "WANDB_MODE": "disabled"}, None, "disabled"),
        ({}, "machine api.wandb.ai login user password not-a-real-key", "online"),
        ({"WANDB_BASE_URL": "https://own.example"}, "machine api.wandb.ai login user password x", "offline"),
        ({}, "machine machine machine", "offline"),
    ],
)
def test_wandb_is_online_only_with_a_key(tmp_path: Path, tracker, monkeypatch, environment, netrc, mode):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if netrc is not None:
        (tmp_path / "netrc").write_text(netrc)
        (tmp_path / "netrc").chmod(0o600)
    open_sinks(["wandb"], tmp_path / "run", "p", "n", CONFIG, pytest.fail)
    assert tracker[0].settings["mode"] == mode
    assert "not-a-real-key" not in str(tracker[0].settings)


def test_a_resumed_run_keeps_its_wandb_id(tmp_path: Path, tracker):
    for folder in ("a", "a", "b"):
        open_sinks(["wandb"], tmp_path / folder, "p", "n", CONFIG, pytest.fail)
    first, again, other = (run.settings["id"] for run in tracker)
    assert first == again != other


def test_a_tracker_whose_init_fails_is_dropped(tmp_path: Path, tracker, monkeypatch):
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0, raising=False)
    warned: list[str] = []
    group = open_sinks(["wandb", "trackio"], tmp_path, "p", "n", CONFIG, warned.append)
    assert group.names == ["trackio"]
    assert len(warned) == 1


def test_the_environment_never_reaches_a_sink(tmp_path: Path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("SOME_TOKEN", "xyzzy-secret")
    group = open_sinks(["tensorboard"], tmp_path, "p", "n", CONFIG, pytest.fail)
    group.log(1, {"loss": 1.0})
    group.close()
    assert not any(b"xyzzy-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_check_names_takes_every_sink():
    loggers.check_names(list(loggers.SINKS))
