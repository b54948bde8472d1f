"""`tiny-cnn`: a small classifier of ours, whose 64 features let evaluation work offline in seconds.

A noisy one also takes the noise level, and is trained on noisy images: the classifier that classifier guidance needs
(Dhariwal and Nichol 2021, section 4).
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.features import FeatureExtractor, Features, Output
from ddpm.files import atomic_path, reason, sha256
from ddpm.images import to_float
from ddpm.models.unet import sinusoids
from ddpm.randomness import Stream
from ddpm.registry import register
from ddpm.schedules import Level, Schedule

ASSETS = Path(__file__).parent.parent / "assets"
WIDTHS = (16, 32, 64, 64)
"""Channels of the stem and of each block; the last are the features."""

_TIME = 64
_CLEAN = 20.0
"""log-SNRs are clamped to +-20, where an image of 8 bits is clean, or noise alone."""


class _Block(nn.Module):
    """Two normalised convolutions beside a shortcut (He et al. 2016b); `halve` halves height and width."""

    def __init__(self, in_channels: int, out_channels: int, halve: bool, noisy: bool) -> None:
        super().__init__()
        self.halve = halve
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2 if halve else 1, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.time = nn.Linear(_TIME, 2 * out_channels) if noisy else None

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.time is not None and time is not None:
            scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        short = F.avg_pool2d(x, 2, ceil_mode=True) if self.halve else x
        return self.skip(short) + self.conv2(F.silu(h))  # type: ignore[no-any-return]


class TinyCNN(nn.Module):
    """A convolution, three residual blocks (two of them halve the image), the mean over the pixels, a linear layer.

    Args:
        channels: of the images.
        num_classes: of the labels.
        noisy: whether it takes a noise level.
    """

    def __init__(self, channels: int, num_classes: int, noisy: bool = False) -> None:
        super().__init__()
        self.noisy = noisy
        self.stem = nn.Conv2d(channels, WIDTHS[0], 3, padding=1)
        pairs = itertools.pairwise(WIDTHS)
        self.blocks = nn.ModuleList(_Block(a, b, halve=index < 2, noisy=noisy) for index, (a, b) in enumerate(pairs))
        self.norm = nn.BatchNorm2d(WIDTHS[-1])
        self.time = nn.Sequential(nn.Linear(_TIME, _TIME), nn.SiLU()) if noisy else None
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor, log_snr: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, K).

        Args:
            x: (B, C, H, W), images in [-1, 1], or for a noisy network x_t / sqrt(alpha^2 + sigma^2).
            log_snr: (B,) for a noisy network; None means clean images.
        """
        time = None if self.time is None else self.time(self._embedded(x, log_snr))
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, time)
        features = F.silu(self.norm(h)).mean(dim=(2, 3))
        return features, self.head(features)

    def _embedded(self, x: Tensor, log_snr: Tensor | None) -> Tensor:
        if log_snr is None:
            log_snr = x.new_full((len(x),), _CLEAN)
        label = (log_snr.to(x).clamp(-_CLEAN, _CLEAN) + _CLEAN) * 25.0  # 0 to 1000, as sinusoids expect
        return sinusoids(label, _TIME).to(x.dtype)

    def noisy_logits(self, x_t: Tensor, level: Level) -> Tensor:
        """Logits (B, K) of noisy images x_t = alpha x0 + sigma eps (B, C, H, W) at a level (B,) or (), of any schedule.

        Gradients flow to x_t. Raises ConfigError where the network was not trained on noise.
        """
        if not self.noisy:
            raise ConfigError(
                "this classifier knows no noise levels; train one with `ddpm features train DATASET --noisy`."
            )
        at = level.like(x_t)
        log_snr = level.log_snr.to(x_t.device).expand(len(x_t))
        return self(x_t / (at.alpha**2 + at.sigma**2).sqrt(), log_snr)[1]  # type: ignore[no-any-return]


