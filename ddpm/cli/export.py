"""`ddpm export`: a run's checkpoint as another program's, by `runs.export_checkpoint`."""

from collections.abc import Sequence
from pathlib import Path

from ddpm.cli import flags

EXAMPLES = (
    ("ddpm export runs/cifar10 --format pytorch-ddpm --out ckpt.pt", "a file that pytorch-ddpm loads and trains on"),
    ("ddpm export runs/cifar10 --format ddpm-package --out model.pth", "a file that the ddpm package loads"),
)


def run(argv: Sequence[str]) -> int:
    """Export."""
    given = parser().parse(argv)
    from ddpm import runs

    runs.export_checkpoint(given.source, given.out, spec=given.format, ema=given.ema)
    return 0


def parser() -> flags.Parser:
    """Flags of the verb."""
    about = "Write a run's newest checkpoint, or a named one, as another program reads it: whole, or not at all."
    made = flags.Parser("export", "SOURCE --format SPEC --out PATH [flags]", about, EXAMPLES)
    made.add_argument("source", metavar="SOURCE", help="a run folder or a checkpoint")
    made.own.add_argument("--format", required=True, metavar="SPEC", help="the format (docs/compatibility.md)")
    made.own.add_argument("--out", type=Path, required=True, metavar="PATH", help="the file that is written")
    made.own.add_argument(
        "--ema", metavar="NAME", help="moving average that goes first, by decay, or none (default: the run's first)"
    )
    return made
