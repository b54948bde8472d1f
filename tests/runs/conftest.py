"""Tiny runs, a trained one to look at, and processes that start in milliseconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ddpm import config, presets, runs
from ddpm.config import RunConfig

TINY: dict[str, Any] = {
    "model.channels": 8,
    "model.channel_mults": (1, 2),
    "model.blocks": 1,
    "model.attention": (),
    "model.dropout": 0.0,
    "model.conditioning": "global",
    "train.steps": 6,
    "train.batch_size": 8,
    "train.lr": 1e-3,
    "train.warmup": 4,
    "train.ema": ("0.9",),
    "train.log_every": 2,
    "train.checkpoint_every": 3,
    "train.preview_every": 0,
    "sample.sampler": "ddim:steps=3",
    "runtime.device": "cpu",
    "runtime.precision": "float32",
    "runtime.threads": 1,
}
"""Ten classes of 8x8 digits and a network that takes 4 ms a step."""


@pytest.fixture(scope="session")
def tiny() -> Callable[..., RunConfig]:
    """`tiny({"train.steps": 9})`: the config of a tiny run with some fields changed."""

    def make(changes: Mapping[str, Any] = {}) -> RunConfig:
        return config.build(config.merge(presets.preset("digits"), config.nest({**TINY, **changes})))

    return make


@pytest.fixture(scope="session")
def words() -> Callable[..., list[str]]:
    """`words({"train.steps": 9})`: the same as words for `ddpm train`."""

    def make(changes: Mapping[str, Any] = {}) -> list[str]:
        fields = {**TINY, **changes}
        written = {name: config._parse_list(value) or "none" for name, value in fields.items()}
        spelt = {
            name: (" " if name == "train.ema" else ",").join(map(str, value)) if isinstance(value, tuple) else value
            for name, value in written.items()
        }
        return [f"--{name.replace('_', '-')}={value}" for name, value in spelt.items()]

    return make


@pytest.fixture(scope="session")
def trained(tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints 3 and 6 and two averages; to be read, not written to."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    runs.train(tiny({"train.ema": ("0.9", "warmup:decay=0.5")}), folder)
    return folder


_ZYGOTE = """
import json, os, resource, sys, time
import torch
torch.set_num_threads(1)
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # imports what optimizers need, once
from ddpm import cli, runs
from ddpm.runs import training

def child(asked):
    sys.stdin = open(os.devnull)
    out = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    err = os.open(asked["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(err, 2)
    sys.argv = ["ddpm", *asked["words"]]
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    if asked["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"], resource.RLIM_INFINITY))
    steps = iter(range(1, 1 << 60))

    class Clock:
        def __init__(self, seconds):
            self.steps = 0
        def __call__(self):
            self.steps += 1
            time.sleep(asked["step_s"])
            if self.steps == asked["hang_at"]:
                time.sleep(60)
            return self.steps == asked["stop_at"]

    if asked["hang_at"] or asked["stop_at"] or asked["step_s"]:
        training.StopClock = Clock
    code = cli.main(asked["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
    else:
        answer = os.fork()
        if not answer:
            try:
                child(asked)
            finally:
                os._exit(99)
    print(answer, flush=True)
"""


@dataclass
class Command:
    """A `ddpm` process that was started."""

    pid: int
    out: Path
    err: Path
    ask: Callable[[dict[str, Any]], int] = field(repr=False)
    code: int | None = None

    def wait(self) -> int:
        """Its exit code; -N where signal N ended it."""
        if self.code is None:
            self.code = self.ask({"wait": self.pid})
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    @property
    def errors(self) -> list[str]:
        """Lines on standard error so far."""
        return self.err.read_text().splitlines()

    @property
    def output(self) -> str:
        """Standard output so far."""
        return self.out.read_text()


class Zygote:
    """A process that has imported everything and forks one for each command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.started: list[Command] = []

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self,
        *words: object,
        cwd: Path,
        env: Mapping[str, str] = {},
        stop_at: int = 0,
        hang_at: int = 0,
        step_s: float = 0,
        file_bytes: int = 0,
    ) -> Command:
        """Start `ddpm WORDS`.

        stop_at: the step at which --stop-after is over; hang_at: a step that never ends; step_s: added to every step;
        file_bytes: larger files fail, as on a full disk.
        """
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        out.touch(), err.touch()
        asked = {"words": [*map(str, words)], "cwd": str(cwd), "env": dict(env), "out": str(out), "err": str(err)}
        limits = {"stop_at": stop_at, "hang_at": hang_at, "step_s": step_s, "file_bytes": file_bytes}
        pid = self.ask({**asked, **limits})
        self.started.append(Command(pid, out, err, self.ask))
        return self.started[-1]

    def group(self, size: int, *words: object, cwd: Path, **how: Any) -> list[Command]:
        """The processes of one group, as a launcher would start them."""
        self.count += 1
        place = (self.folder / f"{self.count}.rendezvous").as_uri()
        common = {"WORLD_SIZE": str(size), "DDPM_RENDEZVOUS": place, "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return [self.start(*words, cwd=cwd, env=env, **how) for env in ranks]

    def run(self, *words: object, cwd: Path, processes: int = 1, **how: Any) -> Command:
        """`ddpm WORDS` to its end; of several processes the first."""
        many = processes > 1
        commands = self.group(processes, *words, cwd=cwd, **how) if many else [self.start(*words, cwd=cwd, **how)]
        codes = {command.wait() for command in commands}
        assert len(codes) == 1, [command.errors for command in commands]
        return commands[0]

    def tidy(self) -> None:
        """End what a failed test left behind."""
        for command in self.started:
            if command.code is None:
                command.kill()
                command.wait()
        self.started.clear()


@pytest.fixture(scope="session")
def _zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    assert zygote.process.stdin is not None and zygote.process.stdout is not None
    zygote.process.stdin.close()
    zygote.process.wait()
    zygote.process.stdout.close()


@pytest.fixture
def zygote(_zygote: Zygote) -> Iterator[Zygote]:
    """Processes of `ddpm`: `zygote.start`, `zygote.run`."""
    yield _zygote
    _zygote.tidy()


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """`wait_for(lambda: path.exists())`, for at most so many seconds."""

    def wait(there: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder, by relative path, with its contents."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


MEASURED = ("images_per_s", "memory_bytes", "seconds")


@pytest.fixture(scope="session")
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """metrics.jsonl of a run, without what measures the machine."""

    def read(run: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]

    return read
