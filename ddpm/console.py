"""What is shown while the program works: rich on a terminal, plain lines elsewhere.

Showing is never worth a run: whatever fails here (a closed pipe, an odd terminal) is dropped and work goes on.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO


def human_count(number: float) -> str:
    """950 -> '950', 35_746_307 -> '35.7 M'; powers of 1000."""
    return _scaled(number, 1000, ("", " k", " M", " G", " T", " P"))


def human_bytes(number: float) -> str:
    """512 -> '512 B', 1_610_612_736 -> '1.5 GiB'; powers of 1024."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def human_duration(seconds: float) -> str:
    """4.25 -> '4.2s', 200 -> '3m 20s', 3900 -> '1h 05m', 97200 -> '1d 03h'; '?' if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    whole = round(seconds)
    for size, unit, small_size, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // small_size:02d}{small_unit}"
    return f"{whole}s"


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    if not math.isfinite(number):
        return "?"
    power = 0
    while power < len(units) - 1 and round(abs(number), 1 if power else 0) >= base:
        number, power = number / base, power + 1
    return f"{number:.1f}{units[power]}" if power else f"{number:.0f}{units[0]}"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether pictures may be drawn on a stream: a terminal that can move its cursor."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False


def write_line(stream: TextIO | None, text: str) -> None:
    """Print a line and flush; a reader that went away, a full disk or an odd encoding is not an error."""
    if stream is None:
        return
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)
    except (OSError, ValueError):
        return


def silence(stream: TextIO) -> None:
    """Send what is still buffered, and all that follows, nowhere, so that a closed pipe is quiet at exit too."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return


class Console:
    """Messages, tables and progress. `quiet` (processes other than the first) shows nothing but warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def info(self, text: str) -> None:
        """A line on standard output."""
        if not self.quiet:
            write_line(sys.stdout, text)

    def warn(self, text: str) -> None:
        """A line on standard error, marked as a warning."""
        write_line(sys.stderr, f"warning: {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; cells are written with str()."""
        cells = [[str(cell) for cell in row] for row in rows]
        if self.quiet or (is_terminal(sys.stdout) and _attempt(lambda: _rich_table(title, columns, cells))):
            return
        for line in _plain_table(title, columns, cells):
            write_line(sys.stdout, line)

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str) -> Iterator["Progress"]:
        """A bar with `.advance(n)`; elsewhere than on a terminal, a line at each tenth of `total` and at the end."""
        shown = Progress(description, total, unit, self.quiet)
        try:
            yield shown
        finally:
            shown.close()

    @contextmanager
    def counting(self, description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A callback (done, total) for work that may turn out to need no telling: the bar starts with its first call."""
        shown: list[Progress] = []

        def tell(done: int, total: int) -> None:
            if not shown:
                shown.append(Progress(description, total, unit, self.quiet))
            shown[0].advance(done - shown[0].done)

        try:
            yield tell
        finally:
            for progress in shown:
                progress.close()


class Progress:
    """Counts what is done; made by `Console.progress`."""

    def __init__(self, description: str, total: int | None, unit: str, quiet: bool) -> None:
        self.done = 0
        self._description, self._total, self._unit, self._quiet = description, total, unit, quiet
        self._told, self._since = 0, time.monotonic()
        self._bar: Any = None
        if not quiet and is_terminal(sys.stdout):
            _attempt(self._draw)

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        if self._bar is not None:
            if not _attempt(lambda: self._bar.update(0, completed=self.done)):
                self._stop()
        elif self._total and 10 * self.done // self._total > 10 * self._told // self._total and self.done < self._total:
            self._tell()

    def close(self) -> None:
        """Remove the bar; leave one line that says what was done and how long it took."""
        self._stop()
        self._tell(f" in {human_duration(time.monotonic() - self._since)}")

    def _draw(self) -> None:
        import rich.progress as parts

        columns = (parts.TextColumn("{task.description}", markup=False), parts.BarColumn(), parts.MofNCompleteColumn())
        bar = parts.Progress(
            *columns, parts.TextColumn(self._unit, markup=False), parts.TimeRemainingColumn(), transient=True
        )
        bar.add_task(self._description, total=self._total)
        bar.start()
        self._bar = bar

    def _stop(self) -> None:
        if self._bar is not None:
            _attempt(self._bar.stop)
            self._bar = None

    def _tell(self, ending: str = "") -> None:
        self._told = self.done
        if not self._quiet:
            whole = f"/{self._total}" if self._total else ""
            write_line(sys.stdout, f"{self._description}: {self.done}{whole} {self._unit}{ending}")


_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("images", "images", human_count),
    ("loss", "loss", lambda value: f"{value:.4f}"),
    ("lr", "lr", lambda value: f"{value:.2e}"),
    ("grad_norm", "grad norm", lambda value: f"{value:.3f}"),
    ("images_per_s", "images/s", lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.2f}"),
    ("memory_bytes", "memory", human_bytes),
)
"""Key of a record, its caption, how it is written."""


class TrainingDisplay:
    """Training as it goes: a live panel on a terminal, a line an update elsewhere, nothing when `quiet`.

    `update` takes a line of metrics.jsonl: step, images, loss, lr, grad_norm, images_per_s, memory_bytes; what is absent is left out.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._step, self._quiet, self._clock = total_steps, start_step, quiet, clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=20)
        self._live: Any = None

    def __enter__(self) -> Self:
        self._marks.append((self._clock(), self._step))
        if not self._quiet and is_terminal(sys.stdout):
            _attempt(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def update(self, record: Mapping[str, float]) -> None:
        """Show a record; never raises for what it holds or for where it is shown."""
        _attempt(lambda: self._update(record))

    def eta_s(self) -> float:
        """Seconds to the last step at the pace of the latest updates; infinite when there is none."""
        (before, first), (now, last) = self._marks[0], self._marks[-1]
        return (self._total - last) * (now - before) / (last - first) if last > first else math.inf

    def _update(self, record: Mapping[str, float]) -> None:
        self._step = int(record.get("step", self._step))
        self._marks.append((self._clock(), self._step))
        if self._quiet:
            return
        facts = [(caption, write(record[key])) for key, caption, write in _SHOWN if key in record]
        facts.append(("ETA", human_duration(self.eta_s())))
        if self._live is not None and not _attempt(lambda: self._live.update(self._panel(facts))):
            self._stop()
        if self._live is None:
            write_line(
                sys.stdout,
                "  ".join([f"step {self._step}/{self._total}", *(f"{name} {value}" for name, value in facts)]),
            )

    def _start(self) -> None:
        from rich.live import Live

        live = Live(self._panel([]), refresh_per_second=4)
        live.start()
        self._live = live

    def _stop(self) -> None:
        if self._live is not None:
            _attempt(self._live.stop)
            self._live = None

    def _panel(self, facts: Sequence[tuple[str, str]]) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid(expand=True)
        rows.add_row(ProgressBar(total=max(1, self._total), completed=self._step))
        rows.add_row(Text("   ").join(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in facts))
        return Panel(rows, title=f"step {self._step}/{self._total}", title_align="left")


def _attempt(draw: Callable[[], object]) -> bool:
    """Whether drawing worked (rich ends the program when it meets a closed pipe)."""
    try:
        draw()
    except (Exception, SystemExit):
        return False
    return True


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(Text(column))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    RichConsole(file=sys.stdout).print(table)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    aligned = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return [title, *aligned] if title else aligned
