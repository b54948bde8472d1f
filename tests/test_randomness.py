"""Counter-based numbers: published answers, the distributions promised, and independence of how a batch is cut."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import randomness
from ddpm.randomness import Stream, permutation, philox, quantised

WORD = 0xFFFFFFFF
IDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=7)
quick = settings(max_examples=30, deadline=None, derandomize=True)


def stream(ids: list[int] | range, seed: int = 5, purpose: str = "test", step: int = 0) -> Stream:
    return Stream(seed, torch.tensor(list(ids)), purpose, step)


def kolmogorov(values: torch.Tensor, cdf: torch.Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical and the given distribution function of sorted values."""
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()) * math.sqrt(n))


# Random123's kat_vectors, philox4x32 10.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    found = philox((c0, c1, c2, c3), (k0, k1))
    assert " ".join(f"{int(word):08x}" for word in found) == expected


def test_splitmix_gives_the_published_answers() -> None:
    """The first outputs for the seed 1234567, as in the reference implementation by Vigna."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = 1234567 + torch.arange(1, 6) * randomness._GAMMA
    assert [int(z) % 2**64 for z in randomness._splitmix(state)] == expected


def philox_words(seed: int, purpose: str, step: int, image: int, block: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    k0, k1 = struct.unpack("<II", digest)
    c = [block, step, image & WORD, image >> 32]
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


@pytest.mark.parametrize(
    ("seed", "image", "step"), [(0, 0, 0), (7, 49_999, 799_999), (2**62, 2**40 + 3, 2**32 - 1), (-1, 2**63 - 1, 1)]
)
def test_bits_are_philox_of_seed_purpose_step_image_and_element(seed: int, image: int, step: int) -> None:
    found = Stream(seed, torch.tensor([image]), "noise", step).bits(10)[0].tolist()
    expected = [word for block in range(3) for word in philox_words(seed, "noise", step, image, block)]
    assert found == expected[:10]


def numpy_log(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    s = (mantissa - 1) / (mantissa + 1)
    return exponent * math.log(2) + s * numpy_horner(s * s, [2 / (2 * k + 1) for k in range(9)])


def numpy_horner(x: np.ndarray, coefficients: list[float]) -> np.ndarray:
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x
        value = value + coefficient
    return value


def test_normal_has_the_same_bits_when_numpy_computes_it() -> None:
    """The promise behind 'the same on every device': only operations that IEEE 754 rounds exactly."""
    n = 1000
    words = stream(range(16)).bits(2 * n).numpy()
    radius = np.sqrt(-2 * numpy_log((words[:, :n] + 0.5) / 2.0**32))
    turn = (words[:, n:] + 0.5) / 2.0**30
    quadrant = np.floor(turn + 0.5)
    angle = (turn - quadrant) * (math.pi / 2)
    square = angle * angle
    sin = angle * numpy_horner(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)])
    cos = numpy_horner(square, [(-1) ** k / math.factorial(2 * k) for k in range(9)])
    q = quadrant.astype(int) % 4
    x, y = np.choose(q, [cos, -sin, -cos, sin]), np.choose(q, [sin, cos, -sin, -cos])
    expected = np.concatenate([radius * x, radius * y], axis=1).astype(np.float32)
    assert np.array_equal(stream(range(16)).normal(2 * n).numpy().view(np.int32), expected.view(np.int32))


def test_normal_is_the_box_muller_transform_of_the_mathematics_library() -> None:
    words = stream(range(16)).bits(2000).double()
    u, v = (words[:, :1000] + 0.5) / 2.0**32, (words[:, 1000:] + 0.5) / 2.0**32
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    expected = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    assert (stream(range(16)).normal(2000).double() - expected).abs().max() < 5e-7


def test_log_is_right_to_1e_14() -> None:
    x = torch.cat([(torch.arange(20_000) + 0.5) / 2.0**32, (stream(range(50)).bits(2000).flatten() + 0.5) / 2.0**32])
    edges = torch.tensor([0.5 / 2**32, 0.5, math.sqrt(0.5), 1 - 2.0**-33, 1.0, 2.0, 1e300], dtype=torch.float64)
    x = torch.cat([x.double(), edges])
    exact = torch.tensor([math.log(value) for value in x.tolist()], dtype=torch.float64)
    assert ((randomness._log(x) - exact).abs() / exact.abs().clamp(min=1.0)).max() < 1e-14


def test_sine_and_cosine_are_right_to_1e_15() -> None:
    x = torch.linspace(-math.pi / 4, math.pi / 4, 10_001, dtype=torch.float64)
    sin, cos = randomness._sin_cos(x)
    assert max(abs(s - math.sin(a)) for s, a in zip(sin.tolist(), x.tolist(), strict=True)) < 1e-15
    assert max(abs(c - math.cos(a)) for c, a in zip(cos.tolist(), x.tolist(), strict=True)) < 1e-15


@quick
@given(IDS, st.data())
def test_an_images_numbers_do_not_depend_on_its_batch(ids: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(ids))))
    cut = data.draw(st.integers(0, len(ids)))
    n = data.draw(st.integers(1, 70))
    whole = stream(ids)
    draws = [lambda s: s.bits(n), lambda s: s.uniform(n), lambda s: s.normal(3, n), lambda s: s.bernoulli(0.3, n)]
    for draw in draws:
        together = draw(whole)
        shuffled = [ids[i] for i in order]
        parts = [draw(stream(part)) for part in (shuffled[:cut], shuffled[cut:]) if part]
        assert torch.equal(torch.cat(parts), together[order])
        assert torch.equal(draw(whole.select(slice(cut, None))), together[cut:]) or cut == len(ids)


def test_blocks_of_work_do_not_show() -> None:
    """More rows and more elements than are worked on at once."""
    many, n = stream(range(200)), 3 * 1001
    for draw in (Stream.bits, Stream.normal, lambda s, n: s.bernoulli(0.5, n)):
        whole = draw(many, n)
        assert whole.shape == (200, n)
        for k in (0, 86, 199):
            assert torch.equal(whole[k], draw(stream([k]), n)[0])


@pytest.mark.parametrize(
    "other",
    [
        stream(range(20_000), purpose="other"),
        stream(range(20_000), step=1),
        stream(range(20_000), seed=6),
        stream(range(1, 20_001)),
        stream(range(2**32, 2**32 + 20_000)),
    ],
    ids=["purpose", "step", "seed", "image", "high word"],
)
def test_streams_are_independent(other: Stream) -> None:
    a, b = stream(range(20_000)).normal(4).double().flatten(), other.normal(4).double().flatten()
    assert not (a == b).all()
    for x, y in ((a, b), (a.abs(), b.abs())):
        correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
        assert abs(correlation) * math.sqrt(len(a)) < 4


def test_elements_are_independent() -> None:
    x = stream(range(5000)).normal(8).double()
    off = torch.corrcoef(x.T) - torch.eye(8)
    assert off.abs().max() * math.sqrt(5000) < 4.5


def test_at_and_select_change_one_thing() -> None:
    base = stream([3, 1], purpose="a", step=4)
    assert torch.equal(base.at("b").bits(5), stream([3, 1], purpose="b", step=4).bits(5))
    assert torch.equal(base.at(step=9).bits(5), stream([3, 1], purpose="a", step=9).bits(5))
    assert torch.equal(base.select(slice(1, 2)).bits(5), stream([1], purpose="a", step=4).bits(5))


def test_normal_is_standard_normal() -> None:
    x = stream(range(2000)).normal(100).double().flatten()
    n = len(x)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) / math.sqrt(variance / n) < 4
    x = x.sort().values
    assert kolmogorov(x, torch.special.ndtr(x)) < 1.95  # p = 0.001
    assert x.abs().max() < math.sqrt(2 * 33 * math.log(2))


def test_uniform_is_uniform_and_never_an_end_point() -> None:
    x = stream(range(2000)).uniform(100)
    assert x.dtype == torch.float64
    assert kolmogorov(x.flatten().sort().values, x.flatten().sort().values) < 1.95
    low, high = 0.5 / 2.0**32, (2.0**32 - 0.5) / 2.0**32
    assert 0 < low <= float(x.min()) < float(x.max()) <= high < 1


def test_words_are_uniform() -> None:
    x = stream(range(4000)).bits(64)
    assert int(x.min()) >= 0
    assert int(x.max()) <= WORD
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(((x >> shift) & 255).flatten(), minlength=256).double()
        chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert abs(chi2 - 255) / math.sqrt(2 * 255) < 4


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.1, 0.25, 0.5, 0.9, 0.999_999])
def test_bernoulli_has_the_quantised_probability(probability: float) -> None:
    p = quantised(probability)
    assert abs(p - probability) <= 2.0**-16
    x = stream(range(400)).bernoulli(probability, 10, 100)
    assert x.dtype == torch.bool
    assert x.shape == (400, 10, 100)
    hits, n = int(x.sum()), x.numel()
    assert p < 1
    assert abs(hits - n * p) <= 4 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(("probability", "numerator"), [(0, 0), (0.3, 19661), (0.5, 32768), (0.999_999, 65535)])
def test_bernoulli_is_a_splitmix_sequence_from_64_philox_bits(probability: float, numerator: int) -> None:
    found = stream([11]).bernoulli(probability, 9)[0].tolist()
    high, low, *_ = philox_words(5, "test", 0, 11, 0)
    z, words = (high << 32) ^ low, []
    for _ in range(3):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        y = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        y = (y ^ (y >> 27)) * 0x94D049BB133111EB % 2**64
        words += struct.unpack("<4h", struct.pack("<Q", y ^ (y >> 31)))
    assert found == [word + 32768 < numerator for word in words[:9]]


def test_masks_of_images_and_purposes_differ() -> None:
    masks = stream(range(64)).bernoulli(0.5, 256)
    other = stream(range(64), purpose="dropout/2").bernoulli(0.5, 256)
    agreement = [(a == b).double().mean() for a, b in zip(masks, other, strict=True)]
    agreement += [(a == b).double().mean() for a, b in zip(masks, masks.roll(1, 0), strict=True)]
    assert max(abs(float(value) - 0.5) for value in agreement) < 4.5 * 0.5 / math.sqrt(256)


@pytest.mark.parametrize("n", [1, 2, 7, 1797])
def test_a_permutation_holds_every_index_once(n: int) -> None:
    order = permutation(0, 3, n)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(0, 3, n))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(20)}
    assert len(orders) == 60


def test_permutations_are_uniform() -> None:
    counts: dict[tuple[int, ...], int] = {}
    n = 2400
    for epoch in range(n):
        order = tuple(permutation(1, epoch, 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi2 = sum((count - n / 24) ** 2 / (n / 24) for count in counts.values())
    assert chi2 < 49.7  # 23 degrees of freedom, p = 0.001


def test_no_global_state_is_read_or_touched() -> None:
    def draw() -> list[torch.Tensor]:
        s = stream(range(3))
        return [s.bits(5), s.uniform(2), s.normal(7), s.bernoulli(0.5, 9), permutation(0, 0, 10)]

    torch.manual_seed(1)
    np_before = np.random.get_state()[1].copy()
    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], np_before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5)])
def test_shapes_follow_the_ids(shape: tuple[int, ...]) -> None:
    s = stream(range(4))
    drawn = s.uniform(*shape), s.normal(*shape), s.bernoulli(0.5, *shape)
    assert all(each.shape == (4, *shape) for each in drawn)
    assert [each.dtype for each in drawn] == [torch.float64, torch.float32, torch.bool]
