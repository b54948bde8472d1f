"""`ddpm data`: what a data set holds (`runs.data_info`), or its preparation ahead of training (`runs.data_prepare`)."""

from collections.abc import Sequence
from pathlib import Path

from ddpm import config
from ddpm.cli import flags
from ddpm.errors import ConfigError
from ddpm.registry import nearest

EXAMPLES = (
    ("ddpm data info digits --out digits.png", "counts, sizes, classes, and a picture of some"),
    ("ddpm data info folder --data.path photos", "your own images, and which are left out"),
    ("ddpm data prepare cifar10", "fetch, check and decode once"),
)
ACTIONS = ("info", "prepare")


def run(argv: Sequence[str]) -> int:
    """Describe or prepare."""
    action, settings, sheet = parse_data(argv)
    from ddpm import runs

    (runs.data_info if action == "info" else runs.data_prepare)(settings, sheet)
    return 0


def parse_data(argv: Sequence[str]) -> tuple[str, config.DataConfig, Path | None]:
    """The words after `ddpm data` as 'info' or 'prepare', the data set and the contact sheet's path; raises ConfigError."""
    given = parser().parse(argv)
    if given.action not in ACTIONS:
        raise ConfigError(f"{given.action!r} is not info or prepare{nearest(given.action, ACTIONS)}.")
    settings = flags.build([("DATASET", {"data": {"dataset": given.dataset}})], given.typed)
    return given.action, settings.data, given.out


def parser() -> flags.Parser:
    """Flags of the verb."""
    made = flags.Parser(
        "data",
        "info|prepare DATASET [flags]",
        "Look at a data set, or prepare it so that training starts at once.",
        EXAMPLES,
    )
    made.add_argument("action", metavar="info|prepare", help="describe it; or decode it once and keep the result")
    made.add_argument("dataset", metavar="DATASET", help="a data set's name, as in --data.dataset")
    made.own.add_argument("--out", type=Path, metavar="PNG", help="write a sheet of the first images there")
    flags.add_fields(made, ["data"])
    return made
