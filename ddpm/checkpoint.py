"""Checkpoints: folders of safetensors that appear whole or not at all, with a manifest that tells when they are damaged.

checkpoints/step-00005000/   model.safetensors  ema-<name>.safetensors  optimizer.safetensors  state.safetensors
                             state.json  config.yaml  MANIFEST.json (sizes and sha256 of the others, written last)
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm import files
from ddpm.config import RunConfig, build, read_yaml, to_yaml
from ddpm.errors import CheckpointError, ConfigError, DataError

FORMAT = 1
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "eps_square", "losses", "counts")
_STATE = {"step": int, "images": int, "shape": list, "classes": list, "emas": list, "data": dict}
"""What every state.json holds, and of which type."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found whole: its folder, step and state.json."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def emas(self) -> list[str]:
        """Names of the moving averages it holds, the default first."""
        return [str(name) for name in self.state["emas"]]

    def config(self) -> RunConfig:
        """The config of the run that wrote it."""
        try:
            return build(read_yaml(self.path / "config.yaml"), str(self.path / "config.yaml"))
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: its config cannot be used: {error}") from None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, on the CPU."""
        path = self.path / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from None

    def parameters(self) -> int:
        """Numbers in `model.safetensors` by its header, without statistics: buffers, not weights."""
        path = self.path / "model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.rpartition(".")[2] not in _STATISTICS]  # noqa: SIM118
                return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from None


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return checkpoints / f"step-{step:08d}"


def save(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: RunConfig,
) -> Path:
    """Write a checkpoint: built beside, synced, renamed into place.

    Args:
        checkpoints: the run's `checkpoints/` folder.
        step: optimizer steps done.
        tensors: file name (without suffix) -> tensors by name.
        state: JSON values; gets `format` and `step`.
        config: of the run.

    A whole checkpoint of this step that stands already is kept: a run's step determines it.
    Raises DataError (disk full, not writable); then nothing is left behind and older checkpoints are as they were.
    """
    target = step_folder(checkpoints, step)
    if _is_whole(target):
        return target
    size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    needed = math.ceil((size * 1.02 + 1_000_000) / 100_000) * 100_000  # room for headers and the other files
    if (free := files.free_bytes(checkpoints) // 100_000 * 100_000) < needed:
        raise DataError(
            f"{target}: needs {needed / 1e6:.1f} MB but only {free / 1e6:.1f} MB are free; free some space."
        )
    with files.atomic_folder(target) as folder:
        (folder / "state.json").write_text(
            json.dumps({"format": FORMAT, "step": step, **state}, indent=1), encoding="utf-8"
        )
        for name, group in tensors.items():
            path = folder / f"{name}.safetensors"
            _save_tensors(path, group)
            shutil.copymode(folder / "state.json", path)  # safetensors makes its files private
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(_manifest_text({"format": FORMAT, "files": manifest}), encoding="utf-8")
    return target


def load(path: Path) -> Checkpoint:
    """A checkpoint folder, checked against its manifest; raises CheckpointError that names the damaged file."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        rows = [(str(name), int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()]
        newer = manifest["format"] > FORMAT
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is no whole checkpoint (no {MANIFEST}).") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: is damaged ({type(error).__name__}).") from None
    if newer:
        raise CheckpointError(
            f"{path}: was written by a newer ddpm (format {manifest['format']}, this one reads {FORMAT}); upgrade ddpm."
        )
    if text != _manifest_text(manifest) or manifest["format"] < 1:
        raise CheckpointError(f"{path / MANIFEST}: is damaged (it is not as it was written).")
    if not {"model.safetensors", "state.json", "config.yaml"} <= {name for name, _, _ in rows}:
        raise CheckpointError(f"{path / MANIFEST}: is damaged (files are missing from its list).")
    for name, size, digest in rows:
        _check_file(path / name, size, digest)
    state = _read_state(path / "state.json")
    return Checkpoint(path, state["step"], state)


def listing(checkpoints: Path) -> list[Path]:
    """Checkpoint folders by step, newest first; whether they are whole is not looked at."""
    found = [
        (int(match[1]), path)
        for path in checkpoints.glob("step-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def latest(checkpoints: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None; each damaged one passed over is told of."""
    for path in listing(checkpoints):
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"{error} The checkpoint before it is used.")
    return None


def prune(checkpoints: Path, keep_last: int, keep_every: int, keep: Collection[Path]) -> None:
    """Remove old checkpoints: all but the `keep_last` newest, those in `keep`, and those whose step `keep_every` divides."""
    for path in listing(checkpoints)[keep_last:]:
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if path not in keep and not (keep_every and int(match[1]) % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__}).") from None
    for key, kind in _STATE.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise CheckpointError(f"{path}: has no {key!r} that can be used; this is no checkpoint of a run.")
    if [type(side) for side in state["shape"]] != [int] * 3:
        raise CheckpointError(f"{path}: its 'shape' is not three whole numbers.")
    for key in ("name", "images", "fingerprint"):
        if key not in state["data"]:
            raise CheckpointError(f"{path}: its 'data' has no {key!r}; this is no checkpoint of a run.")
    return state  # type: ignore[no-any-return]


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path)
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be written ({error}).") from None


def _check_file(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing.")
    if path.stat().st_size != size:
        raise CheckpointError(f"{path}: is damaged (it has {path.stat().st_size} bytes, its manifest says {size}).")
    if files.sha256(path) != digest:
        raise CheckpointError(f"{path}: is damaged (its contents do not match the manifest's sha256).")
