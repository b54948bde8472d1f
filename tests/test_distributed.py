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
    """`python_is("exit 3")`: what the launcher's `python -c ...` does instead, in shell."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace


def test_every_process_is_told_who_it_is(python_is, tmp_path):
    python_is('shift 2; echo "$* $RANK $LOCAL_RANK $WORLD_SIZE $DDPM_RENDEZVOUS" > $RANK.txt')
    assert launch_processes(["train", "digits", "--x=a b"], 3) == 0
    said = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(3)]
    assert [words[:6] for words in said] == [
        ["train", "digits", "--x=a", "b", str(rank), str(rank)] for rank in range(3)
    ]
    assert {tuple(words[6:]) for words in said} == {("3", said[0][7])}
    assert said[0][7].startswith("file:///")
    assert not Path(said[0][7].removeprefix("file://")).parent.exists()


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


LAUNCH = "import sys; from ddpm.distributed import launch_processes as launch; sys.exit(launch(sys.argv[1:], 2))"


def test_files_of_the_working_folder_are_not_imported(tmp_path):
    (tmp_path / "yaml.py").write_text("raise SystemExit(99)")
    done = subprocess.run(
        [sys.executable, "-P", "-c", LAUNCH, "train", "digits", "--lr=x"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(distributed.__file__).parents[1])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "ddpm train: --lr='x' is wrong" in done.stderr


FAKE_CLI = """
import os, pathlib, time
from ddpm.distributed import join
def main():
    with join() as world:
        pathlib.Path(f"{world.rank}.tmp").write_text(str(os.getpid()))
        os.rename(f"{world.rank}.tmp", f"{world.rank}.pid")
        time.sleep(60)
"""
FAKED = f"import sys, types; fake = types.ModuleType('ddpm.cli'); exec({FAKE_CLI!r}, fake.__dict__); sys.modules['ddpm.cli'] = fake\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_processes_end_when_their_launcher_is_killed(tmp_path):
    (tmp_path / "ddpm_fake.py").write_text(FAKED)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import ddpm_fake; $2"\n')
    python.chmod(0o755)
    path = os.pathsep.join([str(Path(distributed.__file__).parents[1]), str(tmp_path)])
    launch = f"import sys; sys.executable = {str(python)!r}; " + LAUNCH
    launcher = subprocess.Popen(
        [sys.executable, "-P", "-c", launch], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    told = [tmp_path / "0.pid", tmp_path / "1.pid"]
    while not all(file.exists() for file in told):
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.kill()
    assert launcher.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(alive(int(file.read_text())) for file in told):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for has ended."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2", "DDPM_RENDEZVOUS": "x"},
            "WORLD_SIZE=2 is set, but RANK is not set: start with --processes",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR and MASTER_PORT are not"),
        ({"WORLD_SIZE": "2", "DDPM_RENDEZVOUS": "x", "RANK": "2"}, "RANK='2' is not a number from 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number from 1"),
    ],
)
def test_half_a_group_is_a_mistake(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), join():
        pass


def test_a_rank_without_a_group_is_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    with join() as world:
        assert world == World(0, 1, 0)


def test_no_processes_is_a_mistake():
    with pytest.raises(ConfigError, match="--processes=0 is wrong: it must be at least 1"):
        launch_processes([], 0)
