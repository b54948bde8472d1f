"""Console: figures people read, plain lines off a terminal, and nothing shown ever stops the work."""

import io
import math
import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import console
from ddpm.console import Console, TrainingDisplay, human_bytes, human_count, human_duration


class Terminal(io.StringIO):
    """A terminal that remembers what was drawn."""

    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    """A stream on which nothing can be written."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (1000, "1.0 k"), (999_949, "999.9 k"), (999_950, "1.0 M"), (35_746_307, "35.7 M"), (-2e9, "-2.0 G"), (math.nan, "?")],
)  # fmt: skip
def test_human_count(number, text):
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(512, "512 B"), (1024, "1.0 KiB"), (1_610_612_736, "1.5 GiB"), (2**20 - 1, "1.0 MiB"), (math.inf, "?")],
)
def test_human_bytes(number, text):
    assert human_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (4.25, "4.2s"), (9.97, "10s"), (59.96, "1m 00s"), (200, "3m 20s"), (3599.7, "1h 00m"), (3900, "1h 05m"), (97200, "1d 03h"), (math.inf, "?")],
)  # fmt: skip
def test_human_duration(seconds, text):
    assert human_duration(seconds) == text


@settings(deadline=None)
@given(st.floats())
def test_humans_are_told_of_any_number(number):
    assert all(isinstance(write(number), str) for write in (human_count, human_bytes, human_duration))


def test_info_goes_out_and_warnings_go_to_stderr(capsys):
    Console().info("[red]done[/red]")
    Console().warn("careful")
    assert capsys.readouterr() == ("[red]done[/red]\n", "warning: careful\n")


def test_a_quiet_console_only_warns(capsys):
    quiet = Console(quiet=True)
    quiet.info("a")
    quiet.table("t", ["a"], [["1"]])
    with quiet.progress("p", 3, "images") as bar:
        bar.advance(3)
    quiet.warn("b")
    assert capsys.readouterr() == ("", "warning: b\n")


def test_plain_table_is_aligned(capsys):
    Console().table("sizes", ["name", "n"], [["digits", 1797], ["x", "[b]"]])
    assert capsys.readouterr().out == "sizes\nname    n\ndigits  1797\nx       [b]\n"


def test_plain_progress_tells_each_tenth_and_the_end(capsys):
    with Console().progress("sampling", 40, "images") as bar:
        for _ in range(20):
            bar.advance(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"sampling: {n}/40 images" for n in range(4, 40, 4)]
    assert lines[-1].startswith("sampling: 40/40 images in ")


def test_progress_of_unknown_length_tells_the_end_even_after_an_error(capsys):
    with pytest.raises(RuntimeError), Console().progress("reading", None, "files") as bar:
        bar.advance(7)
        raise RuntimeError
    assert capsys.readouterr().out.startswith("reading: 7 files in ")


def test_terminals_get_drawings(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    Console().table("sizes", ["name"], [["[digits]"]])
    with Console().progress("sampling", 4, "images") as bar:
        bar.advance(4)
    with TrainingDisplay(100) as display:
        display.update({"step": 50, "loss": 0.25})
    shown = screen.getvalue()
    assert "[digits]" in shown
    assert "4/4 images in" in shown
    assert "step 50/100" in shown
    assert "0.2500" in shown


RECORD = {
    "step": 50,
    "images": 6400,
    "loss": 0.03125,
    "lr": 2e-4,
    "grad_norm": 0.5,
    "images_per_s": 850.4,
    "memory_bytes": 2**30,
    "other": 1,
}


def test_plain_display_is_a_line_an_update(capsys):
    times = iter([0.0, 10.0, 20.0])
    with TrainingDisplay(200, start_step=0, clock=lambda: next(times)) as display:
        display.update(RECORD)
        display.update({"step": 100, "loss": math.nan})
    assert capsys.readouterr().out.splitlines() == [
        "step 50/200  images 6.4 k  loss 0.0312  lr 2.00e-04  grad norm 0.500  images/s 850  memory 1.0 GiB  ETA 30s",
        "step 100/200  loss nan  ETA 20s",
    ]


def test_eta_counts_from_the_step_resumed_at():
    times = iter([0.0, 10.0])
    with TrainingDisplay(1000, start_step=900, clock=lambda: next(times), quiet=True) as display:
        assert display.eta_s() == math.inf
        display.update({"step": 950})
        assert display.eta_s() == 10


def test_a_quiet_display_shows_nothing(capsys):
    with TrainingDisplay(10, quiet=True) as display:
        display.update(RECORD)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_shown_stops_the_work(monkeypatch, terminal):
    monkeypatch.setenv("TERM", "xterm" if terminal else "dumb")
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", Broken())
    told = Console()
    told.info("a")
    told.warn("b")
    told.table("t", ["a"], [["1"]])
    with told.progress("p", 3, "images") as bar:
        bar.advance(3)
    with TrainingDisplay(10) as display:
        display.update(RECORD)
        display.update({"step": "no number", "loss": object()})  # type: ignore[dict-item]


def test_a_display_whose_drawing_fails_goes_on_in_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with TrainingDisplay(10) as display:
        monkeypatch.setattr(display, "_panel", lambda facts: 1 / 0)
        display.update({"step": 3})
    assert "step 3/10  ETA" in screen.getvalue()


def test_streams_may_be_missing_or_narrow(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    Console().info("a")
    raw = io.BytesIO()
    narrow = io.TextIOWrapper(raw, encoding="ascii")
    console.write_line(narrow, "3 × ✓")
    assert raw.getvalue() == b"3 \\xd7 \\u2713\n"


CHATTER = "from ddpm.console import Console\nfor _ in range(20000): Console().info('a line that nobody reads')\nimport sys; sys.exit(7)"


def test_a_closed_pipe_is_quiet_to_the_end():
    with subprocess.Popen([sys.executable, "-c", CHATTER], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 7


def test_a_full_disk_is_quiet_to_the_end():
    with open("/dev/full", "w") as full:
        child = subprocess.run([sys.executable, "-c", CHATTER], stdout=full, stderr=subprocess.PIPE, check=False)
    assert child.returncode == 7
    assert child.stderr == b""


def test_a_real_terminal_shows_the_panel():
    code = (
        "from ddpm.console import TrainingDisplay\nwith TrainingDisplay(100) as d: d.update({'step': 50, 'loss': 0.25})"
    )
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=other, stderr=other, env=environment) as child:
        child.wait(60)
        shown = os.read(main, 1 << 16).decode()
    os.close(main)
    os.close(other)
    assert child.returncode == 0
    assert "step 50/100" in shown
    assert "0.2500" in shown
