"""Editing: filling parts of an image in, variations, inversion, interpolation, removal of noise.

`Walker` has the algorithms, on float images of any predictor. `Editor` is what they are used through: uint8 images and
a seed for each come in, uint8 images go out, and an image depends on what it is made from and on its seed alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import ConfigError
from ddpm.images import to_float, to_uint8
from ddpm.models.diffusion import Predictor
from ddpm.randomness import Stream
from ddpm.runtime import Runtime
from ddpm.samplers import OnStep, Sampler, Thresholding
from ddpm.schedules import DiscreteSchedule, Level, Schedule, step_variance

Pixels = NDArray[np.uint8]
Blend = Literal["lerp", "slerp"]
Watch = Callable[[int], OnStep]
"""watch(steps) -> on_step: called when a walk of so many steps begins."""


def level_at(schedule: Schedule, fraction: float) -> Level:
    """The level at this part of the schedule's time: 0 the least noise, 1 the most; of a table, one of its entries."""
    if not 0 <= fraction <= 1:
        raise ConfigError(f"a noise level of {fraction:g} is wrong: it must be from 0 (no noise) to 1 (only noise).")
    t = schedule.last + fraction * (schedule.first - schedule.last)
    return schedule.at(torch.tensor(round(t) if isinstance(schedule, DiscreteSchedule) else t, dtype=torch.float64))


def level_of_noise(schedule: Schedule, sigma: float) -> Level:
    """The level at which an image with noise of this deviation stands, times its alpha: sigma_t / alpha_t = sigma.

    sigma is in the units of images in [-1, 1]. Raises ConfigError outside of what the schedule covers.
    """
    least, most = (_noise_of(schedule.at(torch.tensor(t, dtype=torch.float64))) for t in (schedule.last, schedule.first))
    if not least <= sigma <= most:
        raise ConfigError(
            f"noise of sigma {sigma * 127.5:.3g} is outside of what this model was trained on, "
            f"{least * 127.5:.3g} to {most * 127.5:.3g} grey levels of 255."
        )
    return schedule.at(schedule.t_of(torch.tensor(-2 * math.log(sigma), dtype=torch.float64)))


def levels_below(sampler: Sampler, schedule: Schedule, start: Level) -> list[Level]:
    """The path from `start` down to the clean image by the levels that the sampler visits."""
    return [start, *(level for level in sampler.path(schedule) if level.log_snr > start.log_snr)]


def resampled(path: Sequence[Level], jump: int, resamplings: int) -> list[Level]:
    """A falling path with RePaint's jumps (Lugmayr et al. 2022, appendix B, figure 9).

    At every `jump`-th level, counted from the least noisy one, it goes back up by `jump` levels, `resamplings` - 1 times.
    Raises ConfigError where the path is too short for that.
    """
    if resamplings > 1 and jump > len(path) - 2:
        raise ConfigError(f"a jump of {jump} steps needs a sampler of more steps than its {len(path) - 1}.")
    walked, place = [path[0]], 0
    left = {n: resamplings - 1 for n in range(len(path) - 2, jump - 1, -jump)}
    while place < len(path) - 1:
        place += 1
        walked.append(path[place])
        if left.get(place):
            left[place] -= 1
            place -= jump
            walked.append(path[place])
    return walked


