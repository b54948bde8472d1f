"""`ddpm features`: the classifiers whose features images are compared by, trained as everything is, and what there is."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddpm.evaluation
from ddpm import checkpoint, config, console, rundir, runtime
from ddpm.config import DataConfig, RunConfig
from ddpm.data import ImageSet, load_dataset
from ddpm.data.base import every_fifth
from ddpm.data.loader import Loader
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation import tiny_cnn
from ddpm.evaluation.features import FeatureExtractor
from ddpm.evaluation.tiny_cnn import ClassifierLoss, TinyCNN
from ddpm.registry import import_submodules
from ddpm.rundir import RunDir
from ddpm.runs.training import stop_signals
from ddpm.runtime import Runtime
from ddpm.schedules import Schedule
from ddpm.training.hooks import Checkpoints, Metrics
from ddpm.training.trainer import StopClock, Trainer

import_submodules("ddpm.evaluation", ddpm.evaluation.__path__)

CLEAN, NOISY = "tiny-cnn", "tiny-cnn-noisy"
LEVELS = (0.0, 0.25, 0.5, 0.75)
"""Fractions of the schedule's time at which a noisy classifier's accuracy is measured."""

_COMMON: dict[str, Any] = {
    "train.optimizer": "adamw",
    "train.lr": 3e-3,
    "train.weight_decay": 0.05,
    "train.warmup": 200,
    "train.lr_schedule": "cosine",
    "train.ema": (),
    "train.preview_every": 0,
    "train.steps": 5000,
    "diffusion.schedule": "cosine",
}
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"train.steps": 1500},
    "fashion-mnist": {"train.steps": 5000, "data.flip": True},
    "cifar10": {"train.steps": 20_000, "data.flip": True},
}
"""What differs from the common recipe, by data set."""


@dataclass(frozen=True)
class FeaturesResult:
    """A trained classifier: its file (None where training was stopped), the accuracy on held-out images, steps done."""

    path: Path | None
    test_accuracy: float
    step: int
    stopped: bool


def recipe(dataset: str, noisy: bool = False) -> dict[str, Any]:
    """The nested fields that a data set's classifier is trained with, unless told otherwise."""
    own = {"data.dataset": dataset, "model.network": NOISY if noisy else CLEAN}
    return config.nest({**_COMMON, **RECIPES.get(dataset, {}), **own})


def train_features(
    settings: RunConfig, run_dir: Path, *, out: Path | None = None, stop_after_s: float | None = None
) -> FeaturesResult:
    """Train a small classifier and write its weights; the same call again resumes.

    Args:
        settings: `recipe`, with what is to differ.
        run_dir: metrics and checkpoints.
        out: the weights' file; default: tiny-cnn-DATASET.safetensors in the run's folder.
        stop_after_s: save and end after so many seconds.

    Raises ConfigError, DataError, CheckpointError, DivergedError.
    """
    run, say, world = RunDir(Path(run_dir)), console.Console(), World()
    machine = runtime.resolve(**settings.runtime.model_dump())
    resolved = settings.runtime.model_copy(update={"precision": machine.precision})
    settings = settings.model_copy(update={"runtime": resolved})
    train, test = _load(settings.data)
    module = _module(settings, train)
    out = out or run.path / f"{settings.model.network}-{train.name.replace('/', '-')}.safetensors"
    with ExitStack() as stack:
        _check(run, settings)
        run.create()
        stack.enter_context(run.lock())
        run.clean()
        found = _find(run, train, say)
        machine.place(module)
        loader = Loader(
            train, settings.train.batch_size, settings.seed, settings.data.flip, workers=settings.data.workers
        )
        trainer = Trainer(module, loader, settings.train, machine, world, settings.seed, say.warn)
        display = stack.enter_context(console.TrainingDisplay(settings.train.steps, found.step if found else 0))
        metrics = Metrics(run.metrics, settings.train.log_every, [display.update])
        saver = Checkpoints(run, settings, _facts(train), metrics, say.warn)
        if found is not None:
            saver.restore(trainer, found)
        run.write_config(settings)
        rundir.truncate_jsonl(run.metrics, trainer.step)
        run.event(
            "resumed" if found else "started",
            step=trainer.step,
            environment=rundir.environment(runtime.describe(machine)),
        )
        stop, clock = stack.enter_context(stop_signals()), StopClock(stop_after_s)
        trainer.run([metrics, saver], lambda: stop.asked or clock())
    if trainer.step < settings.train.steps:
        say.info(
            f"stopped and saved at step {trainer.step} of {settings.train.steps}; the same command goes on from there."
        )
        return FeaturesResult(None, float("nan"), trainer.step, stop.asked)
    return _finish(settings, module, train, test, machine, trainer.step, out, say)


