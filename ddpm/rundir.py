"""A run on disk: the names of its files, its lock, its config and its JSON-lines records.

runs/<name>/config.yaml env.json lock metrics.jsonl events.jsonl evaluations.jsonl best.json sampling.json skipped.csv checkpoints/ samples/
"""

import csv
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm import files
from ddpm.config import RunConfig, build, read_yaml, to_yaml
from ddpm.errors import DataError


class RunDir:
    """A run folder; making one touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "env.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.best = path / "best.json"
        self.sampling = path / "sampling.json"
        self.skipped = path / "skipped.csv"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def create(self) -> None:
        """Make the folder and check that it can be written to; raises DataError."""
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"--run-dir {self.path}: is a file, not a folder; choose another name.")
        if self.path.is_dir() and not self.config.exists() and self._holds_files():
            raise DataError(
                f"--run-dir {self.path}: holds files but no run (no config.yaml); choose an empty or a new folder."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.samples.mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(
                f"--run-dir {self.path}: cannot be written to ({error.strerror}); choose another folder."
            ) from None

    def _holds_files(self) -> bool:
        """Whether there is more than what a start that was killed leaves: empty folders, the lock, temporaries."""
        return any(not p.is_dir() and p.name != "lock" and not p.match(".*.tmp-*") for p in self.path.rglob("*"))

    def discard(self) -> None:
        """Remove what `create` and `lock` made where no run was started; only for who holds the lock."""
        if not self.config.exists():
            with suppress(OSError):
                (self.path / "lock").unlink()
                for folder in (self.checkpoints, self.samples, self.path):
                    folder.rmdir()

    def clean(self) -> None:
        """Remove what killed processes left half-written; only for who holds the lock."""
        for folder in (self.path, self.checkpoints, self.samples):
            files.remove_leftovers(folder)

    def lock(self) -> files.Lock:
        """The lock that one process group holds while it trains here."""
        return files.Lock(self.path / "lock")

    def read_config(self) -> RunConfig | None:
        """The config this run was started with, or None for a new folder."""
        try:
            return build(read_yaml(self.config), str(self.config)) if self.config.exists() else None
        except OSError as error:
            raise DataError(
                f"--run-dir {self.path}: cannot be used ({error.strerror}); choose another folder."
            ) from None

    def write_config(self, config: RunConfig) -> None:
        """Record the resolved config."""
        files.write_text(self.config, to_yaml(config))

    def event(self, kind: str, **facts: Any) -> None:
        """Append to events.jsonl: started, resumed, saved, warned, stopped, finished."""
        append_jsonl(self.events, {"time": now(), "event": kind, **facts})

    def write_skipped(self, rows: Iterable[tuple[str, str]]) -> None:
        """Write skipped.csv: the images left out, and why."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["path", "reason"])
        writer.writerows(rows)
        files.write_text(self.skipped, table.getvalue())


def valid_name(name: str) -> bool:
    """Whether a run may be called this: letters, digits, dot, dash, underscore; no leading dot; up to 100 characters."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) is not None


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, whole or not at all."""
    files.append_line(path, json.dumps(record, allow_nan=False))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, readable and whole."""
    files.write_text(path, json.dumps(value, indent=1) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSON-lines file; a torn last line and a missing file are no error."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop torn lines and those of steps after `last_step`, so that a resumed run repeats no step."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if record.get("step", 0) <= last_step]
        files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was made with: versions, machine, command. No environment variables: they may hold secrets."""
    versions = {}
    for name in ("openddpm", "torch", "numpy", "pillow", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "time": now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "pid": os.getpid(),
        "git_revision": _git_revision(),
        "versions": versions,
        **machine,
    }


def read_json(path: Path) -> Any:
    """A JSON file, or None where it is damaged or missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _git_revision() -> str | None:
    """The commit of the checkout this package runs from, "+" for local changes; None where it is no checkout."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        asked = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        revision, changes = (
            subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in asked
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.strip() + ("+" if changes.strip() else "")
