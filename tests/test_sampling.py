"""generate: image k is a function of the model, the sampler and seed k, however the work is cut."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.distributed import World
from ddpm.errors import ConfigError
from ddpm.guidance import ClassifierFree
from ddpm.images import to_uint8
from ddpm.models import NO_LABEL, GaussianDiffusion, build_diffusion
from ddpm.randomness import Stream
from ddpm.runtime import Runtime
from ddpm.samplers import Sampler, Thresholding
from ddpm.sampling import Drawn, generate

SHAPE = (1, 6, 5)
MACHINE = Runtime(torch.device("cpu"), "float32", channels_last=False, threads=1)
SAMPLER = Sampler.parse("ddpm:steps=3")
N, CHUNK = 22, 4


def build(classes: int = 3, **diffusion: Any) -> GaussianDiffusion:
    model = ModelConfig(
        channels=8,
        channel_mults=(1, 2),
        blocks=1,
        conditioning="global" if classes else "none",
        initialisation="torch",
        norm_groups=2,
    )
    options = {"schedule": "linear:timesteps=100,scaled=true", **diffusion}
    return build_diffusion(model, DiffusionConfig(**options), SHAPE, classes).eval()


@pytest.fixture(scope="module")
def model() -> GaussianDiffusion:
    return build()


def collect(
    model: GaussianDiffusion, seeds: Sequence[int], sampler: Sampler = SAMPLER, **options: Any
) -> dict[int, Any]:
    """Seed -> (label, bytes)."""
    found = {}
    for part in generate(model, sampler, MACHINE, seeds=seeds, **{"chunk": CHUNK, **options}):
        labels = [None] * len(part.seeds) if part.labels is None else part.labels.tolist()
        for seed, label, image in zip(part.seeds.tolist(), labels, part.images, strict=True):
            assert seed not in found
            found[seed] = (label, image.tobytes())
    return found


@pytest.fixture(scope="module")
def reference(model: GaussianDiffusion) -> dict[int, Any]:
    return collect(model, range(N))


def test_images_are_uint8_of_the_models_shape_in_rising_seeds(model: GaussianDiffusion) -> None:
    parts = list(generate(model, SAMPLER, MACHINE, seeds=range(10), chunk=CHUNK))
    assert [part.seeds.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for part in parts:
        assert part.images.shape == (len(part.seeds), *SHAPE)
        assert part.images.dtype == np.uint8
        assert part.labels is not None
        assert part.labels.tolist() == [seed % 3 for seed in part.seeds]


def test_images_differ(reference: dict[int, Any]) -> None:
    assert len({image for _, image in reference.values()}) == N


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, N - 1), min_size=1, max_size=8), st.integers(1, 4), st.data())
def test_any_seeds_in_any_order_over_any_processes_give_the_same_bits(
    model: GaussianDiffusion, reference: dict[int, Any], seeds: list[int], size: int, data: st.DataObject
) -> None:
    found: dict[int, Any] = {}
    for rank in data.draw(st.permutations(range(size))):
        part = collect(model, seeds, world=World(rank, size))
        assert not part.keys() & found.keys()
        found |= part
    assert found == {seed: reference[seed] for seed in seeds}


def test_every_process_has_its_share(model: GaussianDiffusion, reference: dict[int, Any]) -> None:
    parts = [collect(model, range(N), world=World(rank, 3)) for rank in range(3)]
    assert [sorted(part) for part in parts] == [
        [*range(4), *range(12, 16)],
        [*range(4, 8), *range(16, 20)],
        [*range(8, 12), 20, 21],
    ]
    assert parts[0] | parts[1] | parts[2] == reference


def test_global_random_state_and_earlier_calls_do_not_matter(
    model: GaussianDiffusion, reference: dict[int, Any]
) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert collect(model, [7]) == {7: reference[7]}
    assert torch.equal(before, torch.get_rng_state())


def test_another_chunk_size_changes_rounding_only(model: GaussianDiffusion, reference: dict[int, Any]) -> None:
    other = collect(model, range(N), chunk=7)
    for seed in range(N):
        a, b = (np.frombuffer(found[seed][1], np.uint8).astype(int) for found in (reference, other))
        assert np.abs(a - b).max() <= 1


def test_an_image_is_the_samplers_walk_from_its_seeds_noise(
    model: GaussianDiffusion, reference: dict[int, Any]
) -> None:
    """Re-derived from the parts: noise of step 0 is the start, that of step i + 1 goes into step i."""
    stream = Stream(0, torch.arange(4, 8), "sample")
    x = SAMPLER.sample(
        model,
        stream.normal(*SHAPE),
        torch.tensor([1, 2, 0, 1]),
        lambda i: stream.at(step=i + 1).normal(*SHAPE),
        Thresholding.parse("clip"),
    )
    assert [image.tobytes() for image in to_uint8(x).numpy()] == [reference[seed][1] for seed in range(4, 8)]


def test_work_is_done_chunk_by_chunk_as_it_is_asked_for(model: GaussianDiffusion) -> None:
    calls: list[tuple[int, int]] = []

    def on_step(index: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        assert x.shape == x0.shape == (CHUNK, *SHAPE)
        calls.append((index, len(x)))

    endless = generate(model, SAMPLER, MACHINE, seeds=range(1_000_000), chunk=CHUNK, on_step=on_step)
    assert calls == []
    for done in (1, 2, 3):
        assert isinstance(next(endless), Drawn)
        assert calls == [(0, CHUNK), (1, CHUNK), (2, CHUNK)] * done


def test_far_seeds_cost_no_more_than_near_ones(model: GaussianDiffusion) -> None:
    far = 10**12 + 1
    assert set(collect(model, [far, 2])) == {2, far}
    assert set(collect(model, [2**62 - 1])) == {2**62 - 1}


# --- labels and guidance


def test_labels_are_cycled_by_seed(model: GaussianDiffusion, reference: dict[int, Any]) -> None:
    found = collect(model, range(6), labels=[2, 0])
    assert [found[seed][0] for seed in range(6)] == [2, 0, 2, 0, 2, 0]
    assert [found[seed][0] for seed in (0,)] == [2]
    assert collect(model, [5, 3], labels=[2, 0]) == {seed: found[seed] for seed in (3, 5)}
    same = [seed for seed in range(6) if found[seed][0] == reference[seed][0]]
    assert same == [2, 3]
    for seed in range(4, 6):
        assert found[seed][1] != reference[seed][1]


def test_no_label_is_a_label(model: GaussianDiffusion) -> None:
    found = collect(model, range(4), labels=[NO_LABEL])
    assert [label for label, _ in found.values()] == [NO_LABEL] * 4
    assert found.keys() == collect(model, range(4), guidance=lambda model: ClassifierFree(model, 0.0)).keys()


def test_guidance_is_classifier_free_guidance(model: GaussianDiffusion, reference: dict[int, Any]) -> None:
    assert collect(model, range(4), guidance=lambda model: ClassifierFree(model, 1.0)) == {
        seed: reference[seed] for seed in range(4)
    }
    stream = Stream(0, torch.arange(4), "sample")
    x = SAMPLER.sample(
        ClassifierFree(model, 3.0),
        stream.normal(*SHAPE),
        torch.tensor([0, 1, 2, 0]),
        lambda i: stream.at(step=i + 1).normal(*SHAPE),
        Thresholding.parse("clip"),
    )
    expected = {k: (k % 3, image.tobytes()) for k, image in enumerate(to_uint8(x).numpy())}
    assert collect(model, range(4), guidance=lambda model: ClassifierFree(model, 3.0)) == expected
    assert expected[0] != reference[0]


def test_an_unconditional_model_has_no_labels() -> None:
    (part,) = generate(build(0), SAMPLER, MACHINE, seeds=range(3), chunk=CHUNK)
    assert part.labels is None
    assert len(part.images) == 3


# --- thresholding


def test_the_models_thresholding_is_used_unless_told_otherwise(model: GaussianDiffusion) -> None:
    free = build(thresholding="none")
    free.load_state_dict(model.state_dict())
    ddim = Sampler.parse("ddim:steps=3")
    clipped, unclipped = (collect(each, range(4), ddim) for each in (model, free))
    assert clipped != unclipped
    assert collect(model, range(4), ddim, thresholding=Thresholding.parse("none")) == unclipped
    assert collect(free, range(4), Sampler.parse("ddim:steps=3,thresholding=clip")) == clipped
    assert collect(free, range(4), ddim, thresholding=Thresholding.parse("clip")) == clipped


# --- mistakes


@pytest.mark.parametrize(
    ("classes", "drop", "options", "fragment"),
    [
        (0, 0.1, {"labels": [1]}, "--labels: this model was trained without classes; leave --labels out."),
        (3, 0.1, {"labels": [0, 3]}, "--labels: 3 is no class of this model; its classes are 0 to 2."),
        (3, 0.1, {"labels": [-2]}, "--labels: -2 is no class of this model"),
        (3, 0.0, {"labels": [NO_LABEL]}, "--diffusion.label-drop=0"),
        (3, 0.1, {"sampler": Sampler.parse("ddim:steps=101")}, "steps=101 are more than the schedule's 100 timesteps."),
        (3, 0.1, {"seeds": [3, -1]}, "--seed: -1 is negative"),
        (3, 0.1, {"seeds": [3, 2**62]}, "whole numbers from 0 to 2^62 - 1"),
        (3, 0.1, {"seeds": [2**70]}, "whole numbers from 0 to 2^62 - 1"),
        (3, 0.1, {"seeds": [0.5]}, "whole numbers from 0 to 2^62 - 1"),
        (3, 0.1, {"seeds": [True]}, "whole numbers from 0 to 2^62 - 1"),
        (3, 0.1, {"seeds": 5}, "whole numbers from 0 to 2^62 - 1"),
        (3, 0.1, {"seeds": "12"}, "whole numbers from 0 to 2^62 - 1"),
        (3, 0.1, {"seeds": [[1], [2, 3]]}, "whole numbers from 0 to 2^62 - 1"),
        (3, 0.1, {"chunk": 0}, "--chunk=0 is wrong"),
        (3, 0.1, {"chunk": 1.5}, "--chunk=1.5 is wrong"),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_any_work(
    classes: int, drop: float, options: dict[str, Any], fragment: str
) -> None:
    model = build(classes, label_drop=drop)
    model.network.forward = None  # type: ignore[assignment]
    given = {"sampler": SAMPLER, "seeds": range(4), **options}
    with pytest.raises(ConfigError) as caught:
        next(generate(model, given.pop("sampler"), MACHINE, **given))
    assert fragment in str(caught.value)
    assert str(caught.value).endswith(".")


def test_no_seeds_give_no_images(model: GaussianDiffusion) -> None:
    assert list(islice(generate(model, SAMPLER, MACHINE, seeds=[]), 1)) == []
