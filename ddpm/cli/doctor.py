"""`ddpm doctor`: what is wrong with this machine and installation, by `ddpm.doctor`.

Not by way of `ddpm.runs`, which cannot be imported where torch is what is broken.
"""

from collections.abc import Sequence

from ddpm.cli import flags
from ddpm.errors import ConfigError

EXAMPLES = (("ddpm doctor", "one line a finding; exit code 2 if something is broken"),)


def run(argv: Sequence[str]) -> int:
    """Print the findings."""
    parser().parse(argv)
    from ddpm import doctor
    from ddpm.console import Console

    findings = doctor.check_environment()
    for finding in findings:
        Console().info(f"{finding.level:8} {finding}")
    return ConfigError.exit_code if any(finding.level == "error" for finding in findings) else 0


def parser() -> flags.Parser:
    """Flags of the verb."""
    return flags.Parser(
        "doctor",
        "[flags]",
        "Check this machine and installation: versions, devices, optional packages, free space.",
        EXAMPLES,
    )
