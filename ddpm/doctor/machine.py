"""What is wrong with this machine, or would be slow on it, and what to do about each.

Every check works when the package that it asks about is absent or broken: an import that fails, with whatever
exception, is a finding.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from ddpm.doctor.findings import Finding

TORCH_FLOOR = (2, 10)
EXTRAS = {
    "tensorboard": "logs metrics to TensorBoard",
    "wandb": "logs metrics to W&B",
    "trackio": "logs metrics to trackio",
    "torch-fidelity": "FID with the original Inception network",
    "diffusers": "reads and writes diffusers pipelines",
    "huggingface-hub": "fetches and publishes models",
}
"""Optional distributions -> what they add."""

DATA_SETS = {"fashion-mnist": (Path("/usr/share/datasets/fashion-mnist"),), "mnist": (), "cifar10": ()}
"""Data sets that are not carried along -> where they may lie besides $DDPM_DATA."""

GB = 1e9
CGROUP = Path("/sys/fs/cgroup")


def check_environment() -> list[Finding]:
    """Look at Python, torch, devices, threads, memory, disk, cache, data sets and optional packages, in that order.

    Nothing is changed, except that the cache folder is made if it is missing. A finding of level "error" means that
    training or sampling cannot work here.
    """
    return [finding for check in CHECKS for finding in check()]


def check_python() -> list[Finding]:
    """The interpreter's version."""
    return [Finding("ok", f"Python {platform.python_version()} at {sys.executable}")]


