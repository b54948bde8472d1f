"""Feature extractors: frozen networks whose features images are compared by.

A `FeatureExtractor` is the choice of one, a component (`tiny-cnn:data=digits`, `inception-tf:weights=FILE`); `open` reads
its weights and gives `Features`, which turns uint8 images into float32 features. A number is named after its extractor
(`Features.name`), and carries its `facts`, so that two protocols are never compared unawares.

`torchscript` and `exported` run a network out of a file. Such a file is a program: open only those that you trust.
"""

import io
import json
import re
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from ddpm.errors import ConfigError, DataError
from ddpm.files import reason, sha256
from ddpm.images import to_float
from ddpm.registry import Component, register

Output = tuple[Tensor, Tensor | None]
Network = Callable[[Tensor], Output]
"""Images (B, C, H, W) on the network's device, uint8 or float32 in 0..255 -> features (B, D), and logits (B, K) or None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """An opened extractor.

    Attributes:
        name: as it stands in the names of numbers; `inception-tf` alone gives an FID.
        spec: the extractor's written form.
        network: in eval mode, float32, on `device`.
        dim: of the features.
        sha256: of the weights' file.
        resize: what is done to images on the way in, in words.
        channels: that the network takes; grey images are repeated for three.
        classes: names of the logits; () where there are none, or they have no names.
        chunk: images that the network sees at once; features are quickest in multiples of it.
        rounds: whether the network rounds pixels itself, so that images which were not rounded mean nothing to it.
    """

    name: str
    spec: str
    network: Network
    dim: int
    sha256: str
    resize: str
    channels: Literal[1, 3] = 3
    classes: tuple[str, ...] = ()
    chunk: int = 32
    device: torch.device = torch.device("cpu")
    rounds: bool = False

    @property
    def facts(self) -> dict[str, str | int]:
        """What a number or a statistics file carries; two that differ here are not to be compared."""
        return {
            "extractor": self.name,
            "extractor_sha256": self.sha256,
            "resize": self.resize,
            "dim": self.dim,
        }

    def features(self, images: Tensor) -> Output:
        """Features of images, the same whatever batch they come in: the network always sees `chunk` images, the last ones padded.

        Args:
            images: uint8 (B, C, H, W), or float32 in 0..255 that was not rounded, on any device.

        Returns:
            float32 on the CPU: features (B, dim), and logits (B, K) or None.

        Raises DataError: channels that the network does not take, features that are not finite.
        """
        assert images.dtype in (torch.uint8, torch.float32) and images.ndim == 4, (images.dtype, images.shape)
        self.check_channels(images.shape[1])
        parts = [self._chunk(images[start : start + self.chunk]) for start in range(0, len(images), self.chunk)]
        if not parts:
            return torch.empty(0, self.dim), None
        features = torch.cat([features for features, _ in parts])
        if not features.isfinite().all():
            raise DataError(f"the extractor {self.name} gave features that are not finite; check its weights.")
        logits = [logits for _, logits in parts if logits is not None]
        return features, torch.cat(logits) if logits else None

    def check_channels(self, channels: int) -> None:
        """Raise DataError where the network does not take images of so many channels."""
        if channels != self.channels and not (channels == 1 and self.channels == 3):
            raise DataError(
                f"the extractor {self.name} takes images of {self.channels} channels, found {channels}; choose another with --extractor."
            )

    def _chunk(self, images: Tensor) -> Output:
        n = len(images)
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.chunk - n)).to(self.device)
        with _exact(self.device):
            features, logits = self.network(images.expand(-1, self.channels, -1, -1))
        return features[:n].float().cpu(), None if logits is None else logits[:n].float().cpu()


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Plain float32: no gradient, no autocast, no TF32."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class FeatureExtractor(Component, kind="extractor"):
    """A network whose features images are compared by; its options say which weights."""

    @abstractmethod
    def open(self, device: torch.device | str = "cpu") -> Features:
        """Read the weights and build the network on a device.

        Raises ConfigError (an option is missing), MissingDependencyError, DataError (weights missing or damaged).
        """


# Channel means and standard deviations that networks were trained with, for pixels in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (B, C, size, size) in [0, 255]: bicubic with antialiasing, stretched, clamped."""
    x = images.float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return x


