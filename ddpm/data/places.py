"""Where data is looked for, and where what was made from it is kept."""

import os
from collections.abc import Sequence
from pathlib import Path


def cache_root() -> Path:
    """$DDPM_CACHE, or ~/.cache/ddpm: holds what can be made again."""
    return _from_environment("DDPM_CACHE") or Path("~/.cache/ddpm").expanduser()


def data_root() -> Path:
    """$DDPM_DATA, or `data` in the cache: holds downloads, a folder per data set."""
    return _from_environment("DDPM_DATA") or cache_root() / "data"


def places(name: str, path: Path | None, *others: Path) -> Sequence[Path]:
    """Folders to look in for a data set, best first: --data.path, others, $DDPM_DATA/name."""
    return [*([path.expanduser()] if path is not None else []), *others, data_root() / name]


def download_place(name: str, path: Path | None) -> Path:
    """Folder that a download goes to: --data.path, else $DDPM_DATA/name."""
    return places(name, path)[0]


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser() if value else None
