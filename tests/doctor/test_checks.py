"""Every check on measurements whose verdict is known: it names the fault, and says "ok" where there is none."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ddpm.doctor.checks import CHECKS, SYMPTOMS, examine
from ddpm.doctor.exam import Average, Exam, Judged, LabelLosses, Losses, Neighbours, Samples
from ddpm.doctor.findings import Finding, alarms
from ddpm.doctor.measuring import LEVELS, levels_of
from ddpm.schedules import Schedule

N = 32
RNG = np.random.default_rng(0)
COSINE = Schedule.parse("cosine")
RAMP = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(4, axis=0)


def table(value: float, n: int = N, spread: float = 0.1) -> np.ndarray:
    """Losses (n, L) about a value, images harder and easier by a tenth."""
    return value * np.exp(spread * RNG.standard_normal((n, 1))) * np.ones((1, LEVELS))


def losses(ratio: float, linear: float = 0.2) -> Losses:
    """A network's, at so many times the linear denoiser's."""
    base = table(linear)
    return Losses(ratio * base, base, np.ones((N, LEVELS)))


def exam(**fields: Any) -> Exam:
    return Exam(schedule=COSINE, level=levels_of(COSINE), **fields)


def said(check: str, found: Exam) -> Finding:
    """The one finding of a check."""
    (finding,) = CHECKS[check](found)
    return finding


def lines(losses: Any, norms: Any = 0.5) -> list[dict[str, float]]:
    """Of metrics.jsonl."""
    norms = np.broadcast_to(norms, np.shape(losses))
    return [
        {"step": 50 * k, "loss": float(loss), "grad_norm": float(norm)}
        for k, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def by_time(shift: int) -> np.ndarray:
    """(n, L, L) losses that are least where the network is told the time `shift` levels on."""
    i, j = np.indices((LEVELS, LEVELS))
    return table(0.1)[:, :, None] * (1 + 0.5 * np.abs(j - np.clip(i + shift, 0, LEVELS - 1)))


def labels(model: float, linear: float, hits: int) -> LabelLosses:
    """Log-losses that another label makes larger by so much."""
    candidates = np.arange(N)[:, None] % 3 + np.array([0, 1, 2])
    noise = 0.02 * RNG.standard_normal((2, N, 3))
    gain = np.array([0.0, 1.0, 1.0])
    return LabelLosses(model * gain + noise[0], linear * gain + noise[1], candidates % 3, (hits, 1000), 1 / 3)


def samples(change: float = 0.02, out_of_range: float = 0.0, images: np.ndarray = RAMP) -> Samples:
    """Images whose losses finer steps change by a factor."""
    base = table(0.1)
    noise = 1 + 0.02 * RNG.standard_normal(base.shape)
    finer = base * (1 + change) * noise
    return Samples(images, None, (out_of_range, 3 * out_of_range), "none", 10, 20, base, np.ones(base.shape), finer)


def neighbours(distance: float, held_out: float | None, further: float = 20.0) -> Neighbours:
    """64 images at a distance from a trained one, a second one so much further, and a held-out one; real ones are 20 to 40 apart."""
    near = distance + RNG.random(64)
    others = None if held_out is None else held_out + RNG.random(64)
    real = np.linspace(20, 40, 200)
    return Neighbours(near, near + further, others, real, 0.8 if others is not None else 1.0, RAMP[0])


def judged(right: float, asked: bool = True, given: np.ndarray | None = None) -> Judged:
    """100 images of 10 classes, a share of which is what was asked for; the judge knows 90 % of real ones."""
    wanted = np.arange(100) % 10
    answers = np.where(np.arange(100) < 100 * right, wanted, (wanted + 1) % 10) if given is None else given
    real = np.arange(1000) % 10
    return Judged("tiny-cnn", answers, wanted if asked else None, np.where(np.arange(1000) < 900, real, 0), real)


FAULTS: list[tuple[str, Exam, str, str]] = [
    ("flags", exam(differs={"diffusion.schedule": ("cosine", "linear")}), "warning", "diffusion.schedule=cosine"),
    ("flags", exam(other_images=True), "warning", "other images"),
    ("average", exam(average=Average("0.9", 84, None)), "error", "never updated: 84 norms and biases"),
    ("average", exam(average=Average("0.9", 0, True)), "error", "was not updated"),
    ("average", exam(average=Average("0.9", 0, False), fitted=(three := losses(1.5)), raw=three.linear), "error", "its decay is too long"),
    ("range", exam(data=RAMP // 2 + 128), "error", "from 128 to 255 of 0 to 255, that is from 0.00 to 1.00"),
    ("range", exam(data=RAMP // 4), "warning", "less than half"),
    ("range", exam(fitted=losses(3.0), ranges={"[0, 1]": losses(0.6)}), "error", "trained on images in [0, 1], not in [-1, 1]"),
    ("channels", exam(fitted=(six := losses(0.6)), permuted={(2, 1, 0): six.model / 2, (1, 0, 2): six.model * 2}), "error", "in the order BGR"),
    ("objective", exam(fitted=losses(3.0), objectives={"v": losses(0.6)}), "error", "the network predicts v"),
    ("schedule", exam(fitted=losses(0.9), by_time=by_time(2)), "error", "trained with another noise schedule"),
    ("terminal-snr", replace(exam(moment=30.0), schedule=Schedule.parse("linear:timesteps=100")), "error", "sampling starts from noise alone"),
    ("labels", exam(labels=labels(0.0, 0.3, 800)), "error", "labels were mixed up in training"),
    ("labels", exam(labels=labels(-0.5, 0.3, 800)), "error", "labels were mixed up in training"),
    ("labels", exam(labels=labels(0.0, 0.0, 335)), "error", "the labels look shuffled"),
    ("loss", exam(fitted=losses(1.5)), "warning", "learnt less than means and covariances"),
    ("loss", exam(fitted=losses(10.0)), "error", "that of a network that says 0"),
    ("training", exam(metrics=lines([0.2] * 30 + [0.5] * 10)), "warning", "the training loss rose from 0.2 to 0.5"),
    ("training", exam(metrics=lines([0.2] * 40, [0.5] * 30 + [50.0] * 10)), "warning", "the gradient norm rose from 0.5 to 50"),
    ("training", exam(metrics=[{**line, "skipped": 3} for line in lines([0.2] * 40)]), "warning", "3 steps"),
    ("thresholding", exam(samples=samples(out_of_range=0.3)), "error", "draw with --thresholding clip"),
    ("thresholding", exam(samples=samples(out_of_range=math.nan)), "error", "NaN"),
    ("steps", exam(samples=samples(change=0.2)), "error", "too few sampling steps: 20 steps in place of 10"),
    ("steps", exam(samples=samples(change=-0.2)), "error", "too few sampling steps"),
    ("memorisation", exam(neighbours=neighbours(1.0, 25.0)), "error", "copies training images: 64 of 64"),
    ("memorisation", exam(neighbours=neighbours(1.0, None)), "error", "copies training images: 64 of 64"),
    ("memorisation", exam(neighbours=neighbours(25.0, 26.0), fitted=losses(0.2), held=losses(0.6)), "warning", "times that on training images"),
    ("statistics", exam(data=RAMP, samples=samples(images=RAMP // 4)), "warning", "not 128 +- 74"),
    ("saturation", exam(data=RAMP, samples=samples(images=np.where(RAMP < 128, 0, 255).astype(np.uint8))), "warning", "100% of the pixels"),
    ("classes", exam(judged=judged(0.2)), "error", "20% of the images are judged"),
    ("classes", exam(judged=judged(1.0, asked=False, given=np.arange(100) % 5)), "warning", "too many of class"),
]  # fmt: skip

HEALTHY: list[tuple[str, Exam]] = [
    ("flags", exam()),
    ("average", exam(average=Average("0.9", 0, False), fitted=(one := losses(0.6)), raw=1.05 * one.model)),
    ("average", exam(average=Average("0.9", 0, None), fitted=(one := losses(0.6)), raw=0.95 * one.model)),
    ("range", exam(data=RAMP, fitted=losses(0.6), ranges={"[0, 1]": losses(5.0)})),
    ("range", exam(data=RAMP, fitted=losses(0.6), ranges={"[0, 1]": losses(0.58)})),
    ("channels", exam(fitted=(one := losses(0.6)), permuted={(2, 1, 0): one.model * 0.98, (1, 0, 2): one.model * 2})),
    ("schedule", exam(fitted=losses(0.9), by_time=by_time(0))),
    ("schedule", exam(fitted=losses(0.9), by_time=0.1 * np.exp(0.1 * RNG.standard_normal((N, LEVELS, LEVELS))))),
    ("terminal-snr", exam(moment=30.0)),
    ("labels", exam(labels=labels(0.3, 0.3, 800))),
    ("labels", exam(labels=labels(0.3, 0.0, 335))),
    ("loss", exam(fitted=losses(0.6))),
    ("training", exam(metrics=lines(0.2 + 1 / np.arange(1, 41)))),
    ("thresholding", exam(samples=samples(out_of_range=0.03))),
    ("steps", exam(samples=samples(change=0.05))),
    ("memorisation", exam(neighbours=neighbours(25.0, 25.5))),
    ("memorisation", exam(neighbours=neighbours(25.0, None))),
    ("memorisation", exam(neighbours=neighbours(10.0, 9.0, further=1.0))),
    ("statistics", exam(data=RAMP, samples=samples(images=np.roll(RAMP, 3)))),
    ("saturation", exam(data=RAMP, samples=samples(images=RAMP))),
    ("classes", exam(judged=judged(0.85))),
    ("classes", exam(judged=judged(1.0, asked=False))),
]


@pytest.mark.parametrize(("check", "found", "level", "words"), FAULTS, ids=[f"{row[0]}-{row[3]}" for row in FAULTS])
def test_a_fault_is_named_with_what_to_do(check: str, found: Exam, level: str, words: str) -> None:
    finding = said(check, found)
    assert finding.level == level
    assert words in finding.what or words in finding.advice
    assert finding.advice
    assert "\n" not in str(finding)


@pytest.mark.parametrize(("check", "found"), HEALTHY)
def test_what_is_healthy_is_ok(check: str, found: Exam) -> None:
    assert said(check, found).level == "ok"


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_is_tried_both_ways(check: str) -> None:
    assert check in {row[0] for row in FAULTS}
    assert check in {row[0] for row in HEALTHY} | {"objective"}


def test_nothing_measured_is_no_alarm() -> None:
    found = examine(exam(missing=["no training images"]))
    assert alarms(found) == []
    assert found[-1] == Finding("info", "no training images", check="missing")


def test_findings_carry_the_name_of_their_check() -> None:
    found = examine(exam(other_images=True, samples=samples(change=0.3)))
    assert [finding.check for finding in alarms(found)] == ["flags", "steps"]


def test_what_an_alarm_explains_is_none_itself() -> None:
    found = examine(exam(fitted=losses(3.0), ranges={"[0, 1]": losses(0.6)}, judged=judged(0.2), by_time=by_time(2)))
    assert [finding.check for finding in alarms(found)] == ["range"]
    told = {finding.check: finding for finding in found}
    for name in ("schedule", "loss", "classes"):
        assert (told[name].level, told[name].advice) == ("info", "follows from range")


def test_symptoms_and_causes_are_checks() -> None:
    assert set(SYMPTOMS) | {cause for causes in SYMPTOMS.values() for cause in causes} <= set(CHECKS)


def test_a_network_that_knows_nothing_is_not_blamed_on_labels() -> None:
    untaught = labels(0.0, 0.3, 800)
    untaught.model[:] += 1.0
    assert CHECKS["labels"](exam(labels=untaught)) == []


def test_the_schedule_is_named_where_one_fits() -> None:
    linear = Schedule.parse("linear")
    level = levels_of(COSINE)
    wanted = [int(np.abs(level.t.numpy() - t).argmin()) for t in linear.t_of(level.log_snr).numpy()]
    j = np.arange(LEVELS)[None, :]
    tables = table(0.1)[:, :, None] * (1 + np.abs(j - np.array(wanted)[:, None]))
    assert said("schedule", exam(fitted=losses(0.9), by_time=tables)).advice.endswith("such as linear")


def test_mixed_up_labels_name_the_class_they_fit() -> None:
    mixed = labels(0.0, 0.3, 800)
    mixed.model[:, 1] -= 1.0
    found = said("labels", exam(labels=mixed, classes=("ape", "bee", "cat")))
    assert any(
        f"images of {a!r} go best with {b!r}" in found.what for a, b in (("ape", "bee"), ("bee", "cat"), ("cat", "ape"))
    )


def chance(check: str) -> Exam:
    """Measurements of a healthy run, from numbers that differ by chance only."""
    if check == "average":
        one = losses(0.6)
        raw = one.model * np.exp(0.1 * RNG.standard_normal((N, LEVELS)))
        return exam(average=Average("0.9", 0, None), fitted=one, raw=raw)
    if check == "channels":
        one = losses(0.6)
        return exam(fitted=one, permuted={(2, 1, 0): one.model * np.exp(0.2 * RNG.standard_normal((N, LEVELS)))})
    if check == "steps":
        return exam(samples=samples(change=0.0))
    if check == "labels":
        return exam(labels=labels(0.05, 0.05, 380))
    if check == "classes":
        return exam(judged=judged(1.0, asked=False, given=RNG.integers(0, 10, 100)))
    distances = RNG.uniform(20, 40, (3, 64))
    return exam(neighbours=Neighbours(*distances, np.linspace(20, 40, 200), 0.5, RAMP[0]))


@pytest.mark.parametrize("check", ["average", "channels", "steps", "labels", "classes", "memorisation"])
def test_chance_alone_raises_no_alarm(check: str) -> None:
    assert [finding for _ in range(300) if alarms([finding := said(check, chance(check))])] == []
