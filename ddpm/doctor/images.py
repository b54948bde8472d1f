"""Checks of images drawn as the run recommends, beside the real ones."""

import math

import numpy as np

from ddpm.doctor.evidence import SURE, Effect, Float64, is_less, is_more
from ddpm.doctor.exam import Exam, Pixels, log_ratio
from ddpm.doctor.findings import Finding

OUT_OF_RANGE = 0.1
"""Root mean square that pixels may have beyond [-1, 1] without thresholding: 13 grey levels."""

UNSETTLED = 0.08
"""Log-ratio of losses of images by which twice the steps may change them; of a first-order sampler they are twice that off."""

SHIFT = 0.3
"""Standard deviations of the pixels of a channel by which the mean may be off."""

STRETCH = math.log(1.5)
"""ln of the factor by which their standard deviation may be off."""

SATURATED = 0.25
"""Share of pixels at 0 or 255 that images may have more than real ones."""

IMBALANCE = 0.25
"""Share of the images that may be of other classes than the training images would have it."""

COPIED = 0.1
"""Share of images that may be much nearer to one training image than to any other."""

OVERFIT = math.log(2.0)
"""Log-ratio that the loss on held-out images may have over that on training images."""


def check_thresholding(exam: Exam) -> list[Finding]:
    """Pixels must stay near [-1, 1] on the way, or be held there."""
    if exam.samples is None:
        return []
    root, most = exam.samples.out_of_range
    rule = exam.samples.thresholding
    if not math.isfinite(root):
        return [
            Finding(
                "error",
                "images have NaN or infinite pixels",
                "use --thresholding clip, an earlier checkpoint, or --ema none",
            )
        ]
    if root > OUT_OF_RANGE:
        what = f"with thresholding {rule!r} pixels end as much as {most:.2g} beyond [-1, 1], {root:.2g} in root mean square"
        return [Finding("error", what, "draw with --thresholding clip")]
    return [Finding("ok", f"with thresholding {rule!r} pixels end at most {most:.2g} beyond [-1, 1]")]


def check_steps(exam: Exam) -> list[Finding]:
    """Twice the steps from the same noise must not change how images look to the model."""
    samples = exam.samples
    if samples is None or samples.finer_losses is None:
        return []
    change = log_ratio(samples.finer_losses, samples.losses, samples.power)
    effects = [Effect.of(column) for column in change.T]
    most = max(effects, key=lambda effect: abs(effect.mean))
    told = f"{samples.finer_steps} steps in place of {samples.steps} change the loss of the images by {math.expm1(most.mean):+.0%}"
    if most.above(UNSETTLED) or most.below(-UNSETTLED):
        return [
            Finding(
                "error", f"too few sampling steps: {told}", f"draw with steps={4 * samples.steps}, or another sampler"
            )
        ]
    return [Finding("ok", f"{told} at most")]


def check_statistics(exam: Exam) -> list[Finding]:
    """Mean and standard deviation of every channel, as the training images have them."""
    if exam.samples is None or exam.data is None:
        return []
    found, told = [], []
    for channel in range(exam.data.shape[1]):
        real, drawn = (images[:, channel].astype(np.float64) for images in (exam.data, exam.samples.images))
        name = ("RGB"[channel] + " ") if exam.data.shape[1] == 3 else ""
        spread = max(float(real.std()), 1.0)
        shift = _difference(drawn.mean(axis=(1, 2)), real.mean(axis=(1, 2)))
        stretch = math.log(max(float(drawn.std()), 1.0) / spread)
        said = f"{name}{drawn.mean():.0f} +- {drawn.std():.0f}, not {real.mean():.0f} +- {real.std():.0f}"
        if (abs(shift.mean) > SHIFT * spread and abs(shift.z) > SURE) or abs(stretch) > STRETCH:
            found.append(said)
        told.append(said.replace(", not ", " for "))
    if found:
        what = f"the pixels of images drawn are not as those of training images: {'; '.join(found)}"
        return [Finding("warning", what, "see the findings before this one; without any, train for longer")]
    return [Finding("ok", f"pixels drawn have mean and deviation {'; '.join(told)}")]


def _difference(ours: Float64, theirs: Float64) -> Effect:
    """Of two means of independent numbers."""
    mean = float(ours.mean() - theirs.mean())
    error = math.hypot(*(x.std(ddof=1) / len(x) ** 0.5 for x in (ours, theirs)))
    return Effect(mean, mean / error if error else math.copysign(math.inf, mean) if mean else 0.0)


