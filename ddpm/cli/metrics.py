"""`ddpm metrics`: what runs have measured, side by side, by `runs.metrics`."""

from collections.abc import Sequence
from pathlib import Path

from ddpm.cli import flags

EXAMPLES = (
    ("ddpm metrics runs/digits", "its last metrics, its evaluations, its curves"),
    ("ddpm metrics runs/a runs/b --out comparison", "two runs side by side"),
)


def run(argv: Sequence[str]) -> int:
    """Print and plot."""
    given = parser().parse(argv)
    from ddpm import runs

    runs.metrics(given.runs, given.out)
    return 0


def parser() -> flags.Parser:
    """Flags of the verb."""
    about = (
        "Show what runs have measured side by side, with published figures beside them where the protocol is the same."
    )
    made = flags.Parser("metrics", "RUN... [flags]", about, EXAMPLES)
    made.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders with an evaluations.jsonl")
    made.own.add_argument(
        "--out", type=Path, default=Path("metrics"), metavar="DIR", help="folder for the pictures (default: metrics)"
    )
    return made
