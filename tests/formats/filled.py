"""Weights by a rule, so that foreign networks can be compared with while only names, shapes and outputs are stored.

How `data/NAME.json` was made: the program named in its "program" was run as it is at that commit, its network built with the
options in "options" and put into eval mode, and every tensor of its state dict replaced by `filled(name, shape)` (but for
fixed tables and schedules, which "kept" names). "output" is what it gave for x = `filled("x", shape of x)` at the times "t" (and
labels "y"); "sample" is what its own sampling loop gave from `filled("x_T", ...)`, where the noise of timestep k was
`filled("noise k", ...)`. "full" has the CIFAR-10 network the same way, of whose output evenly spaced values are kept.
"""

import contextlib
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm import cli

DATA = Path(__file__).parent / "data"


def filled(name: str, shape: Sequence[int]) -> Tensor:
    """Normal numbers from the name: matrices and kernels scaled by 1 / sqrt(fan-in), norms around 1, biases small."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    found = torch.from_numpy(numbers)
    if name == "x" or name == "x_T" or name.startswith("noise "):
        return found
    if len(shape) > 1:
        return found / math.sqrt(math.prod(shape[1:]))
    return found * 0.1 + (1.0 if name.endswith("weight") else 0.0)


def state(tensors: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict by the rule."""
    return {name: filled(name, shape) for name, shape in tensors.items()}


def stored(name: str) -> dict[str, Any]:
    """data/NAME.json."""
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return found


def difference(found: Tensor, expected: Any) -> float:
    """The largest difference over the largest value."""
    wanted = torch.as_tensor(expected, dtype=torch.float64).reshape(found.shape)
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


class Trap:
    """Makes a file when it is unpickled by an unpickler that calls what it is told to."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def hostile(path: Path, content: Any, mark: Path) -> None:
    """Save content with a trap in it, and assert that loading it, by name or by content, refuses it and springs nothing."""
    held = [*content, Trap(mark)] if isinstance(content, list) else {**content, "more": Trap(mark)}
    torch.save(held, path)
    for words in (
        ["info"],
        ["sample", "--out", str(path.parent / "out")],
        ["import", "--run-dir", str(path.parent / "run")],
    ):
        done = io.StringIO()
        with contextlib.redirect_stderr(done):
            assert cli.main([words[0], str(path), *words[1:]]) == 4
        (line,) = done.getvalue().splitlines()
        assert str(path) in line
        assert "nothing in it was executed" in line
        assert len(line) < 400
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()