def check_saturation(exam: Exam) -> list[Finding]:
    """Pixels at the ends of the range, beside those of training images."""
    if exam.samples is None or exam.data is None:
        return []
    drawn, real = (_saturated(images) for images in (exam.samples.images, exam.data))
    excess = _difference(drawn, real)
    told = f"{drawn.mean():.0%} of the pixels drawn are 0 or 255, of training images {real.mean():.0%}"
    if excess.above(SATURATED):
        return [Finding("warning", told, "lower --guidance, or use a dynamic thresholding")]
    return [Finding("ok", told)]


def _saturated(images: Pixels) -> Float64:
    """Share of the pixels of each image."""
    return np.asarray(((images == 0) | (images == 255)).mean(axis=(1, 2, 3)), dtype=np.float64)


def check_memorisation(exam: Exam) -> list[Finding]:
    """Images drawn must be no nearer to those trained on than real images are that were not.

    An image is near to a trained one if it is nearer than 99 % of real images are (held-out ones to trained ones; without
    them, trained ones to each other). Copies are near ones twice as near as to the second nearest (after Carlini et al. 2023,
    section 4.2); and all near ones are where images are nearer to trained images than to held-out ones more often than there
    are more of those (the three-sample test of Meehan et al. 2020).
    """
    near = exam.neighbours
    if near is None:
        return []
    close, n = near.nearest < np.percentile(near.real, 1), len(near.nearest)
    copies, twice = int(close.sum()), int((close & (2 * near.nearest < near.second)).sum())
    told = f"{copies} of {n} images are nearer to a training image than 99 % of real ones, {twice} twice as near as to any other"
    copied = is_more(twice, n, COPIED)
    if near.held_out is not None:
        nearer = float((near.nearest < near.held_out).sum() + 0.5 * (near.nearest == near.held_out).sum())
        told += f", {nearer / n:.0%} nearer to one than to any held-out ({near.prior:.0%} by chance)"
        copied = copied or (is_more(copies, n, 0.01) and is_more(math.floor(nearer), n, near.prior))
    if copied:
        return [
            Finding(
                "error",
                f"the model copies training images: {told}",
                "train on more images, for fewer steps, or with --model.dropout",
            )
        ]
    gap = _overfit(exam)
    if gap is not None and gap.above(OVERFIT):
        what = f"the loss on held-out images is {math.exp(gap.mean):.1f} times that on training images"
        return [Finding("warning", what, "train on more images, for fewer steps, or with --model.dropout")]
    return [Finding("ok", told)]


def _overfit(exam: Exam) -> Effect | None:
    if exam.held is None or exam.fitted is None:
        return None
    return _difference(*(losses.log_ratio().mean(axis=1) for losses in (exam.held, exam.fitted)))


def check_classes(exam: Exam) -> list[Finding]:
    """Images must be judged to be what was asked for, as real ones are, and of every class its share."""
    judged = exam.judged
    if judged is None:
        return []
    count = 1 + int(max(judged.real_true.max(), judged.real.max(), judged.given.max()))
    shares = [np.bincount(labels, minlength=count) / len(labels) for labels in (judged.given, judged.real)]
    moved = 0.5 * float(np.abs(shares[0] - shares[1]).sum())
    if judged.asked is None:
        return _balance(exam, moved, shares[0], shares[1])
    right, real = judged.given == judged.asked, float((judged.real == judged.real_true).mean())
    chance = float((np.bincount(judged.asked, minlength=count) / len(right)) @ shares[0])
    told = f"{right.mean():.0%} of the images are judged to be of the class asked for by {judged.judge}, which knows {real:.0%} of real ones"
    if is_less(int(right.sum()), len(right), (chance + real) / 2):
        return [
            Finding(
                "error", told, "see the labels above; without a finding there, train for longer, or use --guidance 2"
            )
        ]
    return [Finding("ok", told)]


def _balance(exam: Exam, moved: float, drawn: Float64, real: Float64) -> list[Finding]:
    assert exam.judged is not None
    n, m = len(exam.judged.given), len(exam.judged.real)
    told = f"the classes of images drawn, by {exam.judged.judge}, differ from those of real ones in {moved:.0%} of the images"
    # The mean of |share - share'| for multinomial shares is about sqrt(2 / pi) of its standard deviation.
    by_chance = 0.5 * math.sqrt(2 / math.pi) * float(np.sqrt(real * (1 - real) * (1 / n + 1 / m)).sum())
    if moved > by_chance + IMBALANCE:
        most = _name(exam, int((drawn - real).argmax()))
        least = _name(exam, int((drawn - real).argmin()))
        return [Finding("warning", f"{told}: too many of {most}, too few of {least}", "train for longer")]
    return [Finding("ok", f"{told} ({by_chance:.0%} by chance)")]


def _name(exam: Exam, label: int) -> str:
    return repr(exam.classes[label]) if label < len(exam.classes) else f"class {label}"
