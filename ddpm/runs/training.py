"""`ddpm train`: everything is checked and built before any work starts."""

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ddpm import checkpoint, config, console, distributed, images, planning, rundir, runtime, sampling
from ddpm.config import DataConfig, RunConfig
from ddpm.data import ImageSet, load_dataset
from ddpm.data.loader import Loader
from ddpm.distributed import World
from ddpm.errors import CheckpointError, ConfigError, DataError
from ddpm.guidance import Guidance
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.rundir import RunDir
from ddpm.runs.guiding import Guide, absolute
from ddpm.runs.loading import Model, find_checkpoint, load
from ddpm.runs.scoring import Judge, Scoring
from ddpm.runtime import Runtime
from ddpm.samplers import OfModel, Sampler, Thresholding
from ddpm.training.ema import parse_decays
from ddpm.training.estimating import EstimateVariance
from ddpm.training.hooks import Checkpoints, Every, Listener, Metrics
from ddpm.training.loggers import SinkGroup, check_names, open_sinks
from ddpm.training.trainer import Hook, StopClock, Trainer, load_weights


@dataclass(frozen=True)
class TrainResult:
    """How training ended: its folder, the steps done, and whether a signal stopped it before the last one."""

    run_dir: Path
    step: int
    stopped: bool


def train(
    settings: RunConfig,
    run_dir: Path,
    *,
    resume: str = "auto",
    init: str | Path | None = None,
    stop_after_s: float | None = None,
    dry_run: bool = False,
) -> TrainResult:
    """Train, or go on training, in a run folder.

    Args:
        settings: the recipe.
        run_dir: the folder; the same call again resumes from its newest whole checkpoint.
        resume: auto, never (refuse a folder with checkpoints), must (refuse one without), or a checkpoint to start from.
        init: a run, a checkpoint or a file of another program whose weights a new run starts from, at step 0: the network
            and the diffusion are then its own, whatever the settings say, but for dropout and gradient checkpointing.
        stop_after_s: save and end after so many seconds.
        dry_run: print the plan and do nothing.

    Raises ConfigError, DataError, CheckpointError, DivergedError.
    """
    with distributed.join() as world:
        run = RunDir(Path(run_dir))
        settings = _keep_resolved(_absolute(settings), run)
        machine = runtime.resolve(**settings.runtime.model_dump(), processes=world.size, local_rank=world.local_rank)
        say = console.Console(quiet=not world.is_main)
        check_names(settings.logging.sinks)
        first = None if init is None else load(init, warn=say.warn)
        settings = settings if first is None else _with_network(settings, first)
        data = _load_data(settings.data, say)
        settings = _resolved(settings, machine, data)
        model = build_diffusion(
            settings.model, settings.diffusion, data.shape, data.num_classes, settings.seed, settings.data.augment
        )
        model.check_training()
        if first is not None:
            _initialise(model, first)
        Sampler.parse(settings.sample.sampler).path(model.schedule)
        if isinstance(Thresholding.parse(settings.diffusion.thresholding), OfModel):
            raise ConfigError(
                "--diffusion.thresholding=model is what samplers say; choose the model's own: clip, dynamic or none."
            )
        parse_decays(settings.train.ema)
        if settings.model.norm == "batch" and (world.size > 1 or settings.train.micro_batch is not None):
            raise ConfigError(
                "--model.norm=batch sees only its own part of a batch: use one process and no --train.micro-batch, or another norm."
            )
        guide = Guide.open(settings.sample.guidance, model, data.classes, machine)
        if dry_run:
            planning.show(planning.plan(settings, model, data, machine, world), settings, run.path, say)
            return TrainResult(run.path, 0, stopped=False)
        return _train(settings, run, model, guide, data, machine, world, say, resume, stop_after_s)


def _keep_resolved(settings: RunConfig, run: RunDir) -> RunConfig:
    """What an earlier start resolved stays, where it was left open again."""
    old = run.read_config()
    if old is not None and settings.runtime.precision == "auto":
        runtime_config = settings.runtime.model_copy(update={"precision": old.runtime.precision})
        return settings.model_copy(update={"runtime": runtime_config})
    return settings


