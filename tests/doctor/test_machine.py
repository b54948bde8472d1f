"""The doctor's findings, each against a machine whose state the test knows."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm import runtime
from ddpm.doctor import Finding, check_environment
from ddpm.doctor import machine as doctor

Run = Callable[..., subprocess.CompletedProcess[str]]
REPORT = """
import dataclasses, json
from ddpm.doctor import check_environment
print(json.dumps([dataclasses.asdict(finding) for finding in check_environment()]))
"""


def report(packages: Path, **env: str) -> list[Finding]:
    """The report of a process that finds `packages` before everything else."""
    path = os.pathsep.join([str(packages), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return [Finding(**finding) for finding in json.loads(done.stdout)]


def package(folder: Path, name: str, source: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    return folder


def about(findings: list[Finding], word: str) -> Finding:
    """The one finding that starts with `word`."""
    (found,) = [finding for finding in findings if finding.what.startswith(word)]
    return found


def test_a_healthy_machine_has_no_error() -> None:
    findings = check_environment()
    assert [finding for finding in findings if finding.level == "error"] == []
    assert about(findings, "Python").what.startswith(f"Python {sys.version.split()[0]}")
    assert all("\n" not in str(finding) for finding in findings)
    assert all(finding.advice for finding in findings if finding.level in ("warning", "error"))


def test_torchvision_that_fails_on_import_is_named_with_its_cure(tmp_path: Path) -> None:
    broken = 'raise RuntimeError("operator torchvision::nms does not exist\\nat line 2")'
    found = about(report(package(tmp_path, "torchvision", broken)), "torchvision")
    assert found.level == "warning"
    assert "RuntimeError: operator torchvision::nms does not exist" in found.what
    assert "pip uninstall torchvision" in found.advice
    assert "pip install --upgrade --force-reinstall torch torchvision" in found.advice


def test_torchvision_that_imports_is_well(tmp_path: Path) -> None:
    found = about(report(package(tmp_path, "torchvision", '__version__ = "9.9"')), "torchvision")
    assert found == Finding("ok", "torchvision 9.9")


def test_broken_torch_is_an_error_and_the_rest_is_still_reported(tmp_path: Path) -> None:
    broken = 'raise OSError("libtorch_cpu.so: cannot open shared object file")'
    findings = report(package(tmp_path, "torch", broken))
    found = about(findings, "torch cannot be imported")
    assert found.level == "error"
    assert "OSError: libtorch_cpu.so" in found.what
    assert found.advice == "pip install --upgrade torch"
    assert about(findings, "Python").level == "ok"
    assert about(findings, "ddpm.data cannot be imported").level == "error"


def test_old_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.6.0+cu124")
    assert doctor.check_torch() == [
        Finding("error", "torch 2.6.0+cu124 is older than 2.10", "pip install --upgrade torch")
    ]


def test_broken_psutil_is_an_error(tmp_path: Path) -> None:
    findings = report(package(tmp_path, "psutil", "raise ImportError"))
    assert about(findings, "psutil cannot be imported (ImportError)").level == "error"


def test_cpu_build_beside_a_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    (found,) = doctor.check_torch()
    assert found.level == "warning"
    assert "CPU build, on a machine with an NVIDIA GPU" in found.what


def test_cuda_build_without_a_gpu_says_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = doctor.check_torch()
    assert found.level == "info"
    assert "CUDA 13.0, reaches no GPU" in found.what
    assert "nvidia-smi" in found.advice


@pytest.mark.parametrize(
    ("variable", "level", "what"),
    [("1", "info", "1 threads of 4"), ("4", "ok", "4 threads"), (None, "ok", "4 threads")],
)
def test_threads_of_a_run(variable: str | None, level: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr("ddpm.runtime.cores", lambda: 4)
    (found,) = doctor.check_threads()
    assert found.level == level
    assert what in found.what


def control_group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_cpu_quota_of_both_control_group_versions(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    assert runtime.container_cpus(control_group(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"memory.max": "2147483648\n"}, 2**31),
        ({"memory.max": "max\n"}, None),
        ({"memory/memory.limit_in_bytes": "4096\n"}, 4096),
    ],
)
def test_memory_limit_of_both_control_group_versions(files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    assert doctor.container_memory(control_group(tmp_path, files)) == limit


def test_little_memory_and_little_disk_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "container_memory", lambda: 500_000_000)
    (memory,) = doctor.check_memory()
    assert memory.level == "warning"
    assert memory.what == "0.5 of 0.5 GB of memory free"
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3e8}))
    (disk,) = doctor.check_disk()
    assert disk.level == "warning"
    assert "--run-dir" in disk.advice


def test_cache_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "file" / "cache"))
    found = about(doctor.check_data(), "the cache folder")
    assert found.level == "error"
    assert f"the cache folder {tmp_path}/file/cache cannot be written to" in found.what
    assert "DDPM_CACHE" in found.advice


def test_cache_defaults_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = about(doctor.check_data(), "the cache folder")
    assert found == Finding("ok", f"the cache folder {tmp_path}/.cache/ddpm can be written to")
    assert list((tmp_path / ".cache/ddpm").iterdir()) == []


def test_data_sets_at_hand_are_named_with_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    monkeypatch.setattr(doctor, "DATA_SETS", {"here": (), "absent": (), "elsewhere": (tmp_path / "debian",)})
    for folder in ("here", "debian", "absent"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here/a.bin").touch()
    (tmp_path / "debian/b.gz").touch()
    _, digits, here, absent, elsewhere = doctor.check_data()
    assert digits == Finding("ok", "data set digits: carried by ddpm")
    assert here == Finding("ok", f"data set here: {tmp_path}/here")
    assert (absent.level, absent.what) == ("info", "data set absent is not here")
    assert str(tmp_path / "absent") in absent.advice
    assert elsewhere == Finding("ok", f"data set elsewhere: {tmp_path}/debian")


@pytest.mark.fashion
def test_debians_fashion_mnist_is_found() -> None:
    assert Finding("ok", "data set fashion-mnist: /usr/share/datasets/fashion-mnist") in doctor.check_data()


def test_extras_name_their_version_or_their_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"numpy": "adds up", "no-such-package-at-all": "does nothing"})
    present, absent = doctor.check_extras()
    assert present.level == "ok"
    assert present.what.startswith("numpy 2")
    assert absent.level == "info"
    assert absent.advice == "pip install no-such-package-at-all"


def test_the_command_ends_with_0_where_nothing_is_broken(run_ddpm: Run) -> None:
    done = run_ddpm("doctor")
    assert done.returncode == 0, done.stderr
    assert f"torch {importlib.metadata.version('torch')}" in done.stdout


def test_the_command_ends_with_2_where_torch_is_broken(tmp_path: Path, run_ddpm: Run) -> None:
    packages = package(
        tmp_path / "packages", "torch", 'raise OSError("libtorch_cpu.so: cannot open shared object file")'
    )
    path = os.pathsep.join([str(packages), os.environ["PYTHONPATH"]])
    done = run_ddpm("doctor", env={"PYTHONPATH": path})
    assert done.returncode == 2
    assert "torch cannot be imported (OSError: libtorch_cpu.so" in done.stdout
    assert "pip install --upgrade torch" in done.stdout
