"""What every test starts from: one thread, no network, no display, and nothing of the user's own settings or caches."""

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ddpm.data import ImageSet

ROOT = Path(__file__).parent.parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")

# A shell's background job ignores Ctrl-C, and processes inherit that; the tests' own must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
)

LEAKY_PREFIXES = ("DDPM_", "MASTER_", "SLURM_", "TORCHELASTIC_", "WANDB_API")
LEAKY = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NO_COLOR", "FORCE_COLOR"}


KINDS = {"exact": 1e-5, "order": 0.3, "statistical": 4.0}
"""Kinds of evidence and the widest tolerance of each: largest difference; |slope - theory|; |z|."""
_ROWS: list[dict[str, Any]] = []


@pytest.fixture
def exactness(request: pytest.FixtureRequest) -> Callable[[str, str, str, float, float], None]:
    """exactness(component, oracle, kind, difference, tolerance): assert it, and make it a row of docs/exactness.json."""

    def record(component: str, oracle: str, kind: str, difference: float, tolerance: float) -> None:
        assert tolerance <= KINDS[kind], f"{kind}: {tolerance} is wider than {KINDS[kind]}"
        row = {"component": component, "oracle": oracle, "kind": kind}
        row |= {"difference": float(difference), "tolerance": float(tolerance), "test": request.node.nodeid}
        request.node.user_properties.append(("exactness", row))
        assert difference <= tolerance, row

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exactness-out", type=Path, help="write the rows of the exactness fixture to DIR/exactness.*")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _ROWS.extend(row for name, row in report.user_properties if name == "exactness")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the table (where every test passed: a partial one would mislead)."""
    out = session.config.getoption("--exactness-out")
    if out is None or exitstatus != 0 or hasattr(session.config, "workerinput"):
        return
    rows = sorted(_ROWS, key=lambda row: (row["component"], row["oracle"], row["test"]))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy", "scipy")}
    facts = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), **versions}
    (out / "exactness.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Exactness",
        "",
        "Written by `make exactness`: every row is asserted by a test, each time the tests run.",
        "",
    ]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items()) + f"; {len(rows)} rows.", ""]
    lines += ["| component | oracle | kind | difference | tolerance |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        numbers = f"{row['difference']:.2g} | {row['tolerance']:.2g}"
        lines.append(f"| {row['component']} | {row['oracle']} | {row['kind']} | {numbers} |")
    (out / "exactness.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, by name, what Debian's data set is needed for where it is missing; for the table of evidence run its tests alone."""
    if config.getoption("--exactness-out") is not None:
        items[:] = [item for item in items if "exactness" in getattr(item, "fixturenames", ())]
    if FASHION_MNIST.exists():
        return
    missing = pytest.mark.skip(reason=f"{FASHION_MNIST} is missing: apt-get install dataset-fashion-mnist")
    for item in items:
        if item.get_closest_marker("fashion"):
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Own cache and data folders, no variable that steers ddpm or a launcher, and one torch thread."""
    for name in list(os.environ):
        if name in LEAKY or name.startswith(LEAKY_PREFIXES):
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("DDPM_CACHE", str(home / "cache"))
    monkeypatch.setenv("DDPM_DATA", str(home / "data"))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> "ImageSet":
    """All 1,797 embedded digits: `.images` uint8 (N, 1, 8, 8), `.labels` int64 (N,)."""
    from ddpm.config import DataConfig  # here, so that tests without images stay light
    from ddpm.data import load_dataset

    return load_dataset(DataConfig(dataset="digits", split="all"))


@pytest.fixture
def run_ddpm(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_ddpm("train", "--steps", 2, cwd=..., env={...})`: `python -m ddpm` in a process of its own, output as text."""

    def run(
        *args: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 110
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ddpm", *map(str, args)]
        return subprocess.run(
            command,
            cwd=cwd or tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