class ClassifierLoss(nn.Module):
    """What the trainer trains: the cross-entropy of each image, shifted a little, and with a schedule made noisy.

    Args:
        network: the classifier.
        shift: images are moved by up to so many pixels along each axis; what comes in repeats the edge.
        schedule: noise levels are drawn from it as a diffusion model's are; None for clean images.
    """

    def __init__(self, network: TinyCNN, shift: int = 0, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.network, self.shift, self.schedule = network, shift, schedule

    def forward(self, images: Tensor, labels: Tensor | None, stream: Stream) -> Tensor:
        """(B,) float32, for images (B, C, H, W) in [-1, 1] and labels (B,) int64."""
        assert labels is not None, "a classifier is trained with labels"
        x = shifted(images, stream.at("shift"), self.shift)
        if self.schedule is None:
            logits = self.network(x)[1]
        else:
            level = self.schedule.at(self.schedule.draw(stream.at("time").uniform()))
            logits = self.network.noisy_logits(noised(x, level, stream), level)
        return F.cross_entropy(logits.float(), labels, reduction="none")


def noised(x0: Tensor, level: Level, stream: Stream) -> Tensor:
    """x_t = alpha x0 + sigma eps, eps from the stream's numbers for noise."""
    at = level.like(x0)
    return at.alpha * x0 + at.sigma * stream.at("noise").normal(*x0.shape[1:])


def shifted(images: Tensor, stream: Stream, most: int) -> Tensor:
    """Images (B, C, H, W), each moved by whole pixels in -most..most along both axes, the edge repeated."""
    if most == 0:
        return images
    count, channels, height, width = images.shape
    moves = (stream.uniform(2) * (2 * most + 1)).long() - most
    rows = (torch.arange(height, device=images.device) + moves[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + moves[:, 1:]).clamp(0, width - 1)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Classifier:
    """A trained classifier and what its file says of it: a `ddpm.guidance.NoisyClassifier`, where its network is noisy."""

    network: TinyCNN
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    facts: Mapping[str, str]

    @property
    def num_classes(self) -> int:
        """How many labels it knows."""
        return len(self.classes)

    def noisy_logits(self, x_t: Tensor, level: Level) -> Tensor:
        """As `TinyCNN.noisy_logits`, for levels of any schedule: by log-SNR, those that it never saw as the nearest it did.

        Raises ConfigError: images of another size, or a network that was not trained on noise.
        """
        if x_t.shape[1:] != self.shape:
            raise ConfigError(f"it was trained on images of {'x'.join(map(str, self.shape))}.")
        low, high = json.loads(self.facts.get("log_snr", f"[{-_CLEAN}, {_CLEAN}]"))
        return self.network.noisy_logits(x_t, replace(level, log_snr=level.log_snr.clamp(low, high)))


def save_classifier(
    path: Path, network: TinyCNN, shape: tuple[int, int, int], classes: tuple[str, ...], facts: Mapping[str, Any]
) -> None:
    """Write weights as safetensors, whole or not at all; `facts` (JSON values) go into its metadata. Raises DataError."""
    metadata = {
        "format": "ddpm tiny-cnn 1",
        "noisy": json.dumps(network.noisy),
        "shape": json.dumps(shape),
        "classes": json.dumps(classes),
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o644)


def load_classifier(path: Path) -> Classifier:
    """A classifier that `ddpm features train` wrote, in eval mode, on the CPU; raises DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({reason(error)}).") from None
    try:
        shape, classes = tuple(json.loads(facts["shape"])), tuple(json.loads(facts["classes"]))
        network = TinyCNN(shape[0], len(classes), json.loads(facts["noisy"]))
        network.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError, TypeError, IndexError) as error:
        raise DataError(f"{path}: is not a classifier of `ddpm features train` ({reason(error)}).") from None
    network.eval().requires_grad_(False)
    return Classifier(network, cast(tuple[int, int, int], shape), classes, facts)


@torch.inference_mode()
def accuracy(network: TinyCNN, images: Tensor, labels: Tensor, level: Level | None = None, chunk: int = 500) -> float:
    """Share of uint8 images (N, C, H, W) that are given their label (N,), with noise of a level (seeded) where one is given."""
    device, right = next(network.parameters()).device, 0
    for start in range(0, len(images), chunk):
        x = to_float(images[start : start + chunk].to(device))
        if level is None:
            logits = network(x)[1]
        else:
            ids = torch.arange(start, start + len(x), device=device)
            logits = network.noisy_logits(noised(x, level, Stream(0, ids, "accuracy")), level)
        right += int((logits.argmax(1).cpu() == labels[start : start + chunk]).sum())
    return right / len(images)


def shipped() -> list[str]:
    """Data sets whose weights come with the package."""
    return sorted(path.stem.removeprefix("tiny-cnn-") for path in ASSETS.glob("tiny-cnn-*.safetensors"))


def shipped_weights(data: str) -> Path:
    """The file of a data set's weights that come with the package."""
    return ASSETS / f"tiny-cnn-{data}.safetensors"


def default_extractor(dataset: str) -> str:
    """The extractor of choice for a data set, as a spec: `tiny-cnn` where its weights come with the package, else `inception-tf`."""
    return f"tiny-cnn:data={dataset}" if dataset in shipped() else "inception-tf"


@register("tiny-cnn")
class TinyCNNExtractor(FeatureExtractor):
    """Our small classifier, 64 features: of a data set whose weights are shipped (data=NAME), or of a file (weights=FILE)."""

    data: str | None = None
    weights: Path | None = None

    def open(self, device: torch.device | str = "cpu") -> Features:
        path = self._path()
        found, place = load_classifier(path), torch.device(device)
        network, (channels, height, width) = found.network.to(place), found.shape

        def run(images: Tensor) -> Output:
            x = to_float(images)
            if x.shape[-2:] != (height, width):
                x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
            return cast(Output, network(x))

        return Features(
            name=self.name,
            spec=self.spec,
            network=run,
            dim=WIDTHS[-1],
            sha256=sha256(path),
            resize=f"{height}x{width}, bilinear, antialiased, stretched",
            channels=cast(Literal[1, 3], channels),
            classes=found.classes,
            chunk=64,
            device=place,
        )

    def _path(self) -> Path:
        if (self.data is None) == (self.weights is None):
            raise ConfigError(
                f"the extractor tiny-cnn needs data=NAME ({', '.join(shipped())}) or weights=FILE, a file of `ddpm features train`."
            )
        if self.weights is not None:
            return self.weights
        assert self.data is not None
        if self.data not in shipped():
            raise ConfigError(
                f"tiny-cnn has no weights for {self.data!r}, only for {', '.join(shipped())}; make some with "
                f"`ddpm features train {self.data}` and pass them with --extractor tiny-cnn:weights=FILE."
            )
        return shipped_weights(self.data)
