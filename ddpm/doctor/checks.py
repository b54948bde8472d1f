"""The table of checks of a run, causes before what they cause. To add a check is to add a function and its line here."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ddpm.doctor import images, inputs, noise, weights
from ddpm.doctor.exam import Exam
from ddpm.doctor.findings import Finding, alarms

CHECKS: Mapping[str, Callable[[Exam], list[Finding]]] = {
    "flags": inputs.check_flags,
    "average": weights.check_average,
    "range": inputs.check_range,
    "channels": inputs.check_channels,
    "objective": noise.check_objective,
    "schedule": noise.check_schedule,
    "terminal-snr": noise.check_terminal_snr,
    "labels": inputs.check_labels,
    "loss": noise.check_loss,
    "training": weights.check_training,
    "thresholding": images.check_thresholding,
    "steps": images.check_steps,
    "memorisation": images.check_memorisation,
    "statistics": images.check_statistics,
    "saturation": images.check_saturation,
    "classes": images.check_classes,
}
"""Name -> check. A check says what it found, "ok" where all is well, and nothing about what was not measured."""


_FOREMOST = ("average", "range", "channels", "objective")
_CAUSES = (*_FOREMOST, "schedule", "terminal-snr", "labels", "thresholding", "steps")

SYMPTOMS: Mapping[str, Collection[str]] = {
    "schedule": _FOREMOST,
    "labels": (*_FOREMOST, "schedule"),
    "loss": (*_FOREMOST, "schedule", "labels", "memorisation"),
    "thresholding": (*_FOREMOST, "schedule"),
    "steps": (*_FOREMOST, "schedule"),
    "statistics": (*_CAUSES, "loss"),
    "saturation": (*_CAUSES, "loss"),
    "classes": (*_CAUSES, "loss"),
}
"""Check -> checks whose alarms explain its own, which then is none."""


def examine(exam: Exam) -> list[Finding]:
    """Every check's findings, in the table's order; what could not be looked at is told at the end."""
    found = [replace(finding, check=name) for name, check in CHECKS.items() for finding in check(exam)]
    raised = {finding.check for finding in alarms(found)}
    return [_explained(finding, raised) for finding in found] + [
        Finding("info", text, check="missing") for text in exam.missing
    ]


def _explained(finding: Finding, raised: Collection[str]) -> Finding:
    causes = [name for name in SYMPTOMS.get(finding.check, ()) if name in raised]
    if not causes or finding.level not in ("warning", "error"):
        return finding
    return replace(finding, level="info", advice=f"follows from {causes[0]}")
