"""Where data is looked for, and where what was made from it is kept."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ddpm.errors import DataError
from ddpm.files import reason


def cache_root() -> Path:
    """$DDPM_CACHE, or ~/.cache/ddpm: holds what can be made again."""
    return _from_environment("DDPM_CACHE") or Path("~/.cache/ddpm").expanduser()


def data_root() -> Path:
    """$DDPM_DATA, or `data` in the cache: holds downloads, a folder per data set."""
    return _from_environment("DDPM_DATA") or cache_root() / "data"


def places(name: str, path: Path | None, *others: Path) -> Sequence[Path]:
    """Folders to look in for a data set, best first: --data.path alone, else others and $DDPM_DATA/name."""
    return [path.expanduser()] if path is not None else [*others, data_root() / name]


def download_place(name: str, path: Path | None, files: Collection[str]) -> Path:
    """Folder that a download of files goes to: --data.path, where it is an empty folder, else $DDPM_DATA/name.

    Raises DataError: --data.path is no folder, or holds anything but these files and their beginnings.
    """
    if path is None:
        return data_root() / name
    folder = path.expanduser()
    try:
        found = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        why = f"cannot be read ({reason(error)})"
    else:
        ours = {made for file in files for made in (file, f"{file}.part", f".{file}.lock")}
        if set(found) <= ours:
            return folder
        why = f"does not hold the files of {name} ({', '.join(files)})"
    raise DataError(
        f"--data.path {folder} {why}; name the folder that does, an empty one to download them to, or leave the flag out."
    )


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser() if value else None
