"""Editing: filling parts of an image in, variations, inversion, interpolation, removal of noise.

`Walker` has the algorithms, on float images of any predictor. `Editor` is what they are used through: uint8 images and
a seed for each go in, uint8 images come out, and each depends on what it is made from and on its seed alone.
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
from ddpm.randomness import Stream, seed_array
from ddpm.runtime import Runtime
from ddpm.samplers import OnStep, Sampler, Thresholding
from ddpm.samplers.ddim import DDIM
from ddpm.schedules import Level, Schedule, step_variance

Pixels = NDArray[np.uint8]
Blend = Literal["lerp", "slerp"]
Watch = Callable[[int], OnStep]
"""watch(steps) -> on_step: called when a walk of so many steps begins."""
CLIP = Thresholding.parse("clip")


def level_at(path: Sequence[Level], share: float) -> Level:
    """The level from which a sampler walks this share of its steps, at least one: 1 is the noisiest of its path.

    Raises ConfigError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(
            f"a noise level of {share:g} is wrong: it must be above 0 and at most 1, which is only noise."
        )
    steps = len(path) - 1
    return path[steps - max(1, round(share * steps))]


def level_of_noise(schedule: Schedule, sigma: float) -> Level:
    """The level at which an image with noise of this deviation stands, times its alpha: sigma_t / alpha_t = sigma.

    sigma is in grey levels of 255. Raises ConfigError outside of what the schedule covers.
    """
    ends = schedule.at(torch.tensor([schedule.last, schedule.first], dtype=torch.float64))
    least, most = (ends.sigma / ends.alpha * 127.5).tolist()
    if not least <= sigma <= most:
        raise ConfigError(
            f"noise of {sigma:.3g} grey levels is not what this model can take away: it knows {least:.2g} to {most:.3g}."
        )
    return schedule.at(schedule.t_of(torch.tensor(-2 * math.log(sigma / 127.5), dtype=torch.float64)))


def resampled(path: Sequence[Level], jump: int, resamplings: int) -> list[Level]:
    """A falling path with RePaint's jumps (Lugmayr et al. 2022, section 4.2 and figure 9).

    At every `jump`-th level, counted from the least noisy one, it goes back up by `jump` levels, `resamplings` - 1 times.
    Raises ConfigError where the path is too short for that.
    """
    if resamplings > 1 and jump > len(path) - 2:
        raise ConfigError(
            f"a jump of {jump} levels needs a sampler of more than {jump} steps, not {len(path) - 1}; choose a shorter one."
        )
    walked, place = [path[0]], 0
    left = dict.fromkeys(range(len(path) - 2, jump - 1, -jump), resamplings - 1)
    while place < len(path) - 1:
        place += 1
        walked.append(path[place])
        if left.get(place):
            left[place] -= 1
            place -= jump
            walked.append(path[place])
    return walked