def estimate_sigma(image: Pixels) -> float:
    """The deviation of white noise in an image, uint8 (C, H, W), in grey levels of 255.

    The median of the diagonal details of a Haar wavelet, divided by 0.6745 (Donoho & Johnstone 1994, section 4.2): edges
    are few, so the median is the noise's. Noise that was cut off at black or white counts for less than it was.
    """
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2].astype(np.float64)
    a, b, c, d = (even[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    return float(np.median(np.abs(a - b - c + d)) / 2 / 0.6745)


def psnr(images: Pixels, others: Pixels) -> float:
    """Peak signal-to-noise ratio of uint8 images of one shape, over all of them, in dB; infinite where they are equal."""
    error = float(np.mean((images.astype(np.float64) - others.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation of each image (B, ...), weights (B,) from 0 to 1 (Shoemake 1985; Song et al. 2021, appendix D.5)."""
    a, b = first.flatten(1), second.flatten(1)
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True))
    angle = cosine.clamp(-1, 1).acos()
    w = weight[:, None].to(a.dtype)
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b).div(angle.sin()).reshape(first.shape)


@dataclass(frozen=True, kw_only=True)
class Walker:
    """A batch of images and what takes it along noise levels. Images are float (B, C, H, W), about [-1, 1].

    Attributes:
        predictor: the model, or a guided one.
        sampler: its steps, and the levels they fall on.
        noise: noise(purpose, i) is standard normal noise like the images; the i-th of a purpose is always the same.
        condition: (B,) int64 labels or None.
        thresholding: of the predicted x0, where the sampler names none.
        watch: told of the walk to come, for pictures of it.
    """

    predictor: Predictor
    sampler: Sampler
    noise: Callable[[str, int], Tensor]
    condition: Tensor | None = None
    thresholding: Thresholding = Thresholding.parse("clip")
    watch: Watch | None = None

    @property
    def schedule(self) -> Schedule:
        """The model's noise levels."""
        return self.predictor.schedule

    def encode(self, x0: Tensor, level: Level) -> Tensor:
        """x_t of q(x_t | x0) (Ho et al. 2020, equation 4), with the noise that `ddpm sample` starts from."""
        return _noised(x0, level, self.noise("sample", 0))

    def decode(self, x: Tensor, start: Level) -> Tensor:
        """From x at `start` down to images, by the sampler's own levels below it."""
        path = levels_below(self.sampler, self.schedule, start)
        return self._walk(x, path, self.watch(len(path) - 1) if self.watch else None)

    def sdedit(self, guide: Tensor, start: Level) -> Tensor:
        """SDEdit (Meng et al. 2022, algorithm 1): the guide is noised to `start` and walked down from there."""
        return self.decode(self.encode(guide, start), start)

    def repaint(self, known: Tensor, fill: Tensor, jump: int, resamplings: int) -> Tensor:
        """RePaint (Lugmayr et al. 2022, algorithm 1): images whose parts outside `fill` are those of `known`.

        After each step down the known part is put in anew, noised to the level reached (equation 8a); jumps back up
        (see `resampled`) let both parts come to agree. The sampler starts afresh at each step, so one that remembers
        earlier steps takes its first step each time.

        Args:
            known: (B, C, H, W).
            fill: bool, broadcasts with it; True where the image is to be made.
            jump: levels of a jump (the paper's j).
            resamplings: visits of each stretch (the paper's r or U); 1: no jumps.
        """
        path = resampled(self.sampler.path(self.schedule), jump, resamplings)
        steps = list(pairwise(path))
        on_step = self.watch(sum(not _rises(*step) for step in steps)) if self.watch else None
        x = self.noise("sample", 0) * self.schedule.prior_std
        x = torch.where(fill, x, _noised(known, path[0], self.noise("known", 0)))
        down = 0
        for i, (level, following) in enumerate(steps):
            if _rises(level, following):
                x = _renoised(x, level, following, self.noise("jump", i + 1))
                continue
            seen: list[Tensor] = []
            x = self._walk(x, [level, following], lambda _, __, x0, seen=seen: seen.append(x0), at=i)  # type: ignore[misc]
            x = torch.where(fill, x, _noised(known, following, self.noise("known", i + 1)))
            if on_step is not None:
                on_step(down, x, seen[0])
            down += 1
        return x

    def invert(self, x0: Tensor) -> Tensor:
        """DDIM inversion (Song et al. 2021, section 4.3): the noise from which the sampler comes back to x0.

        Raises ConfigError: a sampler other than DDIM with eta=0.
        """
        ...

    def interpolate(self, first: Tensor, second: Tensor, weights: Tensor, start: Level, blend: Blend) -> Tensor:
        """Images between two, blended at a noise level (Ho et al. 2020, section 4.4).

        Args:
            first, second: (B, C, H, W).
            weights: (B,), 0 the first, 1 the second.
            start: the level at which they are blended.
            blend: "lerp": both have the same noise; "slerp": each has its own, and the noise turns from one to the other.
                Either way every blend has as much noise as its level.
        """
        mixed = torch.lerp(first, second, weights.to(first.dtype).reshape(-1, 1, 1, 1))
        noise = self.noise("sample", 0)
        if blend == "slerp":
            noise = slerp(noise, self.noise("second", 0), weights)
        return self.decode(_noised(mixed, start, noise), start)

    def denoise(self, noisy: Tensor, start: Level, one_step: bool = False) -> Tensor:
        """An image with the noise of `start` (see `level_of_noise`): walked down from there, or x0 as predicted in one step."""
        x = noisy * start.alpha
        if one_step:
            x0 = self.predictor.predict(x, start, self.condition).x0
            return self.thresholding.apply(x0)
        return self.decode(x, start)

    def _walk(self, x: Tensor, path: Sequence[Level], on_step: OnStep | None, at: int = 0) -> Tensor:
        return self.sampler.walk(
            self.predictor,
            x,
            path,
            self.condition,
            lambda i: self.noise("sample", at + i + 1),
            self.thresholding,
            on_step,
        )


def _noised(x0: Tensor, level: Level, noise: Tensor) -> Tensor:
    at = level.like(x0)
    return at.alpha * x0 + at.sigma * noise


def _renoised(x: Tensor, level: Level, following: Level, noise: Tensor) -> Tensor:
    """A draw from q(x_t | x_s), s < t."""
    return following.alpha / level.alpha * x + step_variance(following, level).sqrt() * noise


def _rises(level: Level, following: Level) -> bool:
    return bool(following.log_snr < level.log_snr)


def _noise_of(level: Level) -> float:
    return float(level.sigma / level.alpha)
