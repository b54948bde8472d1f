"""Counter-based random numbers: a pure function of (seed, purpose, step, image, element), never a global state.

The bits are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is a hash of
(seed, purpose); the counter is (block of four elements, step, image index low and high word). So the numbers of one
image do not depend on the batch it is drawn in, on the number of processes, or on anything drawn before, and a resumed
run needs no generator state.

Uniform and normal numbers use only operations that IEEE 754 rounds exactly (+, -, x, /, sqrt, floor) in float64, so they
are the same bits on every device, vector width and batch shape.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import ConfigError

SEEDS_END = 2**62
"""Seeds of images are below this."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's increment, as a signed 64-bit integer
_BLOCK = 1 << 16  # counters worked on at once: keeps the intermediates in cache


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, ...]:
    """Philox4x32 on int64 tensors that hold 32-bit words; returns four such tensors of the counters' common shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit product wraps in int64, but its bits are right: the shift's sign extension is masked away.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Stream:
    """Random numbers for a batch of images.

    Args:
        seed: any integer of up to 64 bits.
        ids: (B,) int64, non-negative: the global index of each image (its place in the global batch, or its seed).
        purpose: what the numbers are for; streams of different purposes are independent.
        step: training step or sampler step, below 2^32.

    Every method returns a tensor (B, *shape) on the device of `ids`; row b depends on (seed, purpose, step, ids[b]) alone.
    """

    seed: int
    ids: Tensor
    purpose: str = ""
    step: int = 0

    def at(self, purpose: str | None = None, step: int | None = None) -> Self:
        """The same images' numbers for another purpose or step."""
        purpose = self.purpose if purpose is None else purpose
        return replace(self, purpose=purpose, step=self.step if step is None else step)

    def select(self, rows: slice) -> Self:
        """The stream of some of the images."""
        return replace(self, ids=self.ids[rows])

    def bits(self, n: int) -> Tensor:
        """(B, n) int64 holding uniform 32-bit words."""
        blocks = -(-n // 4)
        counter = torch.arange(blocks, device=self.ids.device)
        rows = max(1, _BLOCK // max(blocks, 1))
        parts = [self._words(ids, counter) for ids in self.ids.split(rows)]
        return torch.cat(parts).flatten(1)[:, :n]

    def _words(self, ids: Tensor, counter: Tensor) -> Tensor:
        low, high = (ids & _WORD)[:, None], (ids >> 32)[:, None]
        step = torch.full_like(low, self.step)
        shape = (ids.shape[0], counter.shape[0])
        words = philox((counter.expand(shape), step, low, high), _key(self.seed, self.purpose))
        return torch.stack([word.expand(shape) for word in words], dim=-1)

    def uniform(self, *shape: int) -> Tensor:
        """float64 in (0, 1): (word + 1/2) / 2^32."""
        return ((self.bits(math.prod(shape)).double() + 0.5) / 2.0**32).reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """float32, standard normal, by the Box-Muller transform."""
        n = math.prod(shape)
        half = -(-n // 2)
        rows = max(1, _BLOCK // max(half, 1))
        bits = self.bits(2 * half)
        parts = [_box_muller(part[:, :half], part[:, half:]) for part in bits.split(rows)]
        return torch.cat(parts)[:, :n].reshape(-1, *shape)

    def bernoulli(self, probability: float, *shape: int) -> Tensor:
        """bool, True with the probability rounded to a multiple of 2^-16 below 1 (see `quantised`).

        Made for dropout masks, which are large: each image's mask is a SplitMix64 sequence (Steele et al., "Fast
        splittable pseudorandom number generators", OOPSLA 2014) that starts at 64 bits of Philox.
        """
        n = math.prod(shape)
        seeds = self.bits(2)
        start = (seeds[:, :1] << 32) ^ seeds[:, 1:]
        counter = torch.arange(1, -(-n // 4) + 1, device=start.device) * _GAMMA
        rows = max(1, _BLOCK // max(counter.numel(), 1))
        threshold = round(quantised(probability) * 65536) - 32768
        masks = [_splitmix(part + counter).view(torch.int16)[:, :n] < threshold for part in start.split(rows)]
        return torch.cat(masks).reshape(-1, *shape)


def quantised(probability: float) -> float:
    """The probability that `Stream.bernoulli` really has."""
    return min(round(probability * 65536), 65535) / 65536  # 65536 would not fit the signed words it is compared with


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """(n,) int64: the order of an epoch, a uniform shuffle that depends on (seed, epoch, n) alone."""
    words = Stream(seed, torch.arange(n), "order", epoch).bits(2)
    return torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)


def seed_array(seeds: Any) -> NDArray[np.int64]:
    """Seeds as (N,) int64, in their order; raises ConfigError for other things than whole numbers from 0 to 2^62 - 1."""
    try:
        given = np.asarray(seeds.cpu() if isinstance(seeds, Tensor) else seeds)
    except (TypeError, ValueError, OverflowError):
        given = np.empty(())
    if given.ndim != 1 or (given.size and (given.dtype.kind not in "iu" or given.max() >= SEEDS_END)):
        raise ConfigError(
            "seeds: must be a list of whole numbers from 0 to 2^62 - 1, such as seeds=[7, 1000] or seeds=range(16)."
        )
    if given.size and given.min() < 0:
        raise ConfigError(f"--seed: {given.min()} is negative; image k is drawn from seed k, counted from 0.")
    return given.astype(np.int64)


@cache
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _splitmix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 bits, in place; `>>` keeps the sign, so the mask makes it a logical shift."""
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiplier)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def _box_muller(first: Tensor, second: Tensor) -> Tensor:
    """(B, n) words twice -> (B, 2n) float32: sqrt(-2 ln u) times cos and sin of 2 pi v."""
    radius = (_log((first.double() + 0.5) / 2.0**32) * -2.0).sqrt()
    turn = (second.double() + 0.5) / 2.0**30  # quarter turns, in (0, 4)
    quadrant = (turn + 0.5).floor()
    sin, cos = _sin_cos((turn - quadrant) * (math.pi / 2))
    odd = (quadrant % 2).bool()
    negate_cos = (quadrant == 1) | (quadrant == 2)
    x, y = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    x = torch.where(negate_cos, -x, x)
    y = torch.where((quadrant == 2) | (quadrant == 3), -y, y)
    return torch.cat([radius * x, radius * y], dim=1).float()


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive float64 numbers, within 1e-14: ln m + e ln 2 with ln m = 2 artanh((m - 1) / (m + 1))."""
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = exponent.double() - small.double()
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * math.log(2.0) + s * _polynomial(s * s, [2.0 / (2 * k + 1) for k in range(9)])


def _sin_cos(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine for |x| <= pi/4 in float64, within 1e-15: Taylor polynomials."""
    square = x * x
    sin = x * _polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)])
    return sin, _polynomial(square, [(-1) ** k / math.factorial(2 * k) for k in range(9)])


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Horner's rule, a multiplication and an addition at a time (a fused one would round differently on some devices)."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value.mul_(x).add_(coefficient)
    return value
