"""sample, data, info, doctor, demo: what they hand to the library."""

import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import ddpm.doctor
import ddpm.runs.loading  # of which the doors take a name when `ddpm.runs` is replaced
from ddpm import config, distributed
from ddpm.cli import data, demo, doctor, info, main, sample
from ddpm.cli.data import parse_data
from ddpm.cli.doctor import DoctorOptions, parse_doctor
from ddpm.cli.sample import SampleOptions, parse_sample
from ddpm.doctor import Finding
from ddpm.errors import ConfigError


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """In place of the library: it only remembers what it was asked for."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def remember(name: str) -> Any:
        return lambda *given, **named: calls.append((name, given, named))

    fake = types.SimpleNamespace(
        **{name: remember(name) for name in ("sample", "data_info", "data_prepare", "info", "demo", "diagnose")}
    )
    monkeypatch.setitem(sys.modules, "ddpm.runs", fake)
    monkeypatch.setattr(ddpm, "runs", fake, raising=False)
    return calls


@pytest.mark.parametrize(
    "command", [command for verb in (sample, data, info, doctor, demo) for command, _ in verb.EXAMPLES]
)
def test_the_examples_work_as_typed(runs, monkeypatch, command):
    monkeypatch.setattr(distributed, "launch_processes", lambda words, processes: main(words))
    assert main(shlex.split(command)[1:]) == 0


def test_sample_leaves_to_the_checkpoint_what_is_not_typed():
    assert parse_sample(["runs/x"]) == (SampleOptions(source="runs/x"), 1)


def test_sample_takes_every_flag(runs):
    words = (
        "sample runs/x --num-images 5 --seed 9 --labels 3,cat --guidance 2.5 --sampler ddim:steps=5 --thresholding none --ema 0.999 --out there"
        " --npz --no-png --no-gif --chunk 4 --device cpu --precision bf16"
    )
    assert main(words.split()) == 0
    expected = {
        "source": "runs/x", "num_images": 5, "seed": 9, "labels": ["3", "cat"], "guidance": 2.5, "sampler": "ddim:steps=5", "thresholding": "none",
        "ema": "0.999", "out": Path("there"), "png": False, "npz": True, "gif": False, "chunk": 4, "device": "cpu", "precision": "bf16",
    }  # fmt: skip
    assert runs == [("sample", (), expected)]


def test_sample_in_processes(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "launch_processes", lambda *given: calls.append(given) or 4)
    assert main(["sample", "runs/x", "--processes", "3", "--npz"]) == 4
    assert calls == [(["sample", "runs/x", "--npz"], 3)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "SOURCE is missing; see --help."),
        (["x", "--labels", "1,,2"], "--labels='1,,2' is wrong"),
        (["x", "--guidance", "nan"], "--guidance='nan' is wrong: it must be a finite number of at least 0"),
        (["x", "--guidance", "-1"], "--guidance='-1' is wrong"),
        (["x", "--num-images", "0"], "--num-images: '0' is wrong: write a whole number of at least 1."),
        (["x", "--chunk", "0"], "--chunk='0' is wrong"),
        (["x", "--device", "tpu"], "--device='tpu' is wrong"),
        (["x", "--precision", "fp8"], "--precision='fp8' is wrong"),
        (["x", "--seed", "-1"], "--seed='-1' is wrong"),
        (["x", "--steps", "50"], "'--steps' is not a flag"),
        (["x", "y"], "'y' is not expected here"),
    ],
)
def test_sample_mistakes(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_sample(words)
    assert message in str(caught.value)


def test_data_reads_the_data_sets_own_flags(runs):
    assert parse_data(["info", "digits"]) == ("info", config.DataConfig(dataset="digits"), None)
    assert main(shlex.split("data prepare folder --data.path photos --data.size 32 --out sheet.png")) == 0
    wanted = config.DataConfig(dataset="folder", path=Path("photos"), size=(32, 32))
    assert runs == [("data_prepare", (wanted, Path("sheet.png")), {})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["infi", "digits"], "'infi' is not info or prepare (did you mean 'info'?)."),
        (["info"], "DATASET is missing"),
        (["info", "digits", "--lr", "1"], "'--lr' is not a flag"),
        (["info", "digits", "--data.size", "q"], "--data.size='q' is wrong"),
    ],
)
def test_data_mistakes(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_data(words)
    assert message in str(caught.value)


def test_demo_and_info_hand_over(runs):
    assert main(["demo"]) == 0
    assert main(["demo", "--run-dir", "d", "--seed", "3", "--steps", "7"]) == 0
    assert main(["info", "model.pt"]) == 0
    assert runs == [
        ("demo", (Path("runs/demo"),), {"seed": 0, "steps": None}),
        ("demo", (Path("d"),), {"seed": 3, "steps": 7}),
        ("info", ("model.pt",), {}),
    ]


@pytest.mark.parametrize(
    ("levels", "code"), [(["ok"], 0), (["ok", "warning", "info"], 0), (["error", "ok"], 2), ([], 0)]
)
def test_doctor_prints_findings_and_fails_on_errors(capsys, monkeypatch, levels, code):
    findings = [Finding(level, f"what {level}", "do this") for level in levels]
    monkeypatch.setattr(ddpm.doctor, "check_environment", lambda: findings)
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines() == [f"{level:8} what {level}: do this" for level in levels]


def test_doctor_hands_a_run_over_with_what_was_typed(runs):
    assert main(shlex.split("doctor runs/x")) == 0
    words = (
        "doctor runs/x --reference shapes:size=8 --num-images 20 --seed 9 --sampler ddim:steps=5 --guidance 2 --thresholding none"
        " --ema 0.999 --chunk 4 --out there --device cpu --precision bf16"
    )
    assert main(words.split()) == 0
    asked = {
        "source": "runs/x", "reference": "shapes:size=8", "num_images": 20, "seed": 9, "sampler": "ddim:steps=5", "guidance": 2.0,
        "thresholding": "none", "ema": "0.999", "chunk": 4, "out": Path("there"), "device": "cpu", "precision": "bf16",
    }  # fmt: skip
    assert runs == [("diagnose", (), vars(DoctorOptions(source="runs/x"))), ("diagnose", (), asked)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "3"], "--seed is about a run, so name one: ddpm doctor runs/NAME --seed"),
        (["x", "--num-images", "8"], "--num-images: '8' is wrong: write a whole number of at least 16."),
        (["x", "--guidance", "nan"], "--guidance='nan' is wrong"),
        (["x", "--refrence", "y"], "did you mean '--reference'?"),
        (["x", "y"], "'y' is not expected here"),
    ],
)
def test_doctor_mistakes(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_doctor(words)
    assert message in str(caught.value)


def test_doctor_works_where_torch_cannot_be_imported():
    code = "import sys; sys.modules['torch'] = None; from ddpm.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error    torch cannot be imported" in done.stdout
    assert done.stderr == ""
