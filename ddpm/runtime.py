"""The machine: device, precision, layout and threads, resolved once."""

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ddpm.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Runtime:
    """A resolved machine: nothing is 'auto' any more."""

    device: torch.device
    precision: Literal["float32", "bf16"]
    channels_last: bool
    threads: int

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Run matrix products and convolutions in bf16 where the precision says so."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, in its memory layout."""
        module.to(self.device)
        if self.channels_last:
            for parameter in module.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return module

    def images(self, x: Tensor) -> Tensor:
        """Move a batch of images (B, C, H, W) to the device, in its memory layout."""
        return x.to(self.device, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def resolve(
    device: str = "auto",
    precision: str = "auto",
    layout: str = "auto",
    threads: int | None = None,
    *,
    processes: int = 1,
    local_rank: int = 0,
) -> Runtime:
    """Fill in what the runtime config leaves to the machine, and set PyTorch's threads and numeric switches to match.

    Raises ConfigError: a device that is not there.
    """
    found = _device(device, local_rank)
    threads = threads or default_threads(processes if found.type == "cpu" else 1)
    torch.set_num_threads(threads)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16_units(found))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bf16  # float32 means float32
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    channels_last = layout == "channels-last" or (layout == "auto" and found.type == "cuda")
    return Runtime(found, "bf16" if bf16 else "float32", channels_last, threads)


def cores() -> int:
    """CPU cores that this process may use: its affinity, and a container's quota rounded up."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = container_cpus()
    return available if quota is None else max(1, min(available, math.ceil(quota)))


def default_threads(processes: int = 1) -> int:
    """CPU threads of each of so many processes: OMP_NUM_THREADS where it is set, else an equal share of the cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else max(1, cores() // processes)


def container_cpus(root: Path = CGROUP) -> float | None:
    """CPU quota of the control group (version 2, else 1) in cores; None: no quota."""
    words = _words(root / "cpu.max") or _words(root / "cpu/cpu.cfs_quota_us") + _words(root / "cpu/cpu.cfs_period_us")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 arithmetic runs in hardware, so that autocast is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any(
            getattr(torch.cpu, name, lambda: False)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return False


def describe(runtime: Runtime) -> dict[str, str | int]:
    """The machine in words, for env.json and reports."""
    name = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else cpu_name()
    return {
        "device": str(runtime.device),
        "device_name": name,
        "precision": runtime.precision,
        "layout": "channels-last" if runtime.channels_last else "nchw",
        "threads": runtime.threads,
        "cores": cores(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--runtime.device={wanted}: no CUDA device is available; use --device cpu, or run `ddpm doctor`."
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"--runtime.device={wanted}: there are {torch.cuda.device_count()} CUDA devices, device {index} is none of them."
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise ConfigError(f"--runtime.device={wanted}: only cpu and cuda are supported; use --device cpu.")
    return device


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
