"""Checks of the noise: the schedule that the network knows, where it ends, and what the network makes of each level."""

import math

import numpy as np

from ddpm.doctor.evidence import Effect
from ddpm.doctor.exam import FLOOR, Exam
from ddpm.doctor.findings import Finding
from ddpm.errors import ConfigError
from ddpm.schedules import DiscreteSchedule, Schedule

BETTER = 0.1
"""Log-ratio of two losses that matters: a tenth."""

STANDS_OUT = 1.0
"""Signal-to-noise ratio along one axis at which images can still be told where sampling starts from noise alone."""


def check_schedule(exam: Exam) -> list[Finding]:
    """At every noise level the network must do best when it is told the time that the schedule has for it.

    The best time is chosen on every other image, and what it gains is measured on the rest, so that choice is no gain.
    """
    if exam.by_time is None or exam.fitted is None or len(exam.by_time) < 4:
        return []
    count = len(exam.level.t)
    best = exam.by_time[::2].mean(axis=0).argmin(axis=1)
    rest, levels = exam.by_time[1::2], np.arange(count)
    floor = FLOOR * exam.fitted.power.mean(axis=0)
    told, wanted = rest[:, levels, levels] + floor, rest[:, levels, best] + floor
    gain = Effect.of(np.log(told / wanted).mean(axis=1))
    if not gain.above(BETTER):
        return [Finding("ok", "the noise of each time is what the network expects at it")]
    times, log_snr = exam.level.t.numpy(), exam.level.log_snr.numpy()
    worst = int(np.log(told / wanted).mean(axis=0).argmax())
    what = (
        f"the network was trained with another noise schedule: at log-SNR {log_snr[worst]:.1f} it expects t = {times[best[worst]]:g}, "
        f"not {times[worst]:g}, and told so its loss is {np.exp(-gain.mean):.2f} of what it is, over all levels"
    )
    likely = _most_like(exam, times[best])
    return [Finding("error", what, f"sample with the schedule it was trained with{likely}")]


def _most_like(exam: Exam, times: "np.ndarray") -> str:
    """The known schedule, of the same number of timesteps, that has these times for the noise levels, if one nearly does."""
    length = f":timesteps={exam.schedule.timesteps}" if isinstance(exam.schedule, DiscreteSchedule) else ""
    distances: dict[str, float] = {}
    for name in Schedule.names():
        try:
            known = Schedule.parse(name + length)
            distances[name] = float(np.abs(known.t_of(exam.level.log_snr).numpy() - times).mean())
        except ConfigError:
            continue
    spacing = float(np.abs(np.diff(exam.level.t.numpy())).mean())
    name = min(distances, key=lambda known: distances[known], default="")
    return f", such as {name}" if name and distances[name] < spacing else ""


def check_terminal_snr(exam: Exam) -> list[Finding]:
    """Where sampling starts, from noise alone, the schedule must have drowned the images."""
    if exam.moment is None:
        return []
    end = exam.schedule.at(exam.level.t.new_tensor(exam.schedule.first))
    ratio = exam.moment * float(end.alpha) ** 2 / float(end.sigma) ** 2
    told = f"at its noisiest level the schedule leaves {float(end.alpha):.2g} of the images"
    if ratio > STANDS_OUT:
        what = f"{told}, whose main axis then has {ratio:.2g} times the power of the noise, but sampling starts from noise alone"
        return [
            Finding(
                "error",
                what,
                "train with a schedule that ends in noise: cosine, linear with 1000 timesteps or scaled=true",
            )
        ]
    return [Finding("ok", f"{told}, along their main axis {ratio:.1g} of the power of the noise")]


def check_objective(exam: Exam) -> list[Finding]:
    """The output must be what the config says that it is."""
    if exam.fitted is None:
        return []
    own = exam.fitted.log_ratio().mean(axis=1)
    for name, losses in exam.objectives.items():
        other = losses.log_ratio().mean(axis=1)
        if own.mean() > 0 and other.mean() < 0 and Effect.of(own - other).above(BETTER):
            what = (
                f"the network predicts {name}, not what its config says: so its loss is {math.exp(other.mean()):.2f} of a linear "
                f"denoiser's, else {math.exp(own.mean()):.2f}"
            )
            return [
                Finding(
                    "error", what, f"load it with --diffusion.objective {name}, that is in the checkpoint's config.yaml"
                )
            ]
    return []


def check_loss(exam: Exam) -> list[Finding]:
    """At no level may the network be worse than saying nothing, nor over all levels than a linear denoiser."""
    if exam.fitted is None:
        return []
    ratio = exam.fitted.log_ratio()
    silence = exam.fitted.log_ratio(exam.fitted.power)
    worst = int(silence.mean(axis=0).argmax())
    t, log_snr = (float(value[worst]) for value in (exam.level.t, exam.level.log_snr))
    over = Effect.of(silence[:, worst])
    if over.above(BETTER):
        what = f"at t = {t:g} (log-SNR {log_snr:.1f}) the error is {math.exp(over.mean):.1f} times that of a network that says 0"
        return [Finding("error", what, "see the findings before this one; without any, train anew with a lower --lr")]
    overall = Effect.of(ratio.mean(axis=1))
    told = f"over all noise levels the loss is {math.exp(overall.mean):.2f} of the best linear denoiser's"
    if overall.above(0.0):
        return [
            Finding(
                "warning",
                f"{told}: the network has learnt less than means and covariances",
                "train for longer, or with a higher --lr",
            )
        ]
    return [Finding("ok", told)]
