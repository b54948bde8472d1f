"""Checks of the weights: the moving average, and how training went."""

import math
from collections.abc import Sequence

import numpy as np

from ddpm.doctor.evidence import Effect, Float64
from ddpm.doctor.exam import Exam
from ddpm.doctor.findings import Finding

LAG = 0.1
"""Log-ratio of the average's loss over that of the weights that matters: a tenth."""

LINES = 12
"""Lines of metrics.jsonl that a course can be told from."""


def check_average(exam: Exam) -> list[Finding]:
    """The moving average must have left its start, move on, and be no worse than the weights themselves."""
    average, losses = exam.average, exam.held or exam.fitted
    if average is None:
        return [Finding("info", "images are drawn by the weights themselves, not by a moving average")]
    advice = (
        "draw with --ema none, and train again with an average that follows, such as --train.ema warmup:decay=0.999"
    )
    if average.untouched:
        what = f"the moving average {average.name} was never updated: {average.untouched} norms and biases are as they were made"
        return [Finding("error", what, advice)]
    if average.stood_still:
        what = f"the moving average {average.name} was not updated: it is that of the checkpoint before, though the weights have changed"
        return [Finding("error", what, advice)]
    if losses is None or exam.raw is None:
        return []
    lag = Effect.of(losses.log_ratio(exam.raw).mean(axis=1))
    told = f"the loss of the moving average {average.name} is {math.exp(lag.mean):.2f} times that of the weights themselves"
    if lag.above(LAG):
        what = f"{told}: its decay is too long for the steps done, so that it lags behind"
        return [Finding("error", what, advice)]
    return [Finding("ok", told)]


def check_training(exam: Exam) -> list[Finding]:
    """Loss and gradient norm of the last quarter of the steps must not be far above those of the quarters before."""
    lines = [line for line in exam.metrics if "loss" in line and "grad_norm" in line]
    if len(lines) < LINES:
        return [Finding("info", f"metrics.jsonl has {len(lines)} lines, too few to tell how training went")]
    quarters = [
        np.array(part) for part in np.array_split(np.array([[line["loss"], line["grad_norm"]] for line in lines]), 4)
    ]
    found = [*_rising(quarters), *_exploding(quarters)]
    if skipped := int(lines[-1].get("skipped", 0)):
        found.append(
            Finding(
                "warning",
                f"{skipped} steps had NaN or infinite losses and were left out",
                "lower --lr, or use --precision float32",
            )
        )
    loss, norm = quarters[-1].mean(axis=0)
    return found or [Finding("ok", f"training went steadily: at its end loss {loss:.3g}, gradient norm {norm:.2g}")]


def _rising(quarters: Sequence[Float64]) -> list[Finding]:
    last, best = (
        quarters[-1][:, 0],
        min((part[:, 0] for part in quarters[:-1]), key=lambda losses: float(losses.mean())),
    )
    error = math.hypot(*(part.std(ddof=1) / len(part) ** 0.5 for part in (last, best)))
    rise = float(last.mean() - best.mean())
    if rise <= 4 * error or rise <= 0.25 * best.mean():
        return []
    what = f"the training loss rose from {best.mean():.3g} to {last.mean():.3g}"
    return [Finding("warning", what, "use an earlier checkpoint, and go on from it with a lower --lr")]


def _exploding(quarters: Sequence[Float64]) -> list[Finding]:
    last, before = float(np.median(quarters[-1][:, 1])), float(np.median(quarters[1][:, 1]))
    if last == 0:
        return [Finding("error", "the gradient norm is 0: nothing is learnt", "train anew with a lower --lr")]
    if last <= 10 * before:
        return []
    what = f"the gradient norm rose from {before:.2g} to {last:.2g}"
    return [
        Finding("warning", what, "use an earlier checkpoint, and go on from it with a lower --lr or --train.grad-clip")
    ]
