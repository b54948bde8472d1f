"""Folders of images that a verb made: each holds one recipe, recipe.json, and no other's files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ddpm import files, rundir
from ddpm.errors import DataError
from ddpm.runs.loading import Model

LOCK = ".lock"
"""Held in the folder by who changes files that several calls share."""


def default(model: Model, kind: str, name: str, recipe: dict[str, Any]) -> Path:
    """runs/NAME/<kind>/<name>-<step>-<digest of the recipe>: a folder for every recipe."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:6]
    home = model.source.parent.parent if model.source.parent.name == "checkpoints" else Path()
    return home / kind / f"{name}-{model.step:08d}-{digest}"


def claim(target: Path, verb: str, recipe: dict[str, Any], seeds: range | None = None) -> str:
    """Make the folder ours: new, or holding images of this very recipe; the suffix of files of these seeds together.

    Raises DataError: it holds another recipe's images, or files that `ddpm VERB` did not write.
    """
    _read_claim(target, verb, recipe)
    mine = {} if seeds is None else {"seeds": [seeds.start, seeds.stop]}
    with files.Lock(target / LOCK, wait=True):
        held = _read_claim(target, verb, recipe)
        if held is None:
            rundir.write_json(target / "recipe.json", {**recipe, **mine})
    if seeds is None or held is None or held.get("seeds") == mine["seeds"]:
        return ""
    return f"-{seeds[0]:06d}-{seeds[-1]:06d}"


def _read_claim(target: Path, verb: str, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """recipe.json, None in a new folder; raises DataError where the folder is not to be used."""
    path = target / "recipe.json"
    try:
        held = rundir.read_json(path) if path.exists() else None
        if held is None and target.is_dir() and any(inside.name != LOCK for inside in target.iterdir()):
            raise DataError(
                f"--out {target}: is not empty and was not written by `ddpm {verb}`; choose another folder."
            )
    except OSError as error:
        raise DataError(f"--out {target}: cannot be used ({files.reason(error)}); choose another place.") from None
    if held is None:
        return None
    same = isinstance(held, dict) and {**recipe, "seeds": None} == {**held, "seeds": None}
    if not same:
        differs = next((key for key in recipe if not isinstance(held, dict) or held.get(key) != recipe[key]), "it")
        raise DataError(f"--out {target}: holds images of another recipe ({differs} differs); choose another folder.")
    return dict(held)
