"""The documents' commands work as typed.

Every block fenced as `bash` in README.md and docs/*.md runs, a document's blocks one after another in one copy of the
checkout. Blocks fenced as `bash slow` run in `make test-docs` only; commands that cannot run here (an installation, a
cluster) are fenced as `console`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
FENCE = re.compile(r"^( *)```bash( slow)?[ ]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
NOT_COPIED = {"build", "cifar_test", "cifar_train", "data", "dist", "logs", "runs", "samples", "wandb"}


class Block(NamedTuple):
    """A fenced block: its first line in the document, whether it is slow, its commands."""

    line: int
    slow: bool
    commands: str


def blocks(text: str) -> list[Block]:
    found = FENCE.finditer(text)
    return [Block(text.count("\n", 0, match.start()) + 2, match[2] is not None, match[3]) for match in found]


def documents(slow: bool) -> list[Path]:
    """Documents with something to run: any block, or a quick one."""
    return [
        path for path in DOCUMENTS if any(slow or not block.slow for block in blocks(path.read_text(encoding="utf-8")))
    ]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout as git would give it, and a `ddpm` that is this one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name not in NOT_COPIED and not path.name.startswith("."):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, folder)
    command = tmp_path / "bin" / "ddpm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ddpm "$@"\n')
    command.chmod(0o755)
    return folder


def run(document: Path, checkout: Path, slow: bool) -> None:
    path = os.pathsep.join([str(checkout.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in blocks(document.read_text(encoding="utf-8")):
        if block.slow and not slow:
            continue
        command = ["bash", "-euo", "pipefail", "-c", block.commands]
        done = subprocess.run(
            command,
            cwd=checkout,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (
            f"{document.name}:{block.line} left {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


@pytest.mark.timeout(400)
@pytest.mark.parametrize("document", documents(slow=False), ids=lambda path: path.name)
def test_quick_blocks_run(document: Path, checkout: Path) -> None:
    run(document, checkout, slow=False)


@pytest.mark.docs
@pytest.mark.parametrize("document", documents(slow=True), ids=lambda path: path.name)
def test_all_blocks_run(document: Path, checkout: Path) -> None:
    run(document, checkout, slow=True)


def test_the_readme_has_commands_that_run() -> None:
    assert blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def test_blocks_are_found_by_their_fence() -> None:
    text = (
        "a\n```bash\none\n```\n- b\n  ```bash slow\n  two\n  three\n  ```\n```console\n$ no\n```\n```python\nno\n```\n"
    )
    assert blocks(text) == [Block(3, False, "one\n"), Block(7, True, "  two\n  three\n")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []
