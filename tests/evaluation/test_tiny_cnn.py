"""The small classifier: its loss, its file, the weights that are shipped, and the noisy one."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ddpm.config import DataConfig
from ddpm.data import ImageSet, load_dataset
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation import tiny_cnn
from ddpm.evaluation.features import FeatureExtractor
from ddpm.evaluation.tiny_cnn import ClassifierLoss, TinyCNN
from ddpm.files import sha256
from ddpm.images import to_float
from ddpm.randomness import Stream
from ddpm.schedules import Level, Schedule

SHIPPED = [
    pytest.param("digits", 0.98, 355),
    pytest.param("fashion-mnist", 0.92, 1000, marks=pytest.mark.fashion),
]


def network(noisy: bool = False, channels: int = 1) -> TinyCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyCNN(channels, 10, noisy)


def some(digits: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(digits.images[:count]), torch.tensor(digits.labels[:count])


def level(alpha: float, sigma: float) -> Level:
    log_snr = 2 * math.log(alpha / sigma)
    return Level(*(torch.tensor(value, dtype=torch.float64) for value in (0.0, alpha, sigma, log_snr)))


@pytest.mark.parametrize(("data", "least", "count"), SHIPPED)
def test_shipped_weights_are_as_good_as_they_say(data: str, least: float, count: int) -> None:
    path = tiny_cnn.shipped_weights(data)
    found = tiny_cnn.load_classifier(path)
    told = json.loads(found.facts["test_accuracy"])
    assert told >= least
    assert path.stat().st_size < 1_500_000
    assert found.facts["command"].startswith(f"ddpm features train {data}")
    test = load_dataset(DataConfig(dataset=data, split="test"))
    assert (found.shape, found.classes, len(test)) == (test.shape, test.classes, json.loads(found.facts["test_images"]))
    train = load_dataset(DataConfig(dataset=data, split="train"))
    assert found.facts["data_sha256"] == train.fingerprint
    right = tiny_cnn.accuracy(found.network, torch.tensor(test.images[:count]), torch.tensor(test.labels[:count]))
    assert abs(right - told) <= (0 if count == len(test) else 3 * math.sqrt(told * (1 - told) / count))


@pytest.mark.parametrize("data", ["digits", "fashion-mnist"])
def test_the_default_extractor_opens(data: str) -> None:
    opened = FeatureExtractor.parse(tiny_cnn.default_extractor(data)).open()
    assert (opened.name, opened.dim, opened.channels) == ("tiny-cnn", 64, 1)
    assert len(opened.classes) == 10
    assert opened.sha256 == sha256(tiny_cnn.shipped_weights(data))


def test_features_do_not_depend_on_the_batch(digits: ImageSet) -> None:
    opened = FeatureExtractor.parse("tiny-cnn:data=digits").open()
    images, _ = some(digits, 150)
    features, logits = opened.features(images)
    for size in (1, 37, 64):
        parts = [opened.features(part) for part in images.split(size)]
        assert torch.equal(torch.cat([part for part, _ in parts]), features)
        assert torch.equal(torch.cat([part for _, part in parts if part is not None]), logits)


def test_the_extractor_gives_the_networks_features_and_logits(digits: ImageSet) -> None:
    opened = FeatureExtractor.parse("tiny-cnn:data=digits").open()
    images, labels = some(digits, 64)
    features, logits = opened.features(images)
    own = tiny_cnn.load_classifier(tiny_cnn.shipped_weights("digits")).network
    expected, expected_logits = own(to_float(images))
    assert torch.allclose(features, expected, atol=1e-6)
    assert torch.allclose(logits, expected_logits, atol=1e-5)
    assert (logits.argmax(1) == labels).float().mean() > 0.95


def test_images_of_another_size_are_resized(digits: ImageSet) -> None:
    opened = FeatureExtractor.parse("tiny-cnn:data=digits").open()
    images, labels = some(digits, 64)
    larger = images.repeat_interleave(3, dim=2).repeat_interleave(2, dim=3)
    _, logits = opened.features(larger)
    smaller = F.interpolate(to_float(larger), size=(8, 8), mode="bilinear", antialias=True)
    own = tiny_cnn.load_classifier(tiny_cnn.shipped_weights("digits")).network
    assert torch.allclose(logits, own(smaller)[1], atol=1e-4)
    assert (logits.argmax(1) == labels).float().mean() > 0.75


def test_other_channels_are_refused() -> None:
    opened = FeatureExtractor.parse("tiny-cnn:data=digits").open()
    with pytest.raises(DataError, match="tiny-cnn takes images of 1 channels, found 3"):
        opened.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiny-cnn", "needs data=NAME .digits.* or weights=FILE"),
        ("tiny-cnn:data=digits,weights=x", "needs data=NAME"),
        ("tiny-cnn:data=cifar10", "no weights for 'cifar10', only for digits.*`ddpm features train cifar10`"),
    ],
)
def test_which_weights_must_be_said(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureExtractor.parse(spec).open()


def test_files_that_are_no_classifier(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="is not a classifier of `ddpm features train`"):
        tiny_cnn.load_classifier(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not at all")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        tiny_cnn.load_classifier(tmp_path / "text.safetensors")
    with pytest.raises(DataError, match="cannot be read"):
        tiny_cnn.load_classifier(tmp_path / "none.safetensors")


@pytest.mark.parametrize("noisy", [False, True])
def test_a_saved_classifier_comes_back(noisy: bool, tmp_path: Path, digits: ImageSet) -> None:
    made = network(noisy).eval()
    path = tmp_path / "a" / "made.safetensors"
    tiny_cnn.save_classifier(path, made, (1, 8, 8), digits.classes, {"dataset": "digits", "n": 3})
    found = tiny_cnn.load_classifier(path)
    x = to_float(some(digits, 5)[0])
    assert torch.equal(found.network(x)[1], made(x)[1])
    assert (found.shape, found.classes, found.facts["n"]) == ((1, 8, 8), digits.classes, "3")
    assert [found.network.training, found.network.noisy] == [False, noisy]
    assert [p.name for p in path.parent.iterdir()] == ["made.safetensors"]
    opened = FeatureExtractor.parse(f"tiny-cnn:weights={path}").open()
    assert torch.allclose(opened.features(some(digits, 5)[0])[0], made(x)[0], atol=1e-6)


def test_the_loss_is_the_cross_entropy_of_each_image(digits: ImageSet) -> None:
    images, labels = some(digits, 6)
    made = network().eval()
    found = ClassifierLoss(made)(to_float(images), labels, Stream(0, torch.arange(6)))
    log_probabilities = made(to_float(images))[1].log_softmax(1)
    assert torch.allclose(found, -log_probabilities[torch.arange(6), labels])


@pytest.mark.parametrize("noisy", [False, True])
def test_an_images_loss_does_not_depend_on_the_others(noisy: bool, digits: ImageSet) -> None:
    images, labels = some(digits, 8)
    loss = ClassifierLoss(network(noisy), 1, Schedule.parse("cosine") if noisy else None).eval()
    stream = Stream(0, torch.arange(8), step=5)
    whole = loss(to_float(images), labels, stream)
    part = loss(to_float(images[3:5]), labels[3:5], stream.select(slice(3, 5)))
    assert torch.allclose(whole[3:5], part, atol=1e-5)
    assert not torch.allclose(whole, loss(to_float(images), labels, Stream(0, torch.arange(8), step=6)))


def test_shifts_move_whole_pixels_and_repeat_the_edge() -> None:
    images = torch.arange(2000.0 * 5 * 7).reshape(2000, 1, 5, 7)
    moved = tiny_cnn.shifted(images, Stream(1, torch.arange(2000)), 2)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    counts = torch.zeros(5, 5)
    for index in range(2000):
        fits = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(padded[index, :, down : down + 5, right : right + 7], moved[index])
        ]
        assert len(fits) == 1
        counts[fits[0]] += 1
    assert ((counts - 80).abs() < 5 * math.sqrt(80)).all()
    assert torch.equal(tiny_cnn.shifted(images, Stream(1, torch.arange(2000)), 0), images)


def test_a_noisy_classifier_takes_levels(digits: ImageSet) -> None:
    made = network(noisy=True).eval()
    x = to_float(some(digits, 4)[0])
    near, far = made.noisy_logits(x, level(0.99, 0.1)), made.noisy_logits(x, level(0.1, 0.99))
    assert not torch.allclose(near, far)
    each = Level(
        *(
            torch.stack([a, b])
            for a, b in zip(vars(level(0.99, 0.1)).values(), vars(level(0.1, 0.99)).values(), strict=True)
        )
    )
    assert torch.allclose(made.noisy_logits(x[:2], each), torch.stack([near[0], far[1]]), atol=1e-5)


def test_levels_of_every_schedule_are_one_scale(digits: ImageSet) -> None:
    """x_t of a variance-exploding schedule (alpha = 1) is the same image as the variance-preserving one, scaled."""
    made = network(noisy=True).eval()
    x = to_float(some(digits, 4)[0])
    sigma = 3.0
    scale = math.sqrt(1 + sigma**2)
    exploding, preserving = level(1.0, sigma), level(1 / scale, sigma / scale)
    assert torch.allclose(made.noisy_logits(x * scale, exploding), made.noisy_logits(x, preserving), atol=1e-5)


def test_guidance_gets_a_gradient(digits: ImageSet) -> None:
    made = network(noisy=True).eval().requires_grad_(False)
    x = to_float(some(digits, 3)[0]).requires_grad_()
    made.noisy_logits(x, level(0.7, 0.7)).log_softmax(1)[:, 3].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_clean_classifier_knows_no_levels() -> None:
    with pytest.raises(ConfigError, match="--noisy"):
        network().noisy_logits(torch.zeros(1, 1, 8, 8), level(0.7, 0.7))
