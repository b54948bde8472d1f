"""What a check says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report: what was found, what to do where something is to be done, and the check that says so.

    Warnings and errors are alarms: of something that is slow or spoils images, and of something that makes them impossible.
    """

    level: Severity
    what: str
    advice: str = ""
    check: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.advice}" if self.advice else self.what


def alarms(findings: Iterable[Finding]) -> list[Finding]:
    """The warnings and errors."""
    return [finding for finding in findings if finding.level in ("warning", "error")]