def _load(settings: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Images to train on and to test with: the data set's own parts, or for --data.split all every fifth of a class held out."""
    found = load_dataset(settings)
    if found.labels is None:
        raise DataError(f"data set {found.name!r} has no labels; a classifier needs some.")
    if settings.split != "all":
        other = "test" if settings.split == "train" else "train"
        return found, load_dataset(settings.model_copy(update={"split": other}))
    held_out = every_fifth(found.labels)
    train, test = (
        ImageSet(found.name, found.images[part], found.labels[part], found.classes) for part in (~held_out, held_out)
    )
    return train, test


def _module(settings: RunConfig, data: ImageSet) -> ClassifierLoss:
    if settings.model.network not in (CLEAN, NOISY):
        raise ConfigError(f"--model.network={settings.model.network} is no feature classifier; use {CLEAN} or {NOISY}.")
    noisy = settings.model.network == NOISY
    schedule = Schedule.parse(settings.diffusion.schedule) if noisy else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = TinyCNN(data.shape[0], data.num_classes, noisy)
    return ClassifierLoss(network, shift=max(1, min(data.shape[1:]) // 28), schedule=schedule)


def _check(run: RunDir, settings: RunConfig) -> None:
    """Refuse what would mix two runs; raises ConfigError."""
    old = run.read_config()
    if old is not None and (changed := config.differences(old, settings)):
        name, (before, after) = next(iter(changed.items()))
        raise ConfigError(
            f"--run-dir {run.path}: holds a run with {name}={before}, not {after}; choose another --run-dir."
        )


def _find(run: RunDir, data: ImageSet, say: console.Console) -> checkpoint.Checkpoint | None:
    found = checkpoint.latest(run.checkpoints, say.warn)
    if found is not None and found.state["data"]["fingerprint"] != data.fingerprint:
        raise DataError(
            f"{found.path}: was trained on other images than {data.name!r} holds now; choose another --run-dir."
        )
    return found


def _facts(data: ImageSet) -> dict[str, Any]:
    return {
        "shape": list(data.shape),
        "classes": list(data.classes),
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint},
    }


def _finish(
    settings: RunConfig,
    module: ClassifierLoss,
    train: ImageSet,
    test: ImageSet,
    machine: Runtime,
    step: int,
    out: Path,
    say: console.Console,
) -> FeaturesResult:
    """Measure on the held-out images, write the file, say so."""
    assert test.labels is not None
    network = module.network.eval().float()
    images, labels = torch.tensor(np.asarray(test.images)), torch.tensor(test.labels)
    right = tiny_cnn.accuracy(network, images, labels)
    facts: dict[str, Any] = {
        "dataset": train.name,
        "data_sha256": train.fingerprint,
        "test_accuracy": right,
        "test_images": len(test),
        "command": _command(settings),
        "recipe": {
            "seed": settings.seed,
            "shift": module.shift,
            "flip": settings.data.flip,
            "train": settings.train.model_dump(mode="json"),
        },
        "precision": machine.precision,
        "torch": torch.__version__,
        "date": rundir.now()[:10],
    }
    if module.schedule is not None:
        facts["schedule"] = module.schedule.spec
        facts["log_snr"] = _log_snrs(module.schedule)
        facts["noisy_accuracy"] = _noisy_accuracy(module, images, labels)
    tiny_cnn.save_classifier(out, network, train.shape, train.classes, facts)
    rows = [
        ("parameters", f"{sum(p.numel() for p in network.parameters()):,}"),
        ("right on held-out images", f"{right:.2%} of {len(test):,}"),
    ]
    rows += [(f"... with noise, t = {t}", f"{share:.2%}") for t, share in facts.get("noisy_accuracy", {}).items()]
    say.table(f"{settings.model.network} for {train.name}", ("what", "value"), [*rows, ("weights", str(out))])
    use = f"evaluate with it: --extractor tiny-cnn:weights={out}"
    say.info(f"to {use}" if module.schedule is None else f"to guide by it: --guidance classifier:model={out}")
    return FeaturesResult(out, right, step, stopped=False)


def _noisy_accuracy(module: ClassifierLoss, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    assert module.schedule is not None
    times = [round(fraction * module.schedule.first, 3) for fraction in LEVELS]
    device = next(module.parameters()).device
    levels = {f"{t:g}": module.schedule.at(torch.tensor(t, device=device)) for t in times}
    return {t: tiny_cnn.accuracy(module.network, images, labels, level) for t, level in levels.items()}


def _log_snrs(schedule: Schedule) -> list[float]:
    """The lowest and the highest log-SNR of the levels that it was trained on."""
    return [float(schedule.at(torch.tensor(t, dtype=torch.float64)).log_snr) for t in (schedule.first, schedule.last)]


def _command(settings: RunConfig) -> str:
    noisy = " --noisy" if settings.model.network == NOISY else ""
    return f"ddpm features train {settings.data.dataset}{noisy} --steps {settings.train.steps} --seed {settings.seed}"


def list_features() -> None:
    """Print the extractors with their options, and the classifiers that come with the package."""
    say = console.Console()
    kinds = FeatureExtractor.registered
    rows = [(name, (kinds[name].__doc__ or "").partition("\n")[0]) for name in FeatureExtractor.names()]
    say.table("extractors", ("name", "what"), rows)
    found = [tiny_cnn.load_classifier(tiny_cnn.shipped_weights(name)) for name in tiny_cnn.shipped()]
    say.table(
        "classifiers that come with the package",
        ("extractor", "images", "classes", "right on test images", "made by"),
        [
            (
                f"tiny-cnn:data={each.facts['dataset']}",
                "x".join(map(str, each.shape)),
                str(len(each.classes)),
                f"{json.loads(each.facts['test_accuracy']):.2%} of {int(each.facts['test_images']):,}",
                f"{each.facts['command']}, {each.facts['date']}",
            )
            for each in found
        ],
    )
