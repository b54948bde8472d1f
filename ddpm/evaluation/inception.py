"""`inception-tf`: the Inception network of TensorFlow's 2015 release, the one whose Frechet distance is called FID.

The network is torch-fidelity's (extra `[eval]`), which gives TensorFlow's own numbers: images are resized as TensorFlow 1
did. Weights are fetched once and checked, or given as a file; pickles are read as tensors alone.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.data.places import cache_root
from ddpm.errors import DataError, MissingDependencyError
from ddpm.evaluation.features import FeatureExtractor, Features, Output
from ddpm.files import download, reason, sha256
from ddpm.registry import register

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BYTES = 95_628_359
_LAYERS = ["2048", "logits_unbiased"]
_HOW = "pass them with --weights FILE or --extractor inception-tf:weights=FILE"


@register("inception-tf")
class InceptionTF(FeatureExtractor):
    """TensorFlow's Inception, 2048 features (torch-fidelity, extra [eval]); weights are downloaded, or given by weights=FILE.

    With other weights than the released ones it is called `inception-tf-` and the first eight digits of their sha256:
    its Frechet distance is no FID.
    """

    weights: Path | None = None

    def open(self, device: torch.device | str = "cpu") -> Features:
        make = _torch_fidelity()
        path = self.weights if self.weights is not None else released_weights()
        digest, place = sha256(path), torch.device(device)
        network = _build(make, path).to(place)

        def run(images: Tensor) -> Output:
            with _unrounded(network, images) if images.dtype != torch.uint8 else nullcontext():
                features, logits = network(images.to(torch.uint8))
            return features, logits

        return Features(
            name=self.name if digest == SHA256 else f"{self.name}-{digest[:8]}",
            spec=self.spec,
            network=run,
            dim=2048,
            sha256=digest,
            resize="299x299, bilinear as TensorFlow 1, stretched",
            device=place,
        )


@contextmanager
def _unrounded(network: Any, images: Tensor) -> Iterator[None]:
    """Within it the network sees these pixels, float32 in 0..255, resized and scaled as it does it itself, whatever uint8
    images it is given: its own check lets nothing else in."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    side = (network.INPUT_IMAGE_SIZE, network.INPUT_IMAGE_SIZE)
    x = (interpolate_bilinear_2d_like_tensorflow1x(images, size=side, align_corners=False) - 128) / 128
    handle = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: (x,))
    try:
        yield
    finally:
        handle.remove()


def released_weights() -> Path:
    """The released weights: from torch-fidelity's or our own cache, else downloaded; raises DataError."""
    for name in (URL.rpartition("/")[2], "pt_inception-2015-12-05-6726825d.pth"):
        held = Path(torch.hub.get_dir()) / "checkpoints" / name
        if held.is_file() and sha256(held) == SHA256:
            return held
    place = cache_root() / "weights" / URL.rpartition("/")[2]
    try:
        download(URL, place, SHA256, BYTES)
    except DataError as error:
        raise DataError(f"inception-tf has no weights: {str(error).rstrip('.')}, or {_HOW}.") from None
    return place


def _torch_fidelity() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # torchvision of another torch raises RuntimeError
        raise MissingDependencyError(
            f"inception-tf needs torch-fidelity and torchvision ({type(error).__name__}: {reason(error)}): "
            'pip install "openddpm[eval]", or choose another extractor with --extractor.'
        ) from None
    return FeatureExtractorInceptionV3


def _build(make: Any, path: Path) -> Any:
    """torch-fidelity's network. It unpickles whatever file it is given, so it is given one that we wrote."""
    buffer = io.BytesIO()
    torch.save(read_weights(path), buffer)
    buffer.seek(0)
    try:
        return make("inception-v3-compat", _LAYERS, feature_extractor_weights_path=buffer)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is no weights file of torch-fidelity's Inception ({reason(error)}); fetch {URL} and {_HOW}."
        ) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a PyTorch file, of which nothing but tensors is read; raises DataError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as weights ({reason(error)}); nothing in it was executed.") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path}: holds no tensors by name; give a state dict.")
    return dict(found)
