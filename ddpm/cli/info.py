"""`ddpm info`: what a run folder or a checkpoint is, by `runs.info`."""

from collections.abc import Sequence

from ddpm.cli import flags

EXAMPLES = (
    ("ddpm info runs/digits", "a run: its config, steps, checkpoints"),
    ("ddpm info model.pt", "a file of another program: its format and network"),
)


def run(argv: Sequence[str]) -> int:
    """Print what SOURCE is."""
    source = parser().parse(argv).source
    from ddpm import runs

    runs.info(source)
    return 0


def parser() -> flags.Parser:
    """Flags of the verb."""
    made = flags.Parser(
        "info", "SOURCE [flags]", "Say what a run folder or a checkpoint is. Nothing in it is executed.", EXAMPLES
    )
    made.add_argument("source", metavar="SOURCE", help="a run folder, a checkpoint, or a file of another program")
    return made
