"""Ten faults, planted one at a time in runs on real images, each named and nothing else; five healthy runs, and no alarm.

A fault is planted in images, tensors, or the config that a checkpoint is loaded with; the doctor is never told of it.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm import checkpoint, config, images, presets, runs
from ddpm.config import DataConfig
from ddpm.data import load_dataset
from ddpm.doctor.findings import Finding
from ddpm.models import build_diffusion
from ddpm.runs import Diagnosis

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "model.channels": 16,
    "model.attention": (),
    "train.steps": 300,
    "train.batch_size": 64,
    "train.lr": 2e-3,
    "train.warmup": 30,
    "train.ema": ("warmup:decay=0.99",),
    "train.log_every": 20,
    "train.preview_every": 0,
    "runtime.device": "cpu",
    "runtime.precision": "float32",
    "runtime.threads": 1,
}
"""The digits preset made small: a quarter of a minute on one core."""

EPS = {"diffusion.objective": "eps", "diffusion.schedule": "linear", "seed": 1}
SHAPES = "shapes:size=8,num_images=3000"
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train(name, fields)`: the folder of a run, trained once."""
    root = tmp_path_factory.mktemp("runs")

    def trained(name: str, changes: Mapping[str, Any] = {}) -> Path:
        if not (root / name).exists():
            settings = config.build(config.merge(presets.preset("digits"), config.nest({**SMALL, **changes})))
            runs.train(settings, root / name)
        return root / name

    return trained


@pytest.fixture(scope="module")
def digits_run(train: Train) -> Path:
    """v-prediction on the cosine schedule, with a second average that is too slow for 300 steps."""
    return train("digits", {"train.ema": ("warmup:decay=0.99", "0.9999")})


@pytest.fixture(scope="module")
def eps_run(train: Train) -> Path:
    """eps-prediction on the linear schedule."""
    return train("eps", EPS)


@pytest.fixture
def diagnose(tmp_path: Path) -> Callable[..., Diagnosis]:
    def found(run: Path, **options: Any) -> Diagnosis:
        return runs.diagnose(run, out=tmp_path / "doctor", device="cpu", precision="float32", quiet=True, **options)

    return found


def alarm(found: Diagnosis) -> Finding:
    """The one alarm."""
    assert len(found.alarms) == 1, [str(finding) for finding in found.findings]
    return found.alarms[0]


def edited(
    run: Path, target: Path, changes: Mapping[str, Any] = {}, tensors: Mapping[str, Any] = {}, later: int = 0
) -> Path:
    """A run with the last checkpoint of another, its config or tensors changed, and so many steps later."""
    step = checkpoint.listing(run / "checkpoints")[0]
    found = checkpoint.load(step)
    settings = config.build(config.merge(found.config().model_dump(mode="json"), config.nest(changes)))
    state = {name: value for name, value in found.state.items() if name not in ("format", "step")}
    groups = {path.stem: found.tensors(path.stem) for path in step.glob("*.safetensors")}
    checkpoint.save(target / "checkpoints", found.step + later, {**groups, **tensors}, state, settings)
    return target


def planted(folder: Path, dataset: str, change: Callable[[Any, Any], tuple[Any, Any]]) -> dict[str, Any]:
    """Fields for training on changed images (N, C, H, W) and labels (N,)."""
    known = load_dataset(DataConfig(dataset=dataset))
    pixels, labels = change(known.images, known.labels)
    path = folder / "images.npz"
    np.savez(path, arr_0=pixels.transpose(0, 2, 3, 1), arr_1=labels)
    return {"data.dataset": "npz", "data.path": path}


