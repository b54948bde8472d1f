"""What 'auto' becomes, and that nothing else is left to chance."""

import os

import pytest
import torch
from torch import nn

from ddpm import runtime
from ddpm.errors import ConfigError
from ddpm.runtime import Runtime, container_cpus, cores, default_threads, describe, resolve


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_what_is_given_is_taken():
    found = resolve("cpu", "bf16", "channels-last", 2)
    assert found == Runtime(torch.device("cpu"), "bf16", channels_last=True, threads=2)
    assert torch.get_num_threads() == 2
    assert resolve("cpu", "float32", "nchw", 1) == Runtime(torch.device("cpu"), "float32", False, 1)


@pytest.mark.parametrize("units", [True, False])
def test_auto_takes_bf16_where_there_are_units_and_plain_layout_on_a_cpu(monkeypatch, units):
    monkeypatch.setattr(runtime, "has_bf16_units", lambda device: units)
    found = resolve("cpu")
    assert found.precision == ("bf16" if units else "float32")
    assert not found.channels_last
    assert resolve("cpu", "float32").precision == "float32"


def test_auto_device_is_the_best_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve().device == torch.device("cpu")


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="mps: only cpu and cuda are supported"):
        resolve("mps")
    for device in ("cuda", "cuda:3"):
        with pytest.raises(ConfigError, match=f"--runtime.device={device}: no .* is available; use --device cpu"):
            resolve(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="there are 2 CUDA devices, device 3 is none of them"):
        resolve("cuda:3")


def test_each_process_takes_the_gpu_of_its_rank(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(runtime, "has_bf16_units", lambda device: True)
    found = resolve("cuda", processes=4, local_rank=2)
    assert (found.device, found.channels_last, found.precision) == (torch.device("cuda", 2), True, "bf16")
    assert resolve("cuda:1", local_rank=2).device == torch.device("cuda", 1)
    assert chosen == [2, 1]


def test_threads_are_omps_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads(4) == 3
    for nonsense in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert [default_threads(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert resolve("cpu", processes=4).threads == 2


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota(tmp_path, files, wanted):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert container_cpus(tmp_path) == wanted


def test_cores_are_bounded_by_affinity_and_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    for quota, wanted in ((None, 6), (1.5, 2), (0.1, 1), (64.0, 6)):
        monkeypatch.setattr(runtime, "container_cpus", lambda quota=quota: quota)
        assert cores() == wanted


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_autocast(precision, dtype):
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with Runtime(torch.device("cpu"), precision, False, 1).autocast():
        assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("channels_last", [True, False])
def test_layout_changes_where_numbers_lie_and_not_what_they_are(channels_last):
    machine = Runtime(torch.device("cpu"), "float32", channels_last, 1)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3))
    before = {name: p.clone() for name, p in module.state_dict().items()}
    parameter = module[0].weight
    assert machine.place(module) is module
    assert module[0].weight is parameter
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    x = torch.randn(2, 3, 8, 8)
    placed = machine.images(x)
    assert torch.equal(placed, x)
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert placed.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_the_description_is_plain_values():
    facts = describe(Runtime(torch.device("cpu"), "bf16", True, 3))
    assert facts["device_name"]
    assert {key: facts[key] for key in ("device", "precision", "layout", "threads", "torch")} == {
        "device": "cpu", "precision": "bf16", "layout": "channels-last", "threads": 3, "torch": torch.__version__,
    }  # fmt: skip
    assert facts["cores"] >= 1
