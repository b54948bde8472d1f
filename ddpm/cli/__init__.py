"""The command `ddpm VERB`.

A verb is a module here, named as the verb, with `run(argv) -> exit code` for the words after the verb, and a line in
`VERBS`. What goes wrong becomes one sentence on standard error and the exit code of its class (`ddpm.errors`).
"""

import os
import sys
from collections.abc import Sequence

from ddpm import __version__
from ddpm.errors import EXIT_STOPPED, ConfigError, DDPMError

VERBS = {
    "demo": "the whole way on the handwritten digits, in a few minutes on a CPU",
    "train": "train a model, or go on with a run",
    "sample": "draw images from a run or a checkpoint",
    "edit": "fill in, vary, interpolate, invert or denoise images",
    "evaluate": "how good a model or a set of images is",
    "sweep": "samplers x steps: quality against cost, and a recommended setting",
    "stats": "mean and covariance of a data set's features, as a file",
    "metrics": "what runs have measured, side by side",
    "data": "look at a data set, or prepare it",
    "features": "train the small classifier that evaluation compares by, or list extractors",
    "import": "make a run of another program's checkpoint",
    "export": "write a checkpoint as another program reads it",
    "info": "what a run folder, a checkpoint or another program's file is",
    "doctor": "why a run's samples are bad; without a run, what is wrong with this machine",
}
"""Verb -> its line in `ddpm --help`, in the order shown."""

_CLOSED_PIPE = 141
"""The shell's code for SIGPIPE: the reader of standard output went away before the work was done."""

_HELP = """\
usage: ddpm VERB ...

Denoising diffusion image models: train, sample, evaluate.

{verbs}

examples:
  ddpm demo
  ddpm train digits --steps 2000
  ddpm sample runs/digits --num-images 64

`ddpm VERB --help` explains a verb. Exit codes: 0 done, 1 a bug, 2 usage or config,
3 data or files, 4 checkpoint, 5 diverged, 75 stopped and saved.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's own) and return its exit code; raises nothing."""
    code = _run(_ordered(list(sys.argv[1:] if argv is None else argv)))
    return code if _flushed() else code or _CLOSED_PIPE


def _ordered(words: list[str]) -> list[str]:
    """`--debug VERB ...` is `VERB --debug ...`."""
    return [words[1], "--debug", *words[2:]] if words[:1] == ["--debug"] and len(words) > 1 else words


def _run(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BrokenPipeError:
        return _CLOSED_PIPE
    except KeyboardInterrupt:
        return _tell("stopped.", EXIT_STOPPED, words)
    except DDPMError as error:
        return _tell(str(error), error.exit_code, words)
    except Exception as error:
        what = f"internal error {type(error).__name__}: {error} (a bug): run again with --debug for the traceback"
        return _tell(what, 1, words)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        print(_HELP.format(verbs="\n".join(f"  {verb:{width}}  {line}" for verb, line in VERBS.items())), end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in VERBS:
        raise ConfigError(_unknown(words[0]))
    import importlib
    import keyword

    verb = words[0]
    module = importlib.import_module(f"ddpm.cli.{verb}_" if keyword.iskeyword(verb) else f"ddpm.cli.{verb}")
    return int(module.run(words[1:]))


def _unknown(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(VERBS)}."
    return f"{word!r} is not a verb; {hint}"


def _tell(message: str, code: int, words: Sequence[str]) -> int:
    from ddpm.console import write_line

    if "--debug" in words:
        import traceback

        write_line(sys.stderr, traceback.format_exc().rstrip())
    name = f"ddpm {words[0]}" if words and words[0] in VERBS else "ddpm"
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    name = name if rank == "0" else f"warning: process {rank}"  # of a group, the first speaks for all
    line = " ".join(message.split())
    write_line(sys.stderr, f"{name}: {line if len(line) <= 1000 else line[:1000] + '...'}")
    return code


def _flushed() -> bool:
    """Whether all that was printed could be; if not, the interpreter is kept from complaining of it at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        from ddpm.console import silence

        silence(sys.stdout)
        return False
    return True
