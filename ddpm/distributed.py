"""Processes: who am I, how do we add up, and how a command starts several of itself."""

import contextlib
import datetime
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm.console import write_line
from ddpm.errors import ConfigError, DDPMError

_RENDEZVOUS = "DDPM_RENDEZVOUS"
_LIFELINE = "DDPM_LIFELINE"
"""Number of a file descriptor: a pipe that nobody writes to and that ends with the launcher, however that ends."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; a meeting point for all."""
        return bool(self.sum(torch.tensor([float(flag)])).item() > 0) if self.size > 1 else flag

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def share(self, n: int) -> slice:
        """This process's part of n consecutive things, as equal as can be."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def broadcast(self, value: object) -> object:
        """The main process's value, on each process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextlib.contextmanager
def join(timeout_s: float = 4 * 3600.0) -> Iterator[World]:
    """Join the process group that the environment describes (ours, or torchrun's); alone where it describes none.

    The group talks over gloo on CPU tensors and over NCCL on CUDA ones. A process that `launch_processes` started gets
    SIGTERM when its launcher is gone. Raises ConfigError when the environment describes half a group, DDPMError when
    another process is gone.
    """
    _end_with_the_launcher()
    world = described()
    if world.size == 1:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    where = os.environ.get(_RENDEZVOUS, "env://")
    dist.init_process_group(
        backend,
        init_method=where,
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        yield world
    except RuntimeError as error:
        if "by peer" in str(error):  # gloo: connection closed, connection reset
            raise DDPMError("another process of the group ended; its own message says why.") from error
        raise
    finally:
        dist.destroy_process_group()


def launched() -> bool:
    """Whether `launch_processes` started this process."""
    return _RENDEZVOUS in os.environ


def described() -> World:
    """This process as the environment describes it; without WORLD_SIZE it is alone. Raises ConfigError."""
    size = _number("WORLD_SIZE", 1, 2**20) if "WORLD_SIZE" in os.environ else 1
    if size == 1:
        return World()
    if not launched() and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            f"WORLD_SIZE={size} is set, but MASTER_ADDR and MASTER_PORT are not: start with --processes or torchrun, or unset WORLD_SIZE."
        )
    rank = _number("RANK", 0, size - 1)
    return World(rank, size, _number("LOCAL_RANK", 0, size - 1) if "LOCAL_RANK" in os.environ else rank)


def _number(variable: str, least: int, most: int) -> int:
    text = os.environ.get(variable, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        found = f"{variable}={text[:40]!r} is not a number from {least} to {most}" if text else f"{variable} is not set"
        known = "" if variable == "WORLD_SIZE" else f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but "
        raise ConfigError(f"{known}{found}: start with --processes or torchrun, or unset WORLD_SIZE.")
    return int(text)


def _end_with_the_launcher() -> None:
    lifeline = os.environ.pop(_LIFELINE, None)
    if lifeline is None:
        return

    def watch(pipe: int) -> None:
        while os.read(pipe, 1):
            continue
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=(int(lifeline),), name="lifeline", daemon=True).start()


def launch_processes(arguments: Sequence[str], processes: int) -> int:
    """Run `ddpm ARGUMENTS` as several processes of one group on this machine; returns the exit code.

    SIGTERM and SIGINT are passed on. When a process fails, the others are ended and its code is returned. When this
    process is killed, they get SIGTERM.
    """
    if processes < 1:
        raise ConfigError(f"--processes={processes} is wrong: it must be at least 1.")
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder, _pipe() as lifeline:
        place = Path(folder) / "rendezvous"
        children = [_start(arguments, rank, processes, place, lifeline) for rank in range(processes)]
        with _passing_signals_to(children):
            return _wait(children)


@contextlib.contextmanager
def _pipe() -> Iterator[int]:
    """The reading end of a pipe whose writing end no other process has."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _start(arguments: Sequence[str], rank: int, size: int, rendezvous: Path, lifeline: int) -> subprocess.Popen[bytes]:
    """`ddpm ARGUMENTS` with this process's import path: `-m ddpm` would put the working folder before it."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        _RENDEZVOUS: rendezvous.as_uri(),
        _LIFELINE: str(lifeline),
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # main() has written and flushed all; leaving by os._exit spares the tear-down, in which a thread of the process
    # group or of autograd that is still alive now and then aborts the process and hides its exit code.
    command = (
        f"import os, sys; sys.path[:] = {sys.path!r}; sys.argv[0] = {sys.argv[0]!r}; "
        "from ddpm.cli import main; os._exit(main())"
    )
    return subprocess.Popen([sys.executable, "-c", command, *arguments], env=environment, pass_fds=(lifeline,))


@contextlib.contextmanager
def _passing_signals_to(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]], patience_s: float = 1.0, grace_s: float = 10.0) -> int:
    """Wait for all; after a failure the others may end by themselves, are asked to, and are killed."""
    codes: list[int | None] = [None] * len(children)
    at_failure: list[int | None] = []
    ask_at = kill_at = math.inf
    while any(code is None for code in codes):
        codes = [child.poll() for child in children]
        if not at_failure and any(code not in (None, 0, 75) for code in codes):
            at_failure, ask_at = codes, time.monotonic() + patience_s
            kill_at = ask_at + grace_s
        if time.monotonic() > ask_at:
            _each_left(children, signal.SIGTERM)
            ask_at = math.inf
        if time.monotonic() > kill_at:
            _each_left(children, signal.SIGKILL)
        time.sleep(0.02)
    return _cause([code for code in codes if code is not None], at_failure)


def _each_left(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _cause(codes: Sequence[int], at_failure: Sequence[int | None]) -> int:
    """The exit code of them all: not that of processes ended here, and 1, with which one that lost another ends, last."""
    if not at_failure:
        return codes[0]
    own = [code for code, then in zip(codes, at_failure, strict=True) if code > 0 or then is not None]
    cause = min((code for code in own if code not in (0, 75)), key=lambda code: (code == 1, code))
    if cause < 0:
        who = f"process {codes.index(cause)} of {len(codes)}"
        write_line(sys.stderr, f"warning: {who} was ended by signal {-cause}; the others are ended too.")
    return cause if cause >= 0 else 128 - cause
