"""`ddpm info`: what a run folder or a checkpoint is, by `runs.info`."""

from collections.abc import Sequence

from ddpm.cli import flags

EXAMPLES = (
    ("ddpm info runs/digits", "a run: its config, steps, checkpoints"),
    ("ddpm info runs/digits/checkpoints/step-00001500", "one of its checkpoints"),
    ("ddpm info ckpt.pt", "another program's file"),
)


def run(argv: Sequence[str]) -> int:
    """Print what SOURCE is."""
    given = parser().parse(argv)
    from ddpm import runs

    runs.info(given.source, **({"trust_code": True} if given.trust_code else {}))
    return 0


def parser() -> flags.Parser:
    """Flags of the verb."""
    made = flags.Parser(
        "info",
        "SOURCE [flags]",
        "Say what a run folder, a checkpoint or another program's file is. No code it names is run.",
        EXAMPLES,
    )
    made.add_argument("source", metavar="SOURCE", help="a run folder, a checkpoint, or another program's file")
    made.own.add_argument(
        "--trust-code", action="store_true", help="count parameters by building the network, running code it names"
    )
    return made