def _with_network(settings: RunConfig, first: Model) -> RunConfig:
    """The settings with the network and the diffusion of the model that training starts from."""
    kept = {name: getattr(settings.model, name) for name in ("dropout", "gradient_checkpointing")}
    network = first.config.model.model_copy(update=kept)
    return settings.model_copy(update={"model": network, "diffusion": first.config.diffusion})


def _initialise(model: GaussianDiffusion, first: Model) -> None:
    try:
        load_weights(model, first.diffusion.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"--init {first.source}: {error} The images or their classes are others.") from None


def _resolved(settings: RunConfig, machine: Runtime, data: ImageSet) -> RunConfig:
    """The config with what was left to the machine and to the data filled in, so that a resume does not guess again."""
    found: dict[str, Any] = {"runtime": settings.runtime.model_copy(update={"precision": machine.precision})}
    if settings.model.conditioning == "auto":
        conditioning = "global" if data.num_classes else "none"
        found["model"] = settings.model.model_copy(update={"conditioning": conditioning})
    settings = settings.model_copy(update=found)
    unlabelled = settings.model.conditioning == "none" or not settings.diffusion.label_drop
    if unlabelled and isinstance(settings.sample.guidance, float):  # nothing to guide by
        return settings.model_copy(update={"sample": settings.sample.model_copy(update={"guidance": 1.0})})
    return settings


def _absolute(settings: RunConfig) -> RunConfig:
    """Paths that hold wherever the command is next given."""
    if isinstance(settings.sample.guidance, str):
        written = absolute(Guidance.parse(settings.sample.guidance)).written
        settings = settings.model_copy(update={"sample": settings.sample.model_copy(update={"guidance": written})})
    given = {name: getattr(settings.data, name) for name in ("path", "labels")}
    paths = {name: path.expanduser().absolute() for name, path in given.items() if path is not None}
    return settings.model_copy(update={"data": settings.data.model_copy(update=paths)})


def _load_data(settings: DataConfig, say: console.Console) -> ImageSet:
    with say.counting("reading", "files") as progress:
        data = load_dataset(settings, progress)
    for note in data.notes:
        say.info(note)
    if data.skipped:
        first = data.skipped[0]
        if not say.quiet:
            say.warn(f"{len(data.skipped)} of the images left out, the first: {first.path} ({first.reason}).")
    return data


def _train(
    settings: RunConfig,
    run: RunDir,
    model: GaussianDiffusion,
    guide: Guide,
    data: ImageSet,
    machine: Runtime,
    world: World,
    say: console.Console,
    resume: str,
    stop_after_s: float | None,
) -> TrainResult:
    with ExitStack() as stack:
        if world.is_main:
            _check_folder(settings, run, resume)
            run.create()
            stack.enter_context(run.lock())
            stack.callback(run.discard)
            run.clean()

        def warn(text: str) -> None:
            say.warn(text)
            if world.is_main:
                with suppress(DataError):  # a full disk is what is warned of
                    run.event("warned", text=text)

        found = _find_checkpoint(run, resume, settings, data, warn) if world.is_main else None
        path = world.broadcast(None if found is None else found.path)
        if found is None and isinstance(path, Path):
            found = checkpoint.load(path)
        if found is not None and found.step >= settings.train.steps:
            say.info(
                f"{found.path}: is at step {found.step} already; raise --steps to go on, or draw: ddpm sample {found.path}"
            )
            return TrainResult(run.path, found.step, stopped=False)

        judge = Judge.open(settings, data, machine, world, say) if settings.evaluate.every else None
        machine.place(model)
        part = world.share(settings.train.batch_size)
        loader = Loader(data, settings.train.batch_size, settings.seed, settings.data.flip, part, settings.data.workers)
        trainer = Trainer(model, loader, settings.train, machine, world, settings.seed, warn)
        display = stack.enter_context(
            console.TrainingDisplay(settings.train.steps, found.step if found else 0, quiet=not world.is_main)
        )
        listeners: list[Listener] = [display.update]
        metrics = Metrics(run.metrics if world.is_main else None, settings.train.log_every, listeners)
        saver = Checkpoints(run, settings, _facts(data, machine), metrics, warn)
        if found is not None:
            saver.restore(trainer, found)
            if not world.is_main:
                metrics.sums.zero_()
        if world.is_main:
            _record_start(settings, run, data, machine, found, trainer, say, warn)
        sinks = _sinks(settings, run, warn) if world.is_main else SinkGroup({}, warn)
        stack.callback(sinks.close)
        listeners.append(lambda record: sinks.log(int(record["step"]), record))
        stop = stack.enter_context(stop_signals())
        clock = StopClock(stop_after_s)
        hooks: list[Hook] = [metrics, saver, Every(settings.train.preview_every, Preview(settings, guide, run, sinks))]
        if model.variance.estimated:
            hooks.insert(1, EstimateVariance(trainer, data, say.info))
            if settings.train.preview_every or judge is not None:
                say.info(
                    f"--diffusion.variance={model.variance.name} is estimated after step {settings.train.steps}; "
                    "until then previews and scores are drawn with fixed-small."
                )
        if judge is not None and world.is_main:
            scoring = Scoring(judge, settings, guide, run, sinks, saver, trainer.step)
            hooks.append(Every(settings.evaluate.every, scoring))
        trainer.run(hooks, lambda: stop.asked or clock())
        stopped = world.any(stop.asked) and trainer.step < settings.train.steps
        if world.is_main:
            run.event("stopped" if trainer.step < settings.train.steps else "finished", step=trainer.step)
        _say_end(say, run, trainer, settings)
        return TrainResult(run.path, trainer.step, stopped)


