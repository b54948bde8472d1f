"""Checks of what the model was fed: its config, the range and channels of its images, their labels."""

import math

import numpy as np

from ddpm.doctor.evidence import SURE, Effect, is_more
from ddpm.doctor.exam import Exam
from ddpm.doctor.findings import Finding

BETTER = 0.1
"""Log-ratio of two losses that matters: a tenth."""

HALF = 127
"""Grey levels that images in [0, 1] taken for [-1, 1] span at most."""

LOST = math.log(1.2)
"""Log-ratio over a linear denoiser's loss, by the best label, above which a network knows so little that labels are not to blame."""

LEAST_GAIN = 0.01
"""Log-ratio of losses with another label and with their own, below which labels are worth nothing worth speaking of."""


def check_flags(exam: Exam) -> list[Finding]:
    """The run's folder, its checkpoint and its data set must be of one run."""
    found = []
    for name, (folder, checkpoint) in exam.differs.items():
        what = f"config.yaml of the run says {name}={folder}, the checkpoint was trained with {checkpoint}"
        found.append(Finding("warning", what, "the checkpoint counts; put the run's config.yaml back"))
    if exam.other_images:
        what = "the data set holds other images now than this model was trained on"
        found.append(Finding("warning", what, "restore them, or take what follows as a comparison with other images"))
    return found or [Finding("ok", "config and data are those of the checkpoint")]


def check_range(exam: Exam) -> list[Finding]:
    """Images must fill [-1, 1]; the range that the network denoises best is the one it was trained in."""
    found = [*_range_of_data(exam), *_range_of_model(exam)]
    if found or exam.data is None:
        return found
    return [
        Finding("ok", f"images go from {exam.data.min()} to {exam.data.max()}, and the network takes them in [-1, 1]")
    ]


def _range_of_data(exam: Exam) -> list[Finding]:
    if exam.data is None or int(exam.data.max()) - int(exam.data.min()) > HALF + 1:
        return []
    low, high = int(exam.data.min()), int(exam.data.max())
    what = f"the images of the data set go from {low} to {high} of 0 to 255, that is from {low / 127.5 - 1:.2f} to {high / 127.5 - 1:.2f}"
    if low >= HALF:
        return [
            Finding(
                "error", f"{what}, as images in [0, 1] taken for [-1, 1] do", "scale them to 0 to 255 and train again"
            )
        ]
    return [
        Finding(
            "warning",
            f"{what}, less than half of the range",
            "stretch them to 0 to 255 and train again, unless they are meant so",
        )
    ]


def _range_of_model(exam: Exam) -> list[Finding]:
    if exam.fitted is None:
        return []
    own = exam.fitted.log_ratio().mean(axis=1)
    best: tuple[float, str] | None = None
    for name, losses in exam.ranges.items():
        other = losses.log_ratio().mean(axis=1)
        gain = Effect.of(own - other)
        if gain.above(BETTER) and other.mean() < 0 and (best is None or gain.mean > best[0]):
            best = gain.mean, name
    if best is None:
        return []
    what = (
        f"the network was trained on images in {best[1]}, not in [-1, 1]: there its loss is {np.exp(own.mean() - best[0]):.2f} "
        f"of a linear denoiser's, on the images as they are {np.exp(own.mean()):.2f}"
    )
    return [Finding("error", what, "train again on uint8 images, which ddpm scales to [-1, 1] itself")]


def check_channels(exam: Exam) -> list[Finding]:
    """The order of channels that the network denoises best is the one it was trained with."""
    if exam.fitted is None or not exam.permuted:
        return []
    gains = {order: Effect.of(exam.fitted.log_ratio(loss).mean(axis=1)) for order, loss in exam.permuted.items()}
    order, gain = max(gains.items(), key=lambda item: item[1].mean)
    if gain.above(BETTER):
        named = "".join("RGB"[channel] for channel in order)
        what = f"the network was trained on channels in the order {named}: so its loss is {np.exp(-gain.mean):.2f} of that on RGB"
        return [Finding("error", what, "train again on RGB images, or put the channels of those drawn in order")]
    return [
        Finding("ok", f"channels are in order: any other order has {np.exp(-gain.mean):.2f} times the loss or more")
    ]


def check_labels(exam: Exam) -> list[Finding]:
    """An image must be denoised better with its own label than with another, and as much so as class means tell."""
    labels = exam.labels
    if labels is None or (labels.model.min(axis=1) - labels.linear[:, 0]).mean() > LOST:
        return []
    model, linear = (Effect.of(table[:, 1:].mean(axis=1) - table[:, 0]) for table in (labels.model, labels.linear))
    hits, trials = labels.neighbours_agree
    told = f"with another label the loss is {np.exp(model.mean):.2f} times that with their own"
    if linear.above(LEAST_GAIN) and model.mean < linear.mean / 4:
        what = (
            f"labels were mixed up in training: {told}, and class means alone would make it {np.exp(linear.mean):.2f}"
        )
        return [Finding("error", what + _best_other(exam), "mend the labels of the training images, and train again")]
    if not is_more(hits, trials, labels.by_chance) and not linear.above(LEAST_GAIN) and not model.above(LEAST_GAIN):
        what = (
            f"the labels look shuffled: an image's nearest neighbour has its label in {hits / trials:.0%} of cases, by chance "
            f"{labels.by_chance:.0%}, and {told}"
        )
        return [Finding("error", what, "mend the labels of the data set, and train again")]
    if model.z < SURE:
        return [Finding("info", f"labels make no sure difference to the network: {told}")]
    return [Finding("ok", f"labels tell: {told}")]


def _best_other(exam: Exam) -> str:
    """Which label fits the images of a class better than their own, where there is such a class."""
    assert exam.labels is not None
    own, best = (
        exam.labels.candidates[:, 0],
        exam.labels.candidates[np.arange(len(exam.labels.model)), exam.labels.model.argmin(axis=1)],
    )
    pairs, counts = np.unique(np.stack([own, best])[:, own != best], axis=1, return_counts=True)
    if not len(counts) or counts.max() < 2:
        return ""
    one, other = pairs[:, counts.argmax()]
    names = [exam.classes[k] if k < len(exam.classes) else str(k) for k in (one, other)]
    return f" (images of {names[0]!r} go best with {names[1]!r})"
