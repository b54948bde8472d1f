"""The errors a user can meet. Each has the exit code that the command ends with.

Messages are one sentence: what is wrong, where, what to do.
"""


class DDPMError(Exception):
    """Base of every error that `ddpm` raises on purpose; anything else is a bug (exit 1)."""

    exit_code: int = 1


class ConfigError(DDPMError):
    """A flag, a config file, a component spec or a Python argument is wrong (exit 2)."""

    exit_code = 2


class MissingDependencyError(ConfigError):
    """An optional package is absent or broken; the message names the command that mends it (exit 2)."""


class DataError(DDPMError):
    """Images, files or folders are missing, damaged, in use or not writable (exit 3)."""

    exit_code = 3


class CheckpointError(DDPMError):
    """A checkpoint is missing, damaged or belongs to another run (exit 4)."""

    exit_code = 4


class DivergedError(DDPMError):
    """The loss or a gradient became NaN or infinite; nothing was updated with it (exit 5)."""

    exit_code = 5


EXIT_STOPPED = 75
"""Exit code of work that was stopped (SIGTERM, Ctrl-C, --stop-after is a normal end) and saved: EX_TEMPFAIL, try again."""