def test_images_fed_in_0_1(train, tmp_path, diagnose):
    run = train("range", planted(tmp_path, "digits", lambda x, y: (128 + x // 2, y)))
    by_data = alarm(diagnose(run))
    assert by_data.check == "range"
    assert "go from 128 to 255" in by_data.what
    by_network = alarm(diagnose(run, reference="digits"))
    assert by_network.check == "range"
    assert "the network was trained on images in [0, 1]" in by_network.what


def test_channels_swapped(train, tmp_path, diagnose):
    run = train("channels", planted(tmp_path, SHAPES, lambda x, y: (x[:, ::-1], y)))
    found = alarm(diagnose(run, reference=SHAPES))
    assert found.check == "channels"
    assert "in the order BGR" in found.what


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid"])
def test_wrong_schedule_at_sampling(eps_run, tmp_path, diagnose, schedule):
    found = alarm(diagnose(edited(eps_run, tmp_path / "run", {"diffusion.schedule": schedule})))
    assert found.check == "schedule"
    assert "trained with another noise schedule" in found.what
    assert found.advice.endswith("such as linear")


def test_ema_not_updated(digits_run, tmp_path, diagnose):
    held = checkpoint.load(checkpoint.listing(digits_run / "checkpoints")[0])
    settings = held.config()
    start = build_diffusion(settings.model, settings.diffusion, (1, 8, 8), 10, settings.seed).state_dict()
    found = alarm(diagnose(edited(digits_run, tmp_path / "run", tensors={"ema-0.99": start})))
    assert found.check == "average"
    assert "was never updated" in found.what


def test_ema_that_stands_still_while_the_weights_move(digits_run, tmp_path, diagnose):
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    held = checkpoint.load(checkpoint.listing(run / "checkpoints")[0])
    moved = {name: 1.01 * tensor for name, tensor in held.tensors("model").items()}
    found = alarm(diagnose(edited(run, run, tensors={"model": moved}, later=1)))
    assert found.check == "average"
    assert "it is that of the checkpoint before" in found.what


def test_ema_decay_too_long_for_the_run(digits_run, diagnose):
    found = alarm(diagnose(digits_run, ema="0.9999"))
    assert found.check == "average"
    assert "its decay is too long for the steps done" in found.what


def test_labels_shuffled(train, tmp_path, diagnose):
    run = train("labels", planted(tmp_path, "digits", lambda x, y: (x, np.random.default_rng(0).permutation(y))))
    by_data = alarm(diagnose(run))
    assert by_data.check == "labels"
    assert "the labels look shuffled" in by_data.what
    by_network = alarm(diagnose(run, reference="digits"))
    assert by_network.check == "labels"
    assert "labels were mixed up in training" in by_network.what


def test_thresholding_off_where_it_is_needed(eps_run, tmp_path, diagnose):
    changes = {"diffusion.thresholding": "none", "sample.sampler": "ddim:steps=50"}
    found = alarm(diagnose(edited(eps_run, tmp_path / "run", changes)))
    assert found.check == "thresholding"
    assert found.advice == "draw with --thresholding clip"


def test_thresholding_off_where_it_is_not_needed(digits_run, tmp_path, diagnose):
    assert diagnose(edited(digits_run, tmp_path / "run", {"diffusion.thresholding": "none"})).alarms == []


@pytest.mark.parametrize("sampler", ["ddim:steps=5", "ddpm:steps=5"])
def test_too_few_steps(digits_run, tmp_path, diagnose, sampler):
    found = alarm(diagnose(edited(digits_run, tmp_path / "run", {"sample.sampler": sampler})))
    assert found.check == "steps"
    assert "10 steps in place of 5" in found.what


def test_a_schedule_that_does_not_end_in_noise(train, diagnose):
    found = alarm(diagnose(train("end", {**EPS, "diffusion.schedule": "linear:timesteps=100"})))
    assert found.check == "terminal-snr"


def test_memorised_training_images(train, tmp_path, diagnose):
    run = train("few", planted(tmp_path, "digits", lambda x, y: (x[:24], y[:24])))
    for reference in (None, "digits"):
        found = alarm(diagnose(run, reference=reference))
        assert found.check == "memorisation"
        assert "the model copies training images" in found.what


def as_folder(folder: Path) -> dict[str, Any]:
    """Digits as PNG files, without classes."""
    known = load_dataset(DataConfig(dataset="digits"))
    for k, image in enumerate(known.images):
        images.save_png(folder / f"{k}.png", image)
    return {"data.dataset": "folder", "data.path": folder}


@pytest.mark.parametrize("name", ["digits", "eps", "x0 without classes", "shapes", "folder"])
def test_healthy_runs_raise_no_alarm(train, tmp_path, diagnose, name):
    """Runs that no threshold was chosen by."""
    fields: dict[str, dict[str, Any]] = {
        "digits": {"seed": 21},
        "eps": {**EPS, "seed": 22},
        "x0 without classes": {"diffusion.objective": "x0", "model.conditioning": "none", "seed": 11},
        "shapes": {"data.dataset": SHAPES, "diffusion.schedule": "sigmoid", "seed": 12},
        "folder": {"model.conditioning": "none", "diffusion.loss": "huber", "seed": 13},
    }
    changes = fields[name] | (as_folder(tmp_path / "images") if name == "folder" else {})
    found = diagnose(train(f"healthy {name}", changes), seed=5)
    assert [str(finding) for finding in found.alarms] == []
