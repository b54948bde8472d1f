"""Processes: shares that add up, a group that agrees, a launcher that passes signals on and ends what hangs."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm import distributed
from ddpm.distributed import World, join, launch_processes
from ddpm.errors import ConfigError


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_shares_are_consecutive_whole_and_as_equal_as_can_be(n, size):
    parts = [range(n)[World(rank, size).share(n)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


def test_alone_everything_is_its_own_sum():
    world = World()
    assert world.is_main
    assert not World(1, 2).is_main
    assert torch.equal(world.sum(torch.tensor([1.5, 2.0])), torch.tensor([1.5, 2.0]))
    assert world.any(True) and not world.any(False)
    assert world.broadcast({"a": 1}) == {"a": 1}
    world.barrier()
    with join() as found:
        assert found == World(0, 1, 0)


GROUP = """
import os, sys, json, torch
pids = []
for rank in range(3):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", DDPM_RENDEZVOUS=sys.argv[1], GLOO_SOCKET_IFNAME="lo")
        from ddpm.distributed import join
        with join() as world:
            total = world.sum(torch.tensor([rank + 1.0, 10.0]))
            found = {
                "rank": world.rank, "size": world.size, "sum": total.tolist(),
                "any": [world.any(rank == 2), world.any(False)], "said": world.broadcast(f"from {rank}"),
            }
            world.barrier()
        with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
            json.dump(found, file)
        os._exit(0)
    pids.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


def test_three_gloo_processes_agree(tmp_path):
    import json

    done = subprocess.run(
        [sys.executable, "-c", GROUP, (tmp_path / "rendezvous").as_uri(), str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank, "size": 3, "sum": [6.0, 30.0], "any": [True, False], "said": "from 0",
        }  # fmt: skip


@pytest.fixture
def python_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`python_is("exit 3")`: what the launcher's `python -m ddpm ...` does instead, in shell."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace


def test_every_process_is_told_who_it_is(python_is, tmp_path):
    python_is('echo "$* $RANK $LOCAL_RANK $WORLD_SIZE $DDPM_RENDEZVOUS" > $RANK.txt')
    assert launch_processes(["train", "digits", "--x=a b"], 3) == 0
    said = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(3)]
    assert [words[:8] for words in said] == [
        ["-m", "ddpm", "train", "digits", "--x=a", "b", str(rank), str(rank)] for rank in range(3)
    ]
    assert {tuple(words[8:]) for words in said} == {("3", said[0][9])}
    assert said[0][9].startswith("file:///")
    assert not Path(said[0][9].removeprefix("file://")).parent.exists()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 75", 75),
        ("exit 4", 4),
        ("[ $RANK = 1 ] && exit 3; exec sleep 600", 3),
        ("[ $RANK = 1 ] && exit 5; trap 'kill $!; exit 1' TERM; sleep 600 & wait", 5),
        ("[ $RANK = 1 ] && kill -KILL $$; exec sleep 600", 137),
        ("[ $RANK = 1 ] && exit 1; sleep 0.3; exit 4", 4),
        ("[ $RANK = 1 ] && exit 1; exec sleep 600", 1),
    ],
)
def test_the_first_failure_ends_all_and_is_the_exit_code(python_is, script, code):
    python_is(script)
    assert launch_processes([], 2) == code


def test_a_process_that_was_killed_is_told_of(python_is, capfd):
    python_is("[ $RANK = 1 ] && kill -KILL $$; exec sleep 600")
    launch_processes([], 2)
    err = capfd.readouterr().err
    assert err == "warning: process 1 of 2 was ended by signal 9; the others are ended too.\n"


def test_a_process_that_does_not_listen_is_killed():
    stubborn = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    failed = subprocess.Popen(["/bin/sh", "-c", "sleep 0.2; exit 3"])
    assert distributed._wait([stubborn, failed], patience_s=0.1, grace_s=0.3) == 3
    assert stubborn.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_the_handlers_given_back(python_is, tmp_path, number):
    name = "TERM" if number == signal.SIGTERM else "INT"
    python_is(f"trap 'echo {name} > got$RANK; exit 75' {name}; touch ready$RANK; while :; do sleep 0.02; done")
    before = signal.getsignal(number)

    def send() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert launch_processes([], 2) == 75
    sender.join()
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == [f"{name}\n"] * 2
    assert signal.getsignal(number) == before


def test_no_processes_is_a_mistake():
    with pytest.raises(ConfigError, match="--processes=0 is wrong: it must be at least 1"):
        launch_processes([], 0)
