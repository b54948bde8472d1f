"""What happens beside the optimizer: metrics lines, checkpoints, and anything that runs every so many steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ddpm import checkpoint
from ddpm.config import RunConfig
from ddpm.errors import DataError
from ddpm.files import sync
from ddpm.rundir import RunDir, append_jsonl, read_json
from ddpm.training.trainer import StepResult, Trainer

Record = dict[str, float]


class Listener(Protocol):
    """Shown every line of metrics.jsonl: a display, a sink."""

    def __call__(self, record: Record) -> None:
        """Show or store a record."""


class Metrics:
    """A line of metrics.jsonl every `every` steps: means since the line before, by processes the same.

    The sums so far are part of a checkpoint, so a resumed run writes the very lines of one that never stopped
    (but for images_per_s, memory_bytes and seconds, which measure the machine).
    """

    def __init__(self, path: Path | None, every: int, listeners: Sequence[Listener]) -> None:
        self.path, self.every, self.listeners = path, every, listeners
        self.sums = torch.zeros(3, dtype=torch.float64)  # loss, gradient norm, steps
        self._seconds, self._steps = 0.0, 0

    def after(self, trainer: Trainer, result: StepResult) -> None:
        """Take the step in; write a line where one is due."""
        self._seconds, self._steps = self._seconds + result.seconds, self._steps + 1
        if not result.skipped:
            self.sums += torch.tensor([result.loss, result.grad_norm, 1.0], dtype=torch.float64)
        if result.step % self.every == 0 or result.step == trainer.config.steps:
            self._write(trainer, result)

    def _write(self, trainer: Trainer, result: StepResult) -> None:
        record: Record = {"step": result.step, "images": result.step * trainer.config.batch_size}
        loss, norm, steps = self.sums.tolist()
        if steps:
            record |= {"loss": loss / steps, "grad_norm": norm / steps}
        record["lr"] = result.lr
        if trainer.skipped:
            record["skipped"] = trainer.skipped
        record["images_per_s"] = self._steps * trainer.config.batch_size / max(self._seconds, 1e-9)
        record["memory_bytes"] = memory_bytes(trainer.runtime.device)
        record["seconds"] = self._seconds
        self._seconds, self._steps = 0.0, 0
        self.sums.zero_()
        for listener in self.listeners:
            listener(record)
        if self.path is not None:
            append_jsonl(self.path, record)

    def finish(self, trainer: Trainer) -> None:
        """Nothing is owed: what is left of a window is in the checkpoint."""


class Checkpoints:
    """Saves every `train.checkpoint_every` steps and when training ends or stops; the main process writes.

    A save that fails on the way (a full disk) is told of and training goes on; the last one raises.
    """

    def __init__(
        self, run: RunDir, config: RunConfig, facts: dict[str, Any], metrics: Metrics, warn: Callable[[str], None]
    ) -> None:
        self.run, self.config, self.facts, self.metrics, self.warn = run, config, facts, metrics, warn
        self.saved_step = -1

    def after(self, trainer: Trainer, result: StepResult) -> None:
        """Save where a checkpoint is due."""
        if trainer.world.is_main and result.step % self.config.train.checkpoint_every == 0:
            try:
                self.save(trainer)
            except DataError as error:
                self.warn(f"checkpoint of step {result.step} not saved: {error} Training goes on.")

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint now, the metrics lines before it safe on disk first; raises DataError."""
        sync(self.run.metrics)
        tensors = {**trainer.tensors(), "state": {"metrics.sums": self.metrics.sums}}
        state = {**trainer.state(), **self.facts}
        path = checkpoint.save(self.run.checkpoints, trainer.step, tensors, state, self.config)
        self.saved_step = trainer.step
        train = self.config.train
        checkpoint.prune(self.run.checkpoints, train.keep_last, train.keep_every, keep=[path, *self._best()])
        self.run.event("saved", step=trainer.step, path=path.name)
        return path

    def _best(self) -> list[Path]:
        """The checkpoint that best.json names, if there is one: it is not to be removed."""
        held = read_json(self.run.best)
        return [checkpoint.step_folder(self.run.checkpoints, int(held["step"]))] if held else []

    def restore(self, trainer: Trainer, found: checkpoint.Checkpoint) -> None:
        """Put a checkpoint into the trainer and the metrics; raises CheckpointError."""
        trainer.load(found.step, found.state, found.tensors)
        self.metrics.sums.copy_(found.tensors("state")["metrics.sums"])
        self.saved_step = found.step

    def finish(self, trainer: Trainer) -> None:
        """Save the last step, unless it stands already."""
        if trainer.world.is_main and self.saved_step != trainer.step:
            self.save(trainer)


class Every:
    """An action of the main process every so many steps, and at the last one: draw a preview, score the model."""

    def __init__(self, every: int, action: Callable[[Trainer], None]) -> None:
        self.every, self.action = every, action

    def after(self, trainer: Trainer, result: StepResult) -> None:
        """Act where it is due."""
        due = self.every and (result.step % self.every == 0 or result.step == trainer.config.steps)
        if due and trainer.world.is_main:
            self.action(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Nothing is owed."""


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
