"""Promises about the package as a whole: its public names, light doors, sizes, lock, licences, and the wheel."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ddpm
from ddpm.doctor import machine

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "ddpm").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"torch", "matplotlib", "scipy", "PIL", "rich"}
LIGHT = PROJECT["tool"]["importlinter"]["contracts"][1]["source_modules"]
COMMANDS = [
    (["--help"], 0, HEAVY | {"numpy", "pydantic", "yaml"}),
    (["train", "--help"], 0, HEAVY),
    (["sample", "--help"], 0, HEAVY),
    (["edit", "inpaint", "--help"], 0, HEAVY),
    (["trian"], 2, HEAVY | {"pydantic"}),
    (["train", "digits", "--bacth-size", "3"], 2, HEAVY),
    (["train", "digits", "--lr", "-1"], 2, HEAVY),
]
Run = Callable[..., subprocess.CompletedProcess[str]]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, timeout=60)


def imported(importtime: str) -> set[str]:
    """Top-level names of all modules in a report of `python -X importtime`."""
    return {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in importtime.splitlines()
        if line.startswith("import time:")
    }


def test_public_names_exist_and_are_documented() -> None:
    assert ddpm.__all__
    assert set(ddpm.__all__) <= set(dir(ddpm))
    for name in ddpm.__all__:
        assert getattr(ddpm, name).__doc__ or name == "__version__", f"ddpm.{name} has no docstring"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        ddpm.no_such_name  # noqa: B018


def test_importing_the_package_is_light() -> None:
    done = python("-X", "importtime", "-c", "import ddpm")
    assert done.returncode == 0
    assert imported(done.stderr) & (HEAVY | {"numpy", "pydantic"}) == set()


@pytest.mark.parametrize("module", LIGHT)
def test_modules_behind_help_and_mistakes_leave_torch_alone(module: str) -> None:
    done = python("-X", "importtime", "-c", f"import {module}")
    assert done.returncode == 0
    assert "torch" not in imported(done.stderr)


@pytest.mark.parametrize(("words", "code", "heavy"), COMMANDS, ids=[" ".join(words) for words, *_ in COMMANDS])
def test_help_and_mistakes_are_instant(words: list[str], code: int, heavy: set[str]) -> None:
    done = python("-X", "importtime", "-m", "ddpm", *words)
    assert done.returncode == code, done.stderr[-500:]
    assert imported(done.stderr) & heavy == set()


def test_a_misspelt_flag_is_one_sentence_with_the_right_one(run_ddpm: Run) -> None:
    done = run_ddpm("train", "digits", "--bacth-size", 3)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "'--bacth-size'" in line
    assert "'--batch-size'" in line


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_documented_and_of_a_readable_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    assert len(text.splitlines()) <= 500
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80] == []


def test_the_doctor_knows_every_optional_package() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    named = {re.split(r"[<>=]", line)[0] for extra, lines in extras.items() if extra != "dev" for line in lines}
    assert set(machine.EXTRAS) | {"torchvision"} == named


def test_the_metadata_carries_the_packages_version(tmp_path: Path) -> None:
    from hatchling.build import prepare_metadata_for_build_wheel

    folder = tmp_path / prepare_metadata_for_build_wheel(str(tmp_path))
    assert f"\nVersion: {ddpm.__version__}\n" in (folder / "METADATA").read_text(encoding="utf-8")


def test_every_asset_is_named_in_the_notice() -> None:
    notice = (ROOT / "NOTICE").read_text()
    assets = [path for path in (ROOT / "ddpm/assets").iterdir() if path.is_file() and path.suffix != ".py"]
    assert [path.name for path in assets if f"ddpm/assets/{path.name}" not in notice] == []
    assert "10.24432/C50P49" in notice


def test_the_lock_is_hashed_and_leaves_torch_to_the_platform() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^([a-z0-9-]+)==\S+.*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[^#\s]", text, re.MULTILINE)) > 50
    names = {name for name, _ in pins}
    assert {"numpy", "pydantic", "pytest"} <= names
    assert not names & {"torch", "torchvision", "triton"}
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py"]
    assert "://" not in text


def tracked_text() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes())[:8192]:
            yield name, data.decode("utf-8")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_a_private_path_or_a_package_index() -> None:
    folders = "|".join(["work", "root", "farm"])
    hosts = "|".join(["py" + "pi", "python" + "hosted", "npm" + "js", "deb[.]" + "debian", "download[.]py" + "torch"])
    private = re.compile(rf"(?<![\w.}}$~-])/(?:{folders})/|\b(?:{hosts})\.(?:org|com|net)\b")
    found = [f"{name}: {match.group()}" for name, text in tracked_text() for match in private.finditer(text)]
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_from_an_empty_folder(tmp_path: Path) -> None:
    """Built, installed without this checkout in sight, it trains two steps on the embedded digits and samples."""
    site = Path(importlib.util.find_spec("torch").origin).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*command: object, cwd: Path = empty) -> str:
        done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").iterdir()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    own = Path(
        run(tmp_path / "venv/bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (own / "shared.pth").write_text(f"{site}\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        tmp_path / "venv/bin/python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    )

    where = run(tmp_path / "venv/bin/python", "-c", "import ddpm; print(ddpm.__file__)")
    assert Path(where.strip()).is_relative_to(own)
    command = tmp_path / "venv/bin/ddpm"
    assert "usage: ddpm" in run(command, "--help")
    assert run(command, "--version").strip() == ddpm.__version__
    run(command, "train", "digits", "--steps", 2, "--run-dir", "two-steps")
    run(command, "sample", "two-steps", "--num-images", 4, "--sampler", "ddim:steps=2", "--out", "images")
    assert len(list((empty / "images").rglob("*.png"))) >= 4
