"""`ddpm train`: defaults < preset < --config FILE < flags, then `runs.train`."""

import argparse
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm import config, presets, rundir
from ddpm.cli import flags
from ddpm.errors import EXIT_STOPPED, ConfigError
from ddpm.registry import nearest

EXAMPLES = (
    ("ddpm train digits", "a preset; the same command again goes on where it stopped"),
    ("ddpm train cifar10 --batch-size 64 --processes 4", "a preset with a change, on four GPUs"),
    ("ddpm train folder --data.path photos --data.size 64", "your own images"),
    ("ddpm train --config runs/digits/config.yaml --name again", "the config of another run"),
    ("ddpm train folder --data.path photos --init ckpt.pt", "start from another program's weights"),
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `ddpm train` is told beside the config."""

    run_dir: Path
    resume: str = "auto"
    init: str | None = None
    stop_after_s: float | None = None
    processes: int = 1
    restarts: int = 0
    dry_run: bool = False


def run(argv: Sequence[str]) -> int:
    """Train; 0 when the last step is done, 75 when the run was stopped and saved."""
    settings, options = parse_train(argv)
    flag = (
        f"--processes={options.processes}"
        if options.processes > 1
        else f"--restarts={options.restarts}"
        if options.restarts
        else ""
    )
    if flag and not flags.in_a_group(flag):
        return _launch(["train", *flags.without(argv, "--processes", "--restarts")], options)
    return start(settings, options)


def start(settings: config.RunConfig, options: TrainOptions) -> int:
    """Train in this process."""
    from ddpm import runs

    result = runs.train(
        settings,
        options.run_dir,
        resume=options.resume,
        init=options.init,
        stop_after_s=options.stop_after_s,
        dry_run=options.dry_run,
    )
    return EXIT_STOPPED if result.stopped else 0


def _launch(words: list[str], options: TrainOptions) -> int:
    """Train in processes of their own, started again (with growing pauses) when one dies or meets a bug."""
    from ddpm.console import Console
    from ddpm.distributed import launch_processes

    code = launch_processes(words, options.processes)
    for attempt in range(options.restarts):
        if not _may_restart(code):
            break
        pause_s = min(60, 2**attempt)
        Console().warn(
            f"the run ended with code {code}; start {attempt + 1} of {options.restarts} more in {pause_s} s."
        )
        time.sleep(pause_s)
        folder = rundir.RunDir(options.run_dir)
        if any(folder.checkpoints.glob("step-*")):
            words = [*flags.without(words, "--resume"), "--resume=auto"]
            folder.event("restarted", code=code, attempt=attempt + 1)
        code = launch_processes(words, options.processes)
    return code


def _may_restart(code: int) -> bool:
    """A bug or a signal, unless it is one of those that ask to stop; other codes would only come again."""
    return code == 1 or (code > 128 and code not in (128 + signal.SIGINT, 128 + signal.SIGTERM))


def parse_train(argv: Sequence[str]) -> tuple[config.RunConfig, TrainOptions]:
    """The words after `ddpm train` as a valid config and options; raises ConfigError."""
    given = parser().parse(argv)
    if given.preset is None and given.config is None:
        given.config = _config_of_run(given)
    if given.init is not None:
        _check_init(given.typed)
    layers = []
    if given.preset is not None:
        layers.append((f"preset {given.preset}", _preset(given.preset)))
    if given.config is not None:
        layers.append((f"--config {given.config}", config.read_yaml(given.config)))
    settings = flags.build(layers, given.typed)
    return settings, TrainOptions(
        run_dir=_run_dir(given),
        resume=given.resume,
        init=given.init,
        stop_after_s=None if given.stop_after is None else config.duration_s(given.stop_after),
        processes=given.processes,
        restarts=given.restarts,
        dry_run=given.dry_run,
    )


def parser() -> flags.Parser:
    """Options of the verb, then a flag for every config field."""
    table = flags.table("presets", ((name, preset.summary) for name, preset in presets.PRESETS.items()))
    about = (
        "Train a model. The same command again resumes the run, bit for bit. Defaults < preset < --config FILE < flags."
    )
    made = flags.Parser("train", "[PRESET] [flags]", about, EXAMPLES, table)
    made.add_argument("preset", nargs="?", metavar="PRESET", help="where the config starts from")
    own = made.own
    own.add_argument("--config", type=Path, metavar="FILE", help="YAML file of fields, such as a run's config.yaml")
    place = own.add_mutually_exclusive_group()
    place.add_argument("--name", help="the run's folder is runs/NAME (default: the preset, or the file's name)")
    place.add_argument("--run-dir", metavar="DIR", help="the run's folder itself")
    flags.add_field(made, "seed", "--seed")
    own.add_argument(
        "--resume", default="auto", metavar="auto|never|must|PATH",
        help="auto: go on if the folder holds a checkpoint; never: refuse then; must: refuse otherwise; PATH: from that one",
    )  # fmt: skip
    own.add_argument(
        "--init",
        metavar="SOURCE",
        help="start a new run from the weights, the network and the diffusion of a run, a checkpoint or another program's file",
    )
    own.add_argument(
        "--stop-after", metavar="TIME", help="save and end after 90s, 20m or 1.5h; the same command goes on"
    )
    own.add_argument(
        "--processes",
        type=flags.whole(1, 4096),
        default=1,
        metavar="N",
        help="processes on this machine, one for each GPU",
    )
    own.add_argument(
        "--restarts",
        type=flags.whole(0, 1000),
        default=0,
        metavar="N",
        help="start again up to N times when a process dies",
    )
    own.add_argument("--dry-run", action="store_true", help="show config, parameters, memory and paths; train nothing")
    flags.add_fields(made)
    made.epilog = "Switches: --data.flip or --data.flip true; --no-data.flip or --data.flip false."
    return made


def _config_of_run(given: argparse.Namespace) -> Path:
    """The config.yaml of the run that is named, an imported one say; raises ConfigError where there is none."""
    if given.run_dir is not None or given.name is not None:
        path = _run_dir(given) / "config.yaml"
        if path.is_file():
            return path
    raise ConfigError(f"give a preset or --config FILE; presets: {', '.join(presets.PRESETS)}.")


def _check_init(typed: flags.Typed) -> None:
    """Raise ConfigError for flags that --init would pass over."""
    kept = ("model.dropout", "model.gradient_checkpointing")
    for name, flag in typed.spelling.items():
        if name.startswith(("model.", "diffusion.")) and name not in kept:
            raise ConfigError(
                f"{flag} cannot go with --init, which brings the network and the diffusion; leave it out."
            )


def run_name(name: str) -> str:
    """`name`, if it can only be a folder right inside runs/; raises ConfigError."""
    if not rundir.valid_name(name):
        raise ConfigError(
            f"--name: {name[:120]!r} cannot name a run; use up to 100 of A-Z a-z 0-9 . _ -, no dot first, or give the folder with --run-dir."
        )
    return name


def _run_dir(given: argparse.Namespace) -> Path:
    if given.run_dir is not None:
        if not given.run_dir.strip() or "\0" in given.run_dir:
            raise ConfigError(f"--run-dir: {given.run_dir!r} is not a folder's name.")
        return Path(given.run_dir)
    name = given.name if given.name is not None else given.preset if given.preset is not None else given.config.stem
    return Path("runs") / run_name(name)


def _preset(name: str) -> dict[str, object]:
    if name not in presets.PRESETS:
        if _is_folder(name):
            raise ConfigError(
                f"{name!r} is a folder, not a preset; to train on the images in it: ddpm train folder --data.path {name}."
            )
        if name.endswith((".yaml", ".yml", ".json")):
            raise ConfigError(f"{name!r} is not a preset; to start from a file: ddpm train --config {name}.")
        if name.partition(":")[0] in _data_sets():
            words = "folder --data.path FILE.npz" if name == "npz" else "digits"
            raise ConfigError(
                f"{name!r} is a data set, not a preset; to train on it: ddpm train {words} --data.dataset {name}."
            )
        raise ConfigError(
            f"preset {name!r} is not known{nearest(name, presets.PRESETS)}; choose from {', '.join(presets.PRESETS)}."
        )
    return presets.preset(name)


def _data_sets() -> list[str]:
    from ddpm.data import Dataset

    return Dataset.names()


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False
