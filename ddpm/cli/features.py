"""`ddpm features`: train the small classifier whose features images are compared by (`runs.features`), or list extractors."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ddpm import config
from ddpm.cli import flags
from ddpm.errors import EXIT_STOPPED, ConfigError
from ddpm.registry import nearest

EXAMPLES = (
    ("ddpm features list", "what images can be compared by"),
    ("ddpm features train fashion-mnist", "a classifier with 64 features, and its accuracy"),
    ("ddpm features train fashion-mnist --noisy", "one for classifier guidance"),
    ("ddpm features train folder --data.path photos --data.split all", "your own images: subfolders are classes"),
)
ACTIONS = ("train", "list")


def run(argv: Sequence[str]) -> int:
    """Train or list; 75 when training was stopped and saved."""
    given = _parsed(argv)
    from ddpm.runs import features

    if given.action == "list":
        features.list_features()
        return 0
    settings = flags.build([("DATASET", features.recipe(given.dataset, given.noisy))], given.typed)
    run_dir = given.run_dir or Path("runs") / f"features-{_plain(given.dataset)}{'-noisy' * given.noisy}"
    stop_after_s = None if given.stop_after is None else config.duration_s(given.stop_after)
    result = features.train_features(settings, run_dir, out=given.out, stop_after_s=stop_after_s)
    return EXIT_STOPPED if result.stopped else 0


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    given = parser().parse(argv)
    if given.action not in ACTIONS:
        raise ConfigError(f"{given.action!r} is not train or list{nearest(given.action, ACTIONS)}.")
    if given.action == "train" and given.dataset is None:
        raise ConfigError("give a data set: ddpm features train DATASET.")
    return given


def _plain(dataset: str) -> str:
    """A data set's name as part of a folder's."""
    return "".join(letter if letter.isalnum() else "-" for letter in dataset.partition(":")[0])


def parser() -> flags.Parser:
    """Flags of the verb."""
    about = "Train the small classifier that evaluation or classifier guidance needs, or list what images can be compared by."
    made = flags.Parser("features", "train DATASET|list [flags]", about, EXAMPLES)
    made.add_argument("action", metavar="train|list", help="train a classifier, or list the extractors")
    made.add_argument("dataset", metavar="DATASET", nargs="?", help="data set with classes")
    own = made.own
    own.add_argument("--noisy", action="store_true", help="train on noisy images too: for classifier guidance")
    flags.add_field(made, "train.steps", "--steps", "by the data set")
    flags.add_field(made, "train.batch_size", "--batch-size")
    flags.add_field(made, "train.lr", "--lr", "0.003")
    flags.add_field(made, "diffusion.schedule", "--schedule", "cosine; only with --noisy")
    flags.add_field(made, "seed", "--seed")
    flags.add_field(made, "runtime.device", "--device")
    flags.add_field(made, "runtime.precision", "--precision")
    own.add_argument("--out", type=Path, metavar="FILE", help="weights as safetensors (default: in the run's folder)")
    own.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="metrics and checkpoints (default: runs/features-DATASET)"
    )
    own.add_argument(
        "--stop-after", metavar="TIME", help="save and end after 90s, 20m or 1.5h; the same command goes on"
    )
    flags.add_fields(made, ["data"])
    return made
