"""What a foreign format is: how its files are told from others, read, and written.

A file is opened once, as a `Source`, in which nothing is ever executed: PyTorch files are read as tensors and plain values
alone, anything else in them is refused. A format turns it into a `Snapshot`, a checkpoint in our own terms.
"""

import io
import json
import zipfile
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import CheckpointError, ConfigError
from ddpm.files import reason
from ddpm.registry import Component

State = Mapping[str, Tensor]
"""Tensors by name."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checkpoint of any program in our own terms.

    Attributes:
        model, diffusion: the network, and the diffusion it was trained for.
        shape: (C, H, W) of the images.
        classes: their names; () without.
        weights: of the network, by our names (those of its state_dict).
        emas: moving averages by decay, such as "0.9999", in the order of preference; each like `weights`.
        optimizer: Adam's tensors, "<name>.exp_avg", "<name>.exp_avg_sq" and "<name>.step"; {} where there are none.
        step: optimizer steps done; 0 where it is not known.
        sampler: how that program draws, as a spec.
        data: fields of DataConfig that the format says or implies, such as {"dataset": "cifar10"}.
        train: fields of TrainConfig that the format says or implies, such as {"lr": 2e-4}.
        notes: sentences for the user, on what was assumed.
    """

    model: ModelConfig
    diffusion: DiffusionConfig
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    weights: dict[str, Tensor]
    emas: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    sampler: str = "ddpm"
    data: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """The nested fields of a RunConfig that the snapshot decides."""
        return {
            "data": {"dataset": "folder", **self.data},  # a folder is not taken for granted: it needs its path
            "model": self.model.model_dump(),
            "diffusion": self.diffusion.model_dump(),
            "train": {**self.train, "ema": tuple(self.emas)},
            "sample": {"sampler": self.sampler},
        }


@dataclass(frozen=True)
class Source:
    """A file or a folder that may be a foreign checkpoint; its contents are read once, on use, and never executed."""

    path: Path

    @cached_property
    def content(self) -> Any:
        """What a PyTorch file holds (tensors on the CPU, containers, plain values), or the arrays of an npz or safetensors file.

        Raises CheckpointError where it is none of these, or holds anything else.
        """
        try:
            with self.path.open("rb") as file:
                head = file.read(8)
            if self.path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(self.path)
            if self._is_npz(head):
                with np.load(self.path, allow_pickle=False) as arrays:
                    return {name: arrays[name] for name in arrays.files}
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({reason(error)}).") from None
        except Exception as error:  # a damaged or a hostile file raises what it likes
            raise CheckpointError(
                f"{self.path}: is no checkpoint of tensors and plain values ({reason(error)}); nothing in it was executed."
            ) from None

    def _is_npz(self, head: bytes) -> bool:
        if not head.startswith(b"PK"):
            return False
        with zipfile.ZipFile(self.path) as members:
            return all(name.endswith(".npy") for name in members.namelist())

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.path.is_dir()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object in a folder; raises CheckpointError."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name}: cannot be read ({reason(error)}).") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / name}: is no JSON object.")
        return found

    def state(self, value: Any, what: str) -> dict[str, Tensor]:
        """A value as tensors by name; raises CheckpointError."""
        if not isinstance(value, Mapping) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
            raise CheckpointError(f"{self.path}: {what} are no tensors by name.")
        return {str(name): tensor.detach() for name, tensor in value.items()}


class Format(Component, kind="format"):
    """A foreign format. Options say what its files leave open, such as the schedule."""

    title: ClassVar[str]
    """What people call it."""

    @abstractmethod
    def matches(self, source: Source) -> bool:
        """Whether a source looks like this format, by its contents; may raise CheckpointError where it cannot be read."""

    @abstractmethod
    def load(self, source: Source) -> Snapshot:
        """Read it; raises CheckpointError (damaged, of another architecture), ConfigError (an option does not fit it)."""

    def save(self, snapshot: Snapshot, path: Path) -> None:
        """Write a snapshot so that the other program can read it, whole or not at all.

        Raises ConfigError where the format cannot hold it, DataError where it cannot be written.
        """
        raise ConfigError(f"--format {self.name}: cannot be written, only read; choose from {', '.join(writable())}.")


def writable() -> list[str]:
    """Formats that can be written."""
    return [name for name, cls in sorted(Format.registered.items()) if cls.save is not Format.save]  # type: ignore[attr-defined]


def identify(source: Source) -> Format:
    """The format of a file or a folder by its contents; raises CheckpointError where none fits."""
    for cls in Format.registered.values():
        candidate = cls()
        assert isinstance(candidate, Format)
        if candidate.matches(source):
            return candidate
    known = ", ".join(str(cls.title) for cls in Format.registered.values())  # type: ignore[attr-defined]
    raise CheckpointError(
        f"{source.path}: is no checkpoint of a known program ({known}); name its format with --format, or convert it first."
    )


def torch_bytes(content: Any) -> bytes:
    """A PyTorch file of a value."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