def check_torch() -> list[Finding]:
    """PyTorch's version and build, and whether the build fits the machine."""
    torch = _import("torch")
    if isinstance(torch, Exception):
        return [Finding("error", f"torch cannot be imported ({_first_line(torch)})", "pip install --upgrade torch")]
    version = str(torch.__version__)
    if _version(version) < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        return [Finding("error", f"torch {version} is older than {floor}", "pip install --upgrade torch")]
    if torch.version.cuda is None and torch.version.hip is None:
        return [_cpu_build(version)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        return [Finding("ok", f"torch {version}, {build}")]
    advice = "fine without a GPU; with one, see that nvidia-smi lists it and that its driver is new enough"
    return [Finding("info", f"torch {version}, {build}, reaches no GPU", advice)]


def check_torchvision() -> list[Finding]:
    """The core does not need torchvision, but one that fails on import breaks the packages that try to use it."""
    if importlib.util.find_spec("torchvision") is None:
        return [Finding("ok", "torchvision is not installed, and only --extractor inception needs it")]
    found = _import("torchvision")
    if isinstance(found, Exception):
        what = f"torchvision is installed but fails on import ({_first_line(found)})"
        advice = "it was built for another torch; pip uninstall torchvision, or for a matching pair "
        return [Finding("warning", what, advice + "pip install --upgrade --force-reinstall torch torchvision")]
    return [Finding("ok", f"torchvision {getattr(found, '__version__', '')}".rstrip())]


def check_devices() -> list[Finding]:
    """Every CUDA device with its memory, Apple's GPU, and the CPU with its fast number formats."""
    torch, runtime = _import("torch"), _import("ddpm.runtime")
    if isinstance(torch, Exception) or isinstance(runtime, Exception):
        return []
    findings = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if runtime.has_bf16_units(torch.device("cuda", index)) else "no bf16 units"
        findings.append(Finding("ok", f"cuda:{index} {card.name}, {card.total_memory / GB:.0f} GB, {bf16}"))
    if torch.backends.mps.is_available():
        findings.append(
            Finding("info", "mps: an Apple GPU, which lacks the float64 that noise is made in", "runs take the CPU")
        )
    units = ", ".join(_cpu_bf16_units(torch)) or "no bf16 units"
    return [*findings, Finding("ok", f"cpu: {runtime.cpu_name()}, {runtime.cores()} cores, {units}")]


def check_threads() -> list[Finding]:
    """Threads that a run takes by default, and what decides it."""
    runtime = _import("ddpm.runtime")
    if isinstance(runtime, Exception):
        return []
    threads = runtime.default_threads()
    if "OMP_NUM_THREADS" in os.environ and threads != runtime.cores():
        what = f"a run takes {threads} threads of {runtime.cores()} cores, as OMP_NUM_THREADS says"
        return [Finding("info", what, "unset it, or use --runtime.threads")]
    return [Finding("ok", f"a run takes {threads} threads, one a core")]


def check_memory() -> list[Finding]:
    """Main memory that is free, within the container's limit."""
    psutil = _import("psutil")
    if isinstance(psutil, Exception):
        return [Finding("error", f"psutil cannot be imported ({_first_line(psutil)})", "pip install psutil")]
    memory = psutil.virtual_memory()
    total = min(memory.total, container_memory() or memory.total)
    what = f"{min(memory.available, total) / GB:.1f} of {total / GB:.1f} GB of memory free"
    if min(memory.available, total) < GB:
        return [Finding("warning", what, "close other programs, or lower --train.micro-batch and --data.size")]
    return [Finding("ok", what)]


def check_disk() -> list[Finding]:
    """Space where runs are written by default: the working folder."""
    free = shutil.disk_usage(Path.cwd()).free
    what = f"{free / GB:.1f} GB of disk free at {Path.cwd()}"
    if free < GB:
        return [Finding("warning", what, "make room, or put runs on another disk with --run-dir")]
    return [Finding("ok", what)]


def check_data() -> list[Finding]:
    """Whether the folder of prepared data sets can be written to; which of the named data sets are at hand, and where."""
    places = _import("ddpm.data.places")
    if isinstance(places, Exception):
        what = f"ddpm.data cannot be imported ({_first_line(places)})"
        return [Finding("error", what, "install again what the message names")]
    digits = Finding("ok", "data set digits: carried by ddpm")
    others = [_data_set(name, places.places(name, None, *folders)) for name, folders in DATA_SETS.items()]
    return [_cache(places.cache_root()), digits, *others]


def check_extras() -> list[Finding]:
    """Optional packages: installed in which version, or how to get them. They are not imported."""
    return [_extra(name, purpose) for name, purpose in EXTRAS.items()]


def container_memory(root: Path = CGROUP) -> int | None:
    """Memory limit of the control group (version 2, else 1) in bytes; None: no limit."""
    words = _words(root / "memory.max") or _words(root / "memory/memory.limit_in_bytes")
    return int(words[0]) if words and words[0].isdigit() else None


def _cache(folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        what = f"the cache folder {folder} cannot be written to ({error.strerror or error})"
        return Finding("error", what, "set DDPM_CACHE to a folder that can")
    return Finding("ok", f"the cache folder {folder} can be written to")


def _data_set(name: str, folders: Sequence[Path]) -> Finding:
    found = [folder for folder in folders if folder.is_dir() and any(folder.iterdir())]
    if found:
        return Finding("ok", f"data set {name}: {found[0]}")
    return Finding("info", f"data set {name} is not here", f"`ddpm data prepare {name}` fetches it to {folders[-1]}")


def _cpu_build(version: str) -> Finding:
    what = f"torch {version}, CPU build"
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        return Finding("warning", f"{what}, on a machine with an NVIDIA GPU", "pip install --force-reinstall torch")
    return Finding("ok", what)


def _cpu_bf16_units(torch: ModuleType) -> list[str]:
    probes = {"AVX-512 bf16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    return [name for name, probe in probes.items() if hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)()]


def _extra(name: str, purpose: str) -> Finding:
    try:
        return Finding("ok", f"{name} {importlib.metadata.version(name)} {purpose}")
    except importlib.metadata.PackageNotFoundError:
        return Finding("info", f"{name} is not installed ({purpose})", f"pip install {name}")


def _import(name: str) -> ModuleType | Exception:
    """The module, or what its import raised: a broken binary raises OSError or RuntimeError as often as ImportError."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_python,
    check_torch,
    check_torchvision,
    check_devices,
    check_threads,
    check_memory,
    check_disk,
    check_data,
    check_extras,
)
