"""`ddpm demo`: the whole way on the handwritten digits, by `runs.demo`."""

from collections.abc import Sequence
from pathlib import Path

from ddpm.cli import flags
from ddpm.errors import EXIT_STOPPED

EXAMPLES = (
    ("ddpm demo", "train on 8 x 8 digits that come with the package, then sample"),
    ("ddpm demo --steps 200", "quicker, and worse"),
)


def run(argv: Sequence[str]) -> int:
    """Train, sample, show; 75 when training was stopped and saved."""
    given = parser().parse(argv)
    from ddpm import runs

    report = runs.demo(given.run_dir, seed=given.seed, steps=given.steps)
    return EXIT_STOPPED if report == {"stopped": True} else 0


def parser() -> flags.Parser:
    """Flags of the verb."""
    made = flags.Parser("demo", "[flags]", "The whole way in a few minutes on a CPU: data, training, images.", EXAMPLES)
    made.own.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where everything goes (default: runs/demo)",
    )
    made.own.add_argument(
        "--seed", type=flags.whole(0), default=0, metavar="N", help="seed of everything random (default: 0)"
    )
    made.own.add_argument(
        "--steps", type=flags.whole(1), metavar="N", help="optimizer steps (default: enough to see digits)"
    )
    return made