def _say_end(say: console.Console, run: RunDir, trainer: Trainer, settings: RunConfig) -> None:
    if trainer.step < settings.train.steps:
        say.info(
            f"stopped and saved at step {trainer.step} of {settings.train.steps}; the same command goes on from there."
        )
    else:
        say.info(f"trained to step {trainer.step}; draw images with: ddpm sample {run.path}")


def _check_folder(settings: RunConfig, run: RunDir, resume: str) -> None:
    """Refuse what would mix two runs or overwrite one; raises ConfigError or DataError."""
    old = run.read_config()
    if old is not None and (changed := config.differences(old, settings)):
        name, (before, after) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more fields)" if len(changed) > 1 else ""
        raise ConfigError(
            f"--run-dir {run.path}: holds a run with {name}={before}, not {after}{more}; choose another --name, or the same settings."
        )
    if resume == "never" and checkpoint.listing(run.checkpoints):
        raise DataError(
            f"--resume never: {run.path} holds checkpoints, which are not overwritten; choose another --name."
        )


def _find_checkpoint(
    run: RunDir, resume: str, settings: RunConfig, data: ImageSet, warn: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """Where to go on from: the run's newest whole checkpoint, the one that was named, or none."""
    standing = checkpoint.listing(run.checkpoints)
    found = checkpoint.latest(run.checkpoints, warn)
    if standing and found is None:
        raise CheckpointError(
            f"{run.checkpoints}: none of its {len(standing)} checkpoints is whole; choose another --name to start anew."
        )
    if resume not in ("auto", "never", "must") and found is None:
        return _other_run(find_checkpoint(Path(resume), warn), settings, data, warn)
    if found is None and resume == "must":
        raise CheckpointError(f"--resume must: {run.path} holds no checkpoint.")
    if found is not None and found.state["data"]["fingerprint"] not in (None, data.fingerprint):
        raise DataError(
            f"{found.path}: was trained on other images than {data.name!r} holds now; restore them, or choose another --name."
        )
    return found


def _other_run(
    found: checkpoint.Checkpoint, settings: RunConfig, data: ImageSet, warn: Callable[[str], None]
) -> checkpoint.Checkpoint:
    """Another run's checkpoint to start from: its network and diffusion must be these; its images need not."""
    for name, (before, after) in config.differences(found.config(), settings).items():
        if name.startswith(("model.", "diffusion.")):
            raise ConfigError(f"--resume {found.path}: was trained with {name}={before}, not {after}; use the same.")
    if found.state["data"]["fingerprint"] != data.fingerprint:
        warn(f"{found.path} was trained on other images; going on with {data.name!r}.")
    return found


def _facts(data: ImageSet, machine: Runtime) -> dict[str, Any]:
    return {
        "machine": runtime.describe(machine),
        "shape": list(data.shape),
        "classes": list(data.classes),
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint},
    }