def standardised(x: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Pixels in [0, 255] -> (x / 255 - mean) / std of each of three channels."""
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in statistics)
    return (x / 255.0 - mean) / std


def in_words(size: int) -> str:
    """What `resized` does."""
    return f"{size}x{size}, bicubic, antialiased, stretched"


PREPARE: dict[str, Callable[[Tensor], Tensor]] = {
    "uint8": lambda x: x.round().to(torch.uint8),
    "unit": lambda x: x / 255.0,
    "symmetric": lambda x: to_float(x.round().to(torch.uint8)),
    "imagenet": lambda x: standardised(x, IMAGENET),
    "clip": lambda x: standardised(x, OPENAI_CLIP),
}
"""Name of an input convention -> pixels in [0, 255] as the network takes them."""


@dataclass(frozen=True, kw_only=True)
class NetworkFile(FeatureExtractor):
    """A network out of a file: network(images) -> features (B, D), or (features, logits).

    Images are brought to `size` x `size` and to what `input` names: uint8, unit ([0, 1]), symmetric ([-1, 1]), or
    standardised as for imagenet or clip. It is given `chunk` of them at once, always.
    """

    path: Path | None = None
    size: Annotated[int, Field(ge=1, le=4096)] = 224
    input: Literal["uint8", "unit", "symmetric", "imagenet", "clip"] = "uint8"
    channels: Annotated[Literal[1, 3], BeforeValidator(int)] = 3
    chunk: Annotated[int, Field(ge=1, le=4096)] = 32

    @abstractmethod
    def read(self, path: Path, device: torch.device) -> Callable[[Tensor], Any]:
        """The network in the file; may raise whatever it likes."""

    def open(self, device: torch.device | str = "cpu") -> Features:
        if self.path is None:
            raise ConfigError(f"the extractor {self.name} needs a file: --extractor {self.name}:path=FILE.")
        digest, place = sha256(self.path), torch.device(device)
        try:
            module = self.read(self.path, place)
        except Exception as error:
            raise DataError(
                f"{self.path}: cannot be read as a network for the extractor {self.name} ({reason(error)})."
            ) from None
        opened = Features(
            name=f"{self.name}-{re.sub(r'[^A-Za-z0-9.]+', '-', self.path.stem)}",
            spec=self.spec,
            network=self._wrapped(module),
            dim=0,
            sha256=digest,
            resize=f"{in_words(self.size)}, {self.input}",
            channels=self.channels,
            chunk=self.chunk,
            device=place,
            rounds=self.input in ("uint8", "symmetric"),
        )
        return self._measured(opened)

    def _wrapped(self, module: Callable[[Tensor], Any]) -> Network:
        prepare = PREPARE[self.input]

        def network(images: Tensor) -> Output:
            found = module(prepare(resized(images, self.size)))
            features, logits = (found[0], found[1]) if isinstance(found, tuple | list) else (found, None)
            return features.flatten(1), logits

        return network

    def _measured(self, opened: Features) -> Features:
        """With the dimension of its features, found by trying it on black images."""
        black = torch.zeros(1, opened.channels, self.size, self.size, dtype=torch.uint8)
        try:
            features, _ = opened.features(black)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
            raise DataError(
                f"{self.path}: the network does not take {self.chunk} images of "
                f"{opened.channels}x{self.size}x{self.size} as {self.input} ({_last_line(error)}); set size, input, channels and chunk of {self.name}."
            ) from None
        return replace(opened, dim=features.shape[1])


def _last_line(error: Exception) -> str:
    """What went wrong, without the TorchScript traceback before it."""
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__


@register("torchscript")
class TorchScript(NetworkFile):
    """A TorchScript file. It is a program: open only files that you trust."""

    def read(self, path: Path, device: torch.device) -> Callable[[Tensor], Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch would rather have torch.export files
            module: Any = torch.jit.load(str(path), map_location=device)
            module.eval()
        return module  # type: ignore[no-any-return]


@register("exported")
class Exported(NetworkFile):
    """A torch.export file (.pt2). It is a program: open only files that you trust."""

    def read(self, path: Path, device: torch.device) -> Callable[[Tensor], Any]:
        data = path.read_bytes()
        _check_pickles(data)
        program = torch.export.load(io.BytesIO(data))
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module()


def _check_pickles(archive: bytes) -> None:
    """Refuse a torch.export archive whose pickles hold more than tensors, which torch.export.load would execute."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        names = members.namelist()
        if not any(name.endswith("/archive_format") for name in names):
            raise ValueError("it is no torch.export archive, or one of before PyTorch 2.8")
        for name in names:
            if name.endswith(".pt"):
                torch.load(io.BytesIO(members.read(name)), weights_only=True)
            elif name.endswith("_config.json"):
                payloads = json.loads(members.read(name))["config"].values()
                if any(entry["use_pickle"] or "_obj_" in entry["path_name"] for entry in payloads):
                    raise ValueError("it holds pickled objects, which are not read")