def usual_jump(path: Sequence[Level]) -> int:
    """Levels of a jump unless told otherwise: a fifth of the steps, and no more than the 10 of Lugmayr et al. (2022)."""
    return min(10, max(1, (len(path) - 1) // 5))


def estimate_sigma(image: Pixels) -> float:
    """The deviation of the white noise in an image, uint8 (C, H, W), in grey levels of 255.

    The median of the finest diagonal details of a Haar wavelet over 0.6745 (Donoho & Johnstone 1994): edges are few, so the
    median is the noise's. Noise that was cut off at black or white counts for less than it was.
    """
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2].astype(np.float64)
    a, b, c, d = (even[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    return float(np.median(np.abs(a - b - c + d) / 2) / 0.6745)


def psnr(images: Pixels, others: Pixels) -> float:
    """Peak signal-to-noise ratio of uint8 images of one shape, over all of them, in dB; infinite where they are equal."""
    error = float(np.mean((images.astype(np.float64) - others.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) of images (B, ...) each seen as one vector; weight (B, 1, 1, 1), 0 the first."""
    a, b, w = first.flatten(1), second.flatten(1), weight.flatten(1)
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True))
    angle = cosine.acos()
    turned: Tensor = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()
    return turned.reshape(first.shape)


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
    thresholding: Thresholding = CLIP
    watch: Watch | None = None

    @property
    def path(self) -> list[Level]:
        """The sampler's levels, from the noisiest to the clean image."""
        return self.sampler.path(self.predictor.schedule)

    def decode(self, x: Tensor, start: Level) -> Tensor:
        """From x at `start` down to images, by the sampler's own levels below it."""
        path = [start, *(level for level in self.path if level.log_snr > start.log_snr)]
        return self._walk(x, path, self.watch(len(path) - 1) if self.watch else None)

    def sdedit(self, guide: Tensor, start: Level) -> Tensor:
        """SDEdit (Meng et al. 2022, algorithm 1): the guide is noised to `start`, and walked down from there."""
        return self.decode(_noised(guide, start, self.noise("sample", 0)), start)

    def repaint(self, known: Tensor, fill: Tensor, jump: int, resamplings: int) -> Tensor:
        """RePaint (Lugmayr et al. 2022, algorithm 1): images whose parts outside `fill` are those of `known`.

        After each step down the known part is put in anew, noised to the level reached (equation 8a; the algorithm's line 5
        forgets a root). Jumps back up let both parts come to agree: see `resampled`. The sampler starts afresh at each
        step, so one that remembers earlier steps takes its first step each time.

        Args:
            known: (B, C, H, W).
            fill: bool, broadcasts with it; True where the image is to be made.
            jump: levels of a jump (the paper's j).
            resamplings: visits of each stretch of levels (the paper's r); 1 makes no jumps.
        """
        path = resampled(self.path, jump, resamplings)
        steps = list(pairwise(path))
        on_step = self.watch(sum(not _rises(*step) for step in steps)) if self.watch else None
        x = self.predictor.schedule.start_std(path[0]) * self.noise("sample", 0)
        x = torch.where(fill, x, _noised(known, path[0], self.noise("known", 0)))
        down = 0
        for i, (level, following) in enumerate(steps):
            if _rises(level, following):
                x = _renoised(x, level, following, self.noise("jump", i))
                continue
            seen: list[Tensor] = []
            x = self._walk(x, [level, following], lambda _, __, x0, seen=seen: seen.append(x0), at=i)  # type: ignore[misc]
            x = torch.where(fill, x, _noised(known, following, self.noise("known", i + 1)))
            if on_step is not None:
                on_step(down, x, seen[0])
            down += 1
        return x

    def invert(self, x0: Tensor) -> Tensor:
        """The standard normal noise that `reconstruct` makes x0 from, nearly: see `Sampler.invert`."""
        on_step = self.watch(len(self.path) - 1) if self.watch else None
        return self.sampler.invert(self.predictor, x0, self.condition, self.thresholding, on_step)

    def reconstruct(self, noise: Tensor) -> Tensor:
        """Images from standard normal noise, as `Sampler.sample` makes them."""
        start = self.path[0]
        return self.decode(self.predictor.schedule.start_std(start) * noise, start)

    def interpolate(self, first: Tensor, second: Tensor, weight: Tensor, start: Level, blend: Blend) -> Tensor:
        """Images between two, blended at a noise level (Ho et al. 2020, section 4.4).

        Args:
            first, second: (B, C, H, W).
            weight: (B, 1, 1, 1), 0 the first, 1 the second.
            start: the level at which they are blended.
            blend: "lerp": both have the same noise; "slerp": each has its own, and the noise turns from one to the other.
                Either way every blend has as much noise as its level.
        """
        noise = self.noise("sample", 0)
        if blend == "slerp":
            noise = slerp(noise, self.noise("second", 0), weight)
        return self.decode(_noised(torch.lerp(first, second, weight), start, noise), start)

    def denoise(self, noisy: Tensor, start: Level, one_step: bool = False) -> Tensor:
        """Images with the noise of `start` (see `level_of_noise`) walked down from there, or x0 as predicted at once."""
        if one_step:
            at_once = replace(self, sampler=DDIM(thresholding=self.sampler.thresholding), watch=None)
            return at_once._walk(start.alpha * noisy, [start, self.path[-1]])
        return self.decode(start.alpha * noisy, start)

    def _walk(self, x: Tensor, path: Sequence[Level], on_step: OnStep | None = None, at: int = 0) -> Tensor:
        def noise(i: int) -> Tensor:
            return self.noise("sample", at + i + 1)

        return self.sampler.walk(self.predictor, x, path, self.condition, noise, self.thresholding, on_step)


def _noised(x0: Tensor, level: Level, noise: Tensor) -> Tensor:
    """x_t of q(x_t | x0) (Ho et al. 2020, equation 4)."""
    return level.alpha * x0 + level.sigma * noise


def _renoised(x: Tensor, level: Level, following: Level, noise: Tensor) -> Tensor:
    """x_t of q(x_t | x_s), s < t (Ho et al. 2020, equation 2, over any number of steps)."""
    return following.alpha / level.alpha * x + step_variance(following, level).sqrt() * noise


def _rises(level: Level, following: Level) -> bool:
    return bool(following.log_snr < level.log_snr)


@dataclass(frozen=True, kw_only=True)
class Editor:
    """Edits uint8 images (N, C, H, W), or one (C, H, W), arrays or tensors; what comes out is a uint8 array (N, C, H, W).

    Random numbers and class of result k are those of `ddpm sample` at seeds[k]; seeds not given are 0 to N - 1, and one image
    with many seeds gives as many results. A result depends on its image and seed, not on what else is edited with it.

    Attributes:
        predictor: the model, or a guided one, on the machine's device and in eval mode.
        sampler: how to walk.
        shape: (C, H, W) of the model's images.
        machine: where, and how precisely.
        thresholding: of the predicted x0, where the sampler names none.
        labels: classes, in turn by seed: result k has labels[seeds[k] mod len]; -1 is no label; empty for a model without.
        chunk: images in a batch; the last batch is filled up. Another chunk changes float rounding.
        watch: called when the walk of the first chunk begins.

    Every method raises ConfigError for images, seeds and options that do not fit.
    """

    predictor: Predictor
    sampler: Sampler
    shape: tuple[int, int, int]
    machine: Runtime
    thresholding: Thresholding = CLIP
    labels: tuple[int, ...] = ()
    chunk: int = 1
    watch: Watch | None = None

    @property
    def path(self) -> list[Level]:
        """The sampler's levels, from the noisiest to the clean image."""
        return self.sampler.path(self.predictor.schedule)

    def inpaint(
        self, images: Any, fill: Any, seeds: Any = None, *, jump: int | None = None, resamplings: int = 10
    ) -> Pixels:
        """Fill parts of images in: see `Walker.repaint`. Outside of `fill` every pixel stays as it was, bit for bit.

        fill: bool (H, W), or (N, H, W) with one for each image; True where the image is to be made.
        jump: None: see `usual_jump`.
        """
        jump = usual_jump(self.path) if jump is None else jump
        known, ids = self._given(images, seeds)
        mask = self._mask(fill, len(known)).expand(len(known), 1, *self.shape[1:])
        made = self._each(lambda walker, x, m: walker.repaint(x, m, jump, resamplings), ids, to_float(known), mask)
        return _pixels(torch.where(mask, to_uint8(made), known))

    def img2img(self, images: Any, strength: float = 0.5, seeds: Any = None) -> Pixels:
        """Variations: see `Walker.sdedit`. strength is the share of the sampler's steps that is walked, above 0 to 1."""
        guide, ids = self._given(images, seeds)
        start = level_at(self.path, strength)
        return _pixels(to_uint8(self._each(lambda walker, x: walker.sdedit(x, start), ids, to_float(guide))))

    def invert(self, images: Any) -> NDArray[np.float32]:
        """The noise that `reconstruct` makes the images from, float32 (N, C, H, W): see `Walker.invert`."""
        x0, ids = self._given(images, None)
        latents: NDArray[np.float32] = self._each(lambda walker, x: walker.invert(x), ids, to_float(x0)).numpy()
        return latents

    def reconstruct(self, latents: NDArray[np.float32] | Tensor) -> Pixels:
        """The images that the sampler makes from standard normal noise, float32 (N, C, H, W)."""
        x = _tensor(latents)
        if x.dtype != torch.float32 or x.ndim != 4 or x.shape[1:] != self.shape:
            raise ConfigError(f"latents: expected float32 {_written((None, *self.shape))}, found {_found(x)}.")
        return _pixels(to_uint8(self._each(lambda walker, x: walker.reconstruct(x), torch.arange(len(x)), x)))

    def interpolate(
        self, first: Any, second: Any, frames: int = 9, *, level: float = 0.5, seed: int = 0, blend: Blend = "lerp"
    ) -> Pixels:
        """(frames, C, H, W) from one image to another: see `Walker.interpolate`. All frames have the seed's noise.

        level is the share of the sampler's steps that is walked, above 0 to 1.
        """
        (a, _), (b, _) = self._given(first, [seed]), self._given(second, [seed])
        start = level_at(self.path, level)
        ends = [to_float(end).expand(frames, -1, -1, -1) for end in (a, b)]
        made = self._each(
            lambda walker, x, y, w: walker.interpolate(x, y, w, start, blend),
            self._ids([seed] * frames),
            *ends,
            _weights(frames),
        )
        return _pixels(to_uint8(made))

    def interpolate_seeds(self, first: int, second: int, frames: int = 9) -> Pixels:
        """(frames, C, H, W) from the image of one seed to that of another: their noise, turned from one to the other.

        A sampler that draws noise on the way uses the first seed's for all frames.
        """
        if first == second:
            raise ConfigError(f"both seeds are {first}; give two different ones.")
        ends = [
            self._stream(self._ids([seed])).normal(*self.shape).expand(frames, -1, -1, -1) for seed in (first, second)
        ]
        made = self._each(
            lambda walker, x, y, w: walker.reconstruct(slerp(x, y, w)),
            self._ids([first] * frames),
            *ends,
            _weights(frames),
        )
        return _pixels(to_uint8(made))

    def denoise(self, images: Any, sigma: float, seeds: Any = None, *, one_step: bool = False) -> Pixels:
        """Take noise of deviation sigma, in grey levels of 255, away: see `Walker.denoise` and `estimate_sigma`."""
        noisy, ids = self._given(images, seeds)
        start = level_of_noise(self.predictor.schedule, sigma)
        return _pixels(to_uint8(self._each(lambda walker, x: walker.denoise(x, start, one_step), ids, to_float(noisy))))

    def _each(self, edit: Callable[..., Tensor], ids: Tensor, *inputs: Tensor) -> Tensor:
        """edit(walker, *rows of the inputs) for one chunk after another, on the machine -> (N, C, H, W) on the CPU.

        The last chunk is filled up with its last row: batches of one shape round an image alike in any of them.
        """
        made = []
        for begin in range(0, len(ids), self.chunk):
            rows = torch.arange(begin, begin + self.chunk).clamp(max=len(ids) - 1)
            walker = self._walker(ids[rows], self.watch if begin == 0 else None)
            with torch.inference_mode(), self.machine.autocast():
                made.append(edit(walker, *(self.machine.images(given[rows]) for given in inputs)).cpu())
        return torch.cat(made)[: len(ids)]

    def _walker(self, ids: Tensor, watch: Watch | None) -> Walker:
        stream = self._stream(ids)
        return Walker(
            predictor=self.predictor,
            sampler=self.sampler,
            noise=lambda purpose, i: self.machine.images(stream.at(purpose, i).normal(*self.shape)),
            condition=torch.tensor(self.labels)[ids % len(self.labels)].to(stream.ids) if self.labels else None,
            thresholding=self.thresholding,
            watch=watch,
        )

    def _stream(self, ids: Tensor) -> Stream:
        return Stream(0, ids.to(self.machine.device), "sample")

    def _given(self, images: Any, seeds: Any) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and a seed for each (N,), as tensors."""
        x = _tensor(images)
        x = x[None] if x.ndim == 3 else x
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1:] != self.shape or not len(x):
            raise ConfigError(f"images: expected uint8 {_written((None, *self.shape))}, found {_found(x)}.")
        ids = self._ids(range(len(x)) if seeds is None else seeds)
        if len(x) not in (1, len(ids)) or not len(ids):
            raise ConfigError(f"seeds: {len(ids)} of them for {len(x)} images; give one for each.")
        return x.expand(len(ids), -1, -1, -1), ids

    def _ids(self, seeds: Any) -> Tensor:
        return torch.from_numpy(seed_array(seeds))

    def _mask(self, fill: Any, count: int) -> Tensor:
        """(1 or N, 1, H, W) bool."""
        mask = _tensor(fill)
        mask = mask[None] if mask.ndim == 2 else mask
        if (
            mask.dtype != torch.bool
            or mask.ndim != 3
            or mask.shape[1:] != self.shape[1:]
            or len(mask) not in (1, count)
        ):
            raise ConfigError(
                f"fill: expected bool {_written(self.shape[1:])}, one or one for each image, found {_found(mask)}."
            )
        if bool((mask.all((1, 2)) | ~mask.any((1, 2))).any()):
            raise ConfigError("fill: a mask must fill a part of the image and leave a part.")
        return mask[:, None]


def _weights(frames: int) -> Tensor:
    return torch.linspace(0, 1, frames).reshape(-1, 1, 1, 1)


def _tensor(given: Any) -> Tensor:
    return given.cpu() if isinstance(given, Tensor) else torch.tensor(np.asarray(given))


def _pixels(x: Tensor) -> Pixels:
    pixels: Pixels = x.numpy()
    return pixels


def _written(shape: Sequence[int | None]) -> str:
    return f"({', '.join('N' if side is None else str(side) for side in shape)})"


def _found(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {_written(tuple(x.shape))}"