def _record_start(
    settings: RunConfig,
    run: RunDir,
    data: ImageSet,
    machine: Runtime,
    found: checkpoint.Checkpoint | None,
    trainer: Trainer,
    say: console.Console,
    warn: Callable[[str], None],
) -> None:
    facts = rundir.environment(runtime.describe(machine))
    run.write_config(settings)  # first: it is what makes the folder a run
    if not run.environment.exists():
        rundir.write_json(run.environment, facts)
    if data.skipped:
        run.write_skipped([(s.path, s.reason) for s in data.skipped])
    rundir.truncate_jsonl(run.metrics, found.step if found else 0)
    if found is None:
        run.event("started", environment=facts)
        say.info(
            f"{run.path}: training on {len(data)} images {'x'.join(map(str, data.shape))}, {machine.precision} on {machine.device}."
        )
        return
    run.event("resumed", step=found.step, checkpoint=found.path.name, environment=facts)
    say.info(f"{run.path}: going on from step {found.step}.")
    if "imported" in found.state:
        say.info(
            f"{found.path}: was imported; whether it was trained on these {len(data)} images of {data.name!r} is not known, "
            "from here on the run keeps to them."
        )
        return
    before = {**found.state["machine"], **{key: found.state[key] for key in ("processes", "micro_batch")}}
    present = {**runtime.describe(machine), "processes": trainer.world.size, "micro_batch": trainer.micro_batch}
    changed = [
        f"{key} {before.get(key)} before, {value} now" for key, value in present.items() if before.get(key) != value
    ]
    if changed:
        warn(f"{'; '.join(changed)}: the run goes on, but not bit for bit.")


def _sinks(settings: RunConfig, run: RunDir, warn: Callable[[str], None]) -> SinkGroup:
    return open_sinks(
        settings.logging.sinks,
        run.path,
        settings.logging.project,
        run.path.name,
        settings.model_dump(mode="json"),
        warn,
    )


class _StoppedError(Exception):
    """A stop was asked for while a preview was drawn."""


class Preview:
    """Draws samples/step-N.png from the first moving average and fixed seeds; training does not notice, and a stop
    does not wait for it."""

    def __init__(self, settings: RunConfig, guide: Guide, run: RunDir, sinks: SinkGroup) -> None:
        self.settings, self.guide, self.run, self.sinks = settings, guide, run, sinks
        self._model: GaussianDiffusion | None = None

    def __call__(self, trainer: Trainer) -> None:
        """Draw and save the grid of the trainer's present step."""
        assert isinstance(trainer.module, GaussianDiffusion)
        if self._model is None:
            self._model = copy.deepcopy(trainer.module).eval().requires_grad_(False)
        load_weights(self._model, trainer.drawing_weights())
        self._model.do_without_estimate()
        try:
            grid = self._grid(self._model, trainer)
        except _StoppedError:
            return
        images.save_png(self.run.samples / f"step-{trainer.step:08d}.png", grid)
        self.sinks.image(trainer.step, "samples", grid)

    def _grid(self, model: GaussianDiffusion, trainer: Trainer) -> Any:
        import numpy as np

        def on_step(*_: Any) -> None:
            if trainer.should_stop():
                raise _StoppedError

        sample, count = self.settings.sample, self.settings.train.preview_images
        drawn = sampling.generate(
            model,
            Sampler.parse(sample.sampler),
            trainer.runtime,
            seeds=range(count),
            guidance=self.guide,
            chunk=sample.chunk,
            on_step=on_step,
        )
        return images.grid(np.concatenate([part.images for part in drawn]))


class StopFlag:
    """Whether a stop was asked for. A plain attribute: a signal handler may interrupt itself, and a lock (that of
    threading.Event, say) would then wait for itself for ever."""

    asked = False


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM or Ctrl-C sets; a second signal ends the process at once. Only in the main thread.

    Signals within a second are one: a Ctrl-C comes from the terminal, and again from the launcher that passes it on.
    """
    flag = StopFlag()
    first_s = math.inf

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first_s
        if time.monotonic() - first_s > 1:
            os._exit(128 + number)
        first_s = min(first_s, time.monotonic())
        flag.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
