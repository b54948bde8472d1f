"""What a run will cost, before it starts: parameters, arithmetic, memory, time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config import RunConfig, to_yaml
from ddpm.console import Console, human_bytes, human_count, human_duration
from ddpm.data.base import ImageSet
from ddpm.distributed import World
from ddpm.models.diffusion import GaussianDiffusion
from ddpm.randomness import Stream
from ddpm.runtime import Runtime


@dataclass(frozen=True)
class Plan:
    """The cost of a run. FLOPs count a multiplication and an addition as two."""

    parameters: int
    forward_flops: int  # of one image
    training_flops: int  # of one image: forward and backward
    weights_bytes: int  # weights, gradients, Adam's two moments, moving averages
    activations_bytes: int  # kept for the backward pass of one process's largest micro-batch
    micro_batch: int
    processes: int
    images: int
    epochs: float
    step_s: float | None  # measured on this machine; None where it has no room for an image


def plan(settings: RunConfig, model: GaussianDiffusion, data: ImageSet, machine: Runtime, world: World) -> Plan:
    """Count on the model, and time a few real training steps of a batch that a quarter of the free memory holds."""
    share = world.share(settings.train.batch_size)
    micro = settings.train.micro_batch or share.stop - share.start
    parameters = sum(p.numel() for p in model.parameters())
    forward, backward, saved = count(model)
    timed = min(micro, 16, _free_bytes(machine) // 4 // max(1, saved))
    return Plan(
        parameters=parameters,
        forward_flops=forward,
        training_flops=forward + backward,
        weights_bytes=4 * parameters * (4 + len(settings.train.ema)),
        activations_bytes=saved * micro,
        micro_batch=micro,
        processes=world.size,
        images=len(data),
        epochs=settings.train.steps * settings.train.batch_size / len(data),
        step_s=_time_image(model, machine, timed) * (share.stop - share.start) if timed else None,
    )


def count(model: GaussianDiffusion) -> tuple[int, int, int]:
    """FLOPs of one image's forward and backward pass, and the bytes that autograd keeps between them."""
    with FlopCounterMode(display=False) as counter:
        with _kept_bytes() as kept:
            loss = _loss(model, torch.device("cpu"), 1)
        forward = counter.get_total_flops()
        loss.sum().backward()
    model.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops() - forward, kept[0]


def _free_bytes(machine: Runtime) -> int:
    """Memory that the device has left."""
    if machine.device.type == "cuda":
        return int(torch.cuda.mem_get_info(machine.device)[0])
    return int(psutil.virtual_memory().available)


def _loss(model: GaussianDiffusion, device: torch.device, n: int) -> Tensor:
    labels = torch.zeros(n, dtype=torch.int64, device=device) if model.num_classes else None
    loss: Tensor = model(torch.zeros(n, *model.shape, device=device), labels, Stream(0, torch.arange(n, device=device)))
    return loss


@contextmanager
def _kept_bytes() -> Iterator[list[int]]:
    total, seen = [0], set[int]()

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            total[0] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


def _time_image(model: GaussianDiffusion, machine: Runtime, n: int) -> float:
    """Seconds per training image: the best of three forward and backward passes after a first one."""
    machine.place(model)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        with machine.autocast():
            loss = _loss(model, machine.device, n)
        loss.sum().backward()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return best / n


def show(found: Plan, settings: RunConfig, run_dir: object, say: Console) -> None:
    """Print the resolved config and the plan."""
    say.info(to_yaml(settings).rstrip())
    steps = settings.train.steps
    rows = [
        ("run folder", str(run_dir)),
        ("images", f"{found.images:,}, {found.epochs:,.1f} epochs in {steps:,} steps of {settings.train.batch_size}"),
        ("parameters", f"{found.parameters:,}"),
        (
            "arithmetic",
            f"{human_count(found.forward_flops)}FLOP an image forward, {human_count(found.training_flops)}FLOP in training",
        ),
        (
            "memory",
            f"weights and optimizer {human_bytes(found.weights_bytes)}, activations about {human_bytes(found.activations_bytes)}",
        ),
        ("batch", f"{found.processes} process(es), {found.micro_batch} images at a time in each"),
        ("time", _time(found, steps)),
    ]
    say.table("plan", ("what", "value"), rows)


def _time(found: Plan, steps: int) -> str:
    if found.step_s is None:
        return f"not timed: one image needs {human_bytes(found.activations_bytes // found.micro_batch)}"
    return f"about {human_duration(found.step_s)} a step, {human_duration(found.step_s * steps)} in all, timed on this machine"
