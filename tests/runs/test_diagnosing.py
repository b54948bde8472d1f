"""`ddpm doctor RUN`: its files, what it needs, and one sentence for what it cannot use."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ddpm import checkpoint, config, runs
from ddpm.cli import main
from ddpm.doctor.checks import CHECKS
from ddpm.doctor.drawing import Recipe, draw_twice
from ddpm.errors import CheckpointError, ConfigError, DataError
from ddpm.images import read_image
from ddpm.runs.guiding import Guide
from ddpm.runtime import resolve
from ddpm.samplers import Sampler, Thresholding


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that may be written to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_is_examined_from_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run), "--num-images", "16", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((run / "doctor.json").read_text())
    told = [f"{finding['level']:8} {finding['check']}: " for finding in record["findings"]]
    assert len(told) >= 12
    shown = [" ".join(line.split()) for line in lines]
    assert all(any(line.startswith(" ".join(start.split())) for line in shown) for start in told)
    assert {finding["check"] for finding in record["findings"]} <= set(CHECKS)
    assert record["step"] == 6
    assert record["seeds"] == [0, 16]
    assert record["reference"] == "digits"
    for name in ("loss", "linear", "held_out", "weights", "samples", "finer_samples"):
        assert len(record["levels"][name]) == len(record["levels"]["log_snr"]) == 8
    assert read_image(run / "doctor.png").shape[0] == 3


def test_the_same_run_gives_the_same_findings_and_the_run_is_left_alone(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first, again = (runs.diagnose(run, num_images=16, out=tmp_path / name, quiet=True) for name in "ab")
    assert first.findings == again.findings
    assert first.picture.read_bytes() == again.picture.read_bytes()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_images_are_those_that_are_sampled(trained: Path) -> None:
    held = runs.load(trained)
    machine = resolve("cpu", "float32")
    guide = Guide.open(2.0, held.diffusion, held.classes, machine)
    recipe = Recipe(Sampler.parse("ddpm:steps=4"), Thresholding.parse("clip"), guide, 16)
    found = draw_twice(held.diffusion, recipe, machine, range(16))
    assert found.labels is not None
    assert np.array_equal(found.labels, np.arange(16) % 10)
    sampled = runs.draw_images(held, range(16), sampler="ddpm:steps=4", guidance=2.0, precision="float32")
    assert np.array_equal(found.images, sampled)
    assert found.finer is not None
    assert not np.array_equal(found.finer, sampled)
    assert found.out_of_range == (0.0, 0.0)


def test_a_checkpoint_outside_a_run_is_examined(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.copytree(checkpoint.listing(run / "checkpoints")[0], tmp_path / "taken"))
    found = runs.diagnose(moved, num_images=16, ema="none", quiet=True)
    assert found.path == Path("doctor/doctor.json")
    told = {finding.check: finding for finding in found.findings}
    assert told["average"].level == "info"
    assert "too few to tell" in told["training"].what


def test_without_training_images_the_rest_is_done(run: Path) -> None:
    """As where the folder that a run was trained on is gone."""
    step = checkpoint.listing(run / "checkpoints")[0]
    found = checkpoint.load(step)
    settings = config.build(
        config.merge(found.config().model_dump(mode="json"), {"data": {"dataset": "folder", "path": "gone"}})
    )
    state = {name: value for name, value in found.state.items() if name not in ("format", "step")}
    tensors = {path.stem: found.tensors(path.stem) for path in step.glob("*.safetensors")}
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", found.step, tensors, state, settings)
    (run / "config.yaml").unlink()
    found_now = runs.diagnose(run, num_images=16, quiet=True)
    told = {finding.check: finding for finding in found_now.findings}
    assert told["missing"].level == "info"
    assert "--reference" in told["missing"].what
    assert "steps" in told
    assert "range" not in told
    assert "range" in {
        finding.check for finding in runs.diagnose(run, reference="digits", num_images=16, quiet=True).findings
    }


def test_other_images_and_another_config_are_told(run: Path) -> None:
    settings = config.build(config.read_yaml(run / "config.yaml"))
    other = settings.model_copy(update={"diffusion": settings.diffusion.model_copy(update={"label_drop": 0.5})})
    (run / "config.yaml").write_text(config.to_yaml(other))
    (flag,) = [finding for finding in runs.diagnose(run, num_images=16, quiet=True).alarms if finding.check == "flags"]
    assert "diffusion.label_drop=0.5" in flag.what


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_images": 15}, ConfigError, "--num-images=15 is wrong"),
        ({"seed": -1}, ConfigError, "--seed=-1 is wrong"),
        ({"ema": "0.5x"}, ConfigError, "--ema 0.5x"),
        ({"sampler": "ddim:steps=2000"}, ConfigError, "steps=2000"),
        ({"reference": "shapes"}, DataError, "its images are 3x32x32, those of the model 1x8x8"),
        ({"reference": "nowhere/"}, DataError, "--reference nowhere/"),
        ({"source": "nowhere"}, CheckpointError, "nowhere: does not exist"),
        ({"out": Path("/proc/doctor")}, DataError, "/proc/doctor"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(trained: Path, arguments: dict, error: type, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error) as caught:
        runs.diagnose(**{"source": trained, "quiet": True, **arguments})
    assert words in str(caught.value)


def test_a_reference_of_statistics_is_refused(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ConfigError, match="holds statistics alone"):
        runs.diagnose(trained, reference=path, out=tmp_path, quiet=True)


def test_another_programs_file_is_told_to_be_imported_first(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"whatever it holds")
    with pytest.raises(ConfigError, match="make a run of it by `ddpm import`"):
        runs.diagnose(tmp_path / "ckpt.pt", quiet=True)
