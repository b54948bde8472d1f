"""The training loop: one code path for one process and many, and for any module that gives a loss per image."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm.config import TrainConfig
from ddpm.data.loader import Batch, Loader
from ddpm.distributed import World
from ddpm.errors import CheckpointError, ConfigError, DataError, DivergedError
from ddpm.images import to_float
from ddpm.randomness import Stream
from ddpm.runtime import Runtime
from ddpm.training.ema import EMA, parse_decays


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: its number (counted from 1), mean loss, gradient norm before clipping, learning rate, and the
    seconds it took with the wait for its batch (hooks not counted)."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    skipped: bool = False
    seconds: float = 0.0


class Hook(Protocol):
    """What is told of every step. `after` may save, draw or print; it must not touch the trainer's state."""

    def after(self, trainer: "Trainer", result: StepResult) -> None:
        """Called after each step. A DataError (a full disk) becomes a warning, and training goes on."""

    def finish(self, trainer: "Trainer") -> None:
        """Called once, when training ends, is stopped or has diverged."""


class Trainer:
    """Trains a module whose forward(images, labels, stream) returns a loss per image.

    A module with `observe` (not None) is told after each update of every image's loss: observe(losses, stream), with losses
    (B,) float64 of the whole global batch in order of place, and the stream of them all, on each process the same.

    Args:
        module: already on the device.
        loader: this process's part of every batch.
        config: optimisation.
        runtime: the machine.
        world: the processes.
        seed: of everything random.
        warn: told of what happened (running out of memory, a skipped step).
    """

    def __init__(
        self,
        module: nn.Module,
        loader: Loader,
        config: TrainConfig,
        runtime: Runtime,
        world: World,
        seed: int,
        warn: Callable[[str], None],
    ) -> None:
        if world.size > config.batch_size:
            raise ConfigError(
                f"--batch-size={config.batch_size} is smaller than the number of processes, {world.size}."
            )
        self.module, self.loader, self.config, self.runtime, self.world = module, loader, config, runtime, world
        self.seed, self.warn = seed, warn
        self.step, self.skipped, self.stopped = 0, 0, False
        self.should_stop: Callable[[], bool] = lambda: False
        self.emas = [EMA(module, decay, config.batch_size) for decay in parse_decays(config.ema)]
        if world.size > 1:  # of 1x1 convolutions, whose strides have several spellings for one order in memory
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        self.observe: Callable[[Tensor, Stream], None] | None = getattr(module, "observe", None)
        self.parallel: nn.Module = DistributedDataParallel(module) if world.size > 1 else module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = _make_optimizer(config, self.parameters)
        self.micro_batch = config.micro_batch or len(loader.places)

    def run(self, hooks: Sequence[Hook], should_stop: Callable[[], bool]) -> None:
        """Train to the config's last step, or until `should_stop` says so on any process.

        Raises DivergedError when a loss or gradient is NaN or infinite (and may not be skipped), before any update.
        """
        self.parallel.train()
        self.should_stop = should_stop
        start = time.perf_counter()
        try:
            for batch in self.loader.batches(self.step, self.config.steps):
                result, self.stopped = self.train_step(batch, should_stop())
                result = replace(result, seconds=time.perf_counter() - start)
                for hook in hooks:
                    self._tell(hook, result)
                start = time.perf_counter()
                if self.stopped:
                    break
        except DivergedError:
            _finish(hooks, self)
            raise
        _finish(hooks, self)

    def _tell(self, hook: Hook, result: StepResult) -> None:
        try:
            hook.after(self, result)
        except DataError as error:
            self.warn(f"step {result.step}: {error} Training goes on.")

    def train_step(self, batch: Batch, stop: bool = False) -> tuple[StepResult, bool]:
        """One optimizer step; returns it, and whether any process asked to stop."""
        lr = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = self._gradients(batch)
        shared = self.world.sum(self._shared(batch, losses, stop))
        loss = float(shared[0])
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf, foreach=True))
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            self.optimizer.step()
            for ema in self.emas:
                ema.update()
            self._observe(shared[2:])
        else:
            self._not_finite(batch, losses, loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepResult(self.step, loss, norm, lr, skipped=not good), bool(shared[1] > 0)

    def _shared(self, batch: Batch, losses: Tensor, stop: bool) -> Tensor:
        """What the processes add up: mean loss, stop flag, and for a module that observes the losses each in its place."""
        mean = losses.double().sum().item() / self.config.batch_size
        each = torch.zeros(self.config.batch_size if self.observe else 0, dtype=torch.float64)
        if self.observe:
            each[batch.places] = losses.double().cpu()
        return torch.cat([torch.tensor([mean, float(stop)], dtype=torch.float64), each])

    def _observe(self, losses: Tensor) -> None:
        if self.observe:
            device = self.runtime.device
            stream = Stream(self.seed, torch.arange(len(losses), device=device), step=self.step)
            self.observe(losses.to(device), stream)

    def _gradients(self, batch: Batch) -> Tensor:
        """Backward through the batch, in parts where memory asks; the loss of each of this process's images."""
        while True:
            try:
                return self._accumulate(batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.micro_batch == 1 or self.world.size > 1:
                    raise ConfigError(
                        f"out of memory with {self.micro_batch} images at a time; "
                        "use a smaller --train.micro-batch or --model.channels, or --model.gradient-checkpointing."
                    ) from error
                self.optimizer.zero_grad(set_to_none=True)
                self.micro_batch = -(-self.micro_batch // 2)
                if self.runtime.device.type == "cuda":
                    torch.cuda.empty_cache()
            self.warn(f"out of memory: going on with {self.micro_batch} images at a time, the same global batch.")

    def _accumulate(self, batch: Batch) -> Tensor:
        stream = Stream(self.seed, batch.places.to(self.runtime.device), step=self.step)
        losses, n = [], len(batch.images)
        for start in range(0, n, self.micro_batch):
            rows = slice(start, min(start + self.micro_batch, n))
            images = self.runtime.images(to_float(batch.images[rows].to(self.runtime.device)))
            labels = None if batch.labels is None else batch.labels[rows].to(self.runtime.device)
            if isinstance(self.parallel, DistributedDataParallel):
                self.parallel.require_backward_grad_sync = rows.stop == n
            with self.runtime.autocast():
                loss = self.parallel(images, labels, stream.select(rows))
            # DDP averages over processes; the mean over the global batch wants their sum.
            (loss.sum() * (self.world.size / self.config.batch_size)).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _not_finite(self, batch: Batch, losses: Tensor, loss: float, norm: float) -> None:
        bad = batch.indices[~torch.isfinite(losses.cpu())].tolist()
        images = (
            f"images {', '.join(map(str, bad[:8]))}{', ...' if len(bad) > 8 else ''}"
            if bad
            else "no single image's loss"
        )
        what = f"step {self.step + 1}: loss {loss:g}, gradient norm {norm:g} ({images})"
        allowed = 0 if self.config.nan == "stop" else int(self.config.nan.partition(":")[2])
        if self.skipped >= allowed:
            raise DivergedError(
                f"{what}; the weights were not updated with it, and stand saved: leave such steps out with --nan skip:N, or go back "
                "in a new run, by --name NEW --resume AN-OLDER-CHECKPOINT with a lower --lr or --precision float32."
            )
        self.skipped += 1
        self.warn(f"{what}: step left out ({self.skipped} of {allowed} allowed).")

    def drawing_weights(self) -> dict[str, Tensor]:
        """The weights that previews and scores are drawn by: the first moving average, or without one the model's own."""
        return self.emas[0].state() if self.emas else self.module.state_dict()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint holds, by file name."""
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        optimizer = {
            f"{name}.{key}": value
            for name, parameter in zip(names, self.parameters, strict=True)
            for key, value in self.optimizer.state[parameter].items()
        }
        return {
            "model": self.module.state_dict(),
            **{f"ema-{ema.name}": ema.state() for ema in self.emas},
            "optimizer": optimizer,
        }

    def state(self) -> dict[str, Any]:
        """The numbers beside the tensors, as JSON values."""
        return {
            "images": self.step * self.config.batch_size,
            "skipped": self.skipped,
            "micro_batch": self.micro_batch,
            "emas": [ema.name for ema in self.emas],
            "ema_updates": [ema.updates for ema in self.emas],
            "processes": self.world.size,
            "threads": self.runtime.threads,
        }

    def load(self, step: int, state: Mapping[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None:
        """Go on from a checkpoint; `tensors(name)` reads one of its files. Raises CheckpointError on a mismatch."""
        load_weights(self.module, tensors("model"))
        updates = dict(zip(state["emas"], state["ema_updates"], strict=True))
        for ema in self.emas:
            if ema.name not in updates:
                raise CheckpointError(
                    f"the checkpoint holds no moving average {ema.name} (--train.ema), but {', '.join(updates) or 'none'}."
                )
            ema.load(tensors(f"ema-{ema.name}"), updates[ema.name])
        saved = tensors("optimizer")
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        for name, parameter in zip(names, self.parameters, strict=True):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in saved]
            self.optimizer.state[parameter] = {key: _placed(saved[f"{name}.{key}"], parameter) for key in keys}
        self.step, self.skipped = step, int(state["skipped"])
        if self.config.micro_batch is None and state["processes"] == self.world.size:
            self.micro_batch = int(state["micro_batch"])


def _finish(hooks: Sequence[Hook], trainer: Trainer) -> None:
    for hook in hooks:
        hook.finish(trainer)


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a module; raises CheckpointError naming the first key that does not fit."""
    own = module.state_dict()
    for key in [*own, *state]:
        if key not in state or key not in own:
            raise CheckpointError(
                f"the checkpoint does not fit the model: {key} is {'missing' if key in own else 'not known'}."
            )
        if own[key].shape != state[key].shape:
            raise CheckpointError(
                f"the checkpoint does not fit the model: {key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}."
            )
    module.load_state_dict(dict(state))


def _placed(saved: Tensor, parameter: Tensor) -> Tensor:
    """A saved optimizer tensor on the parameter's device, in its memory layout where it has its shape."""
    return torch.empty_like(parameter).copy_(saved) if saved.shape == parameter.shape else saved.to(parameter.device)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step (counted from 0): a linear rise over the warm-up, then constant or falling to 0 at the end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[
        config.lr_schedule
    ]
    return config.lr * factor


def _make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    make: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return make(
        parameters, lr=config.lr, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )


class StopClock:
    """Says when training has gone on for a number of seconds."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    def __call__(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.end
