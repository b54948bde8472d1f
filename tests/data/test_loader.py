"""The stream of images is a function of (seed, step): nothing else moves it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.data import ImageSet
from ddpm.data.loader import Batch, Loader
from ddpm.distributed import World
from ddpm.randomness import Stream, permutation


def counted(n: int, labels: bool = True) -> ImageSet:
    """n images 2x2 whose first pixel is their index and whose last is 255."""
    images = np.zeros((n, 1, 2, 2), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    images[:, 0, 1, 1] = 255
    return ImageSet("counted", images, np.arange(n) % 3 if labels else None, ("a", "b", "c") if labels else ())


def ids(loader: Loader, steps: int) -> list[list[int]]:
    return [batch.indices.tolist() for batch in loader.batches(0, steps)]


def test_every_image_comes_once_an_epoch_in_the_documented_order():
    data = counted(10)
    stream = np.concatenate(ids(Loader(data, 4, seed=7), 10))
    for epoch in range(4):
        part = stream[10 * epoch : 10 * (epoch + 1)]
        assert sorted(part) == list(range(10))
        np.testing.assert_array_equal(part, permutation(7, epoch, 10))
    assert len({tuple(stream[10 * epoch : 10 * (epoch + 1)]) for epoch in range(4)}) == 4


def test_the_order_depends_on_the_seed():
    assert ids(Loader(counted(50), 8, seed=0), 3) != ids(Loader(counted(50), 8, seed=1), 3)
    assert ids(Loader(counted(50), 8, seed=1), 3) == ids(Loader(counted(50), 8, seed=1), 3)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_global_stream_is_the_same_for_any_processes_and_workers(size, workers):
    data, batch, steps = counted(23), 11, 9
    wanted = ids(Loader(data, batch, seed=3, flip=True), steps)
    parts = [World(rank, size).share(batch) for rank in range(size)]
    loaders = [Loader(data, batch, seed=3, flip=True, part=part, workers=workers) for part in parts]
    streams = [list(loader.batches(0, steps)) for loader in loaders]
    assert [sum((stream[step].indices.tolist() for stream in streams), []) for step in range(steps)] == wanted  # noqa: RUF017
    whole = list(Loader(data, batch, seed=3, flip=True).batches(0, steps))
    for step in range(steps):
        assert torch.equal(torch.cat([stream[step].images for stream in streams]), whole[step].images)
        assert torch.equal(torch.cat([stream[step].labels for stream in streams]), whole[step].labels)
        assert torch.equal(torch.cat([stream[step].places for stream in streams]), torch.arange(batch))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 200), st.integers(0, 2**63 - 1))
def test_any_step_is_what_the_stream_says(n, batch, step, seed):
    found = Loader(counted(n), batch, seed).batch(step)
    places = step * batch + np.arange(batch)
    wanted = [int(permutation(seed, int(place) // n, n)[int(place) % n]) for place in places]
    assert found.indices.tolist() == wanted
    assert found.images[:, 0, 0, 0].tolist() == wanted
    assert found.labels.tolist() == [index % 3 for index in wanted]


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_anywhere_is_going_on_there(workers):
    loader = Loader(counted(10), 4, seed=1, flip=True, workers=workers)
    whole, later = list(loader.batches(0, 9)), list(loader.batches(5, 9))
    for a, b in zip(whole[5:], later, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
    assert list(loader.batches(9, 9)) == []


def test_bytes_stay_bytes_and_are_not_the_data_sets_own():
    data = counted(6)
    batch = Loader(data, 6, seed=0).batch(0)
    assert batch.images.dtype == torch.uint8
    assert (batch.labels.dtype, batch.indices.dtype, batch.places.dtype) == (torch.int64,) * 3
    np.testing.assert_array_equal(batch.images, data.images[batch.indices])
    batch.images.zero_()
    assert data.images[5, 0, 0, 0] == 5
    assert Loader(counted(6, labels=False), 6, seed=0).batch(0).labels is None


def test_flips_are_drawn_for_each_image_and_step():
    data, loader = counted(200), Loader(counted(200), 200, seed=5, flip=True)
    seen = []
    for step in range(20):
        batch = loader.batch(step)
        mirrored = Stream(5, torch.arange(200), "flip", step).bernoulli(0.5, 1).flatten().numpy()
        plain = data.images[batch.indices]
        wanted = np.where(mirrored[:, None, None, None], plain[..., ::-1], plain)
        np.testing.assert_array_equal(batch.images, wanted)
        seen.append(mirrored)
    assert abs(np.mean(seen) - 0.5) < 4 * 0.5 / np.sqrt(4000)
    assert len({tuple(row) for row in seen}) == 20


def test_an_error_in_a_worker_reaches_the_loop(monkeypatch):
    loader = Loader(counted(10), 4, seed=0, workers=2)
    real = loader.batch

    def batch(step: int) -> Batch:
        if step == 3:
            raise OSError("the disk went away")
        return real(step)

    monkeypatch.setattr(loader, "batch", batch)
    steps = loader.batches(0, 9)
    assert [len(next(steps).images) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(OSError, match="went away"):
        next(steps)


def test_workers_look_only_so_far_ahead(monkeypatch):
    asked: list[int] = []
    loader = Loader(counted(10), 4, seed=0, workers=2)
    real = loader.batch
    monkeypatch.setattr(loader, "batch", lambda step: asked.append(step) or real(step))
    steps = loader.batches(0, 1000)
    next(steps)
    steps.close()
    assert len(asked) <= 5
