"""Extractors: the same features however images are batched, other implementations' numbers, and what is refused."""

import io
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ddpm.errors import ConfigError, DataError, MissingDependencyError
from ddpm.evaluation import features, inception, pretrained, tiny_cnn
from ddpm.evaluation.features import FeatureExtractor, Features
from ddpm.randomness import Stream
from ddpm.registry import register


def pictures(count: int, channels: int = 3, height: int = 12, width: int = 12) -> Tensor:
    words = Stream(3, torch.arange(count)).bits(channels * height * width)
    return (words % 256).to(torch.uint8).reshape(count, channels, height, width)


class Network(nn.Module):
    """Takes [0, 1]; gives features (B, 6, 1, 1) and logits."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(x).relu().mean(dim=(2, 3), keepdim=True)
        return h, self.head(h.flatten(1))


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network().eval()


@pytest.fixture
def script(network: Network, tmp_path: Path) -> Path:
    path = tmp_path / "own net.pt"
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.trace"):
        torch.jit.trace(network, torch.zeros(4, 3, 12, 12)).save(str(path))
    return path


class Payload:
    """What a pickle of it does is to make a folder called `executed`."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


@register("brightness")
class Brightness(FeatureExtractor):
    """Mean and deviation."""

    scale: float = 1.0

    def open(self, device: torch.device | str = "cpu") -> Features:
        def run(images: Tensor) -> tuple[Tensor, None]:
            x = images.float().flatten(1) * self.scale
            return torch.stack([x.mean(1), x.std(1)], dim=1), None

        return Features(name=self.name, spec=self.spec, network=run, dim=2, sha256="0", resize="none")


del FeatureExtractor.registered["brightness"]  # known here, and not among those of the package


def test_every_extractor_is_its_own_written_form() -> None:
    for name in FeatureExtractor.names():
        extractor = FeatureExtractor.parse(name)
        assert FeatureExtractor.parse(extractor.spec) == extractor
        assert extractor.spec.startswith(name)


def test_a_class_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FeatureExtractor.registered, "brightness", Brightness)
    monkeypatch.setitem(sys.modules, "own_extractors", sys.modules[__name__])
    opened = FeatureExtractor.parse("own_extractors:Brightness:scale=2").open()
    found, logits = opened.features(pictures(5))
    assert torch.allclose(found[:, 0], pictures(5).float().mean(dim=(1, 2, 3)) * 2)
    assert logits is None


def test_a_torchscript_file_gives_its_networks_features(script: Path, network: Network) -> None:
    opened = FeatureExtractor.parse(f"torchscript:path={script},size=12,input=unit,chunk=4").open()
    images = pictures(10)
    found, logits = opened.features(images)
    expected, expected_logits = network(images / 255.0)
    assert torch.allclose(found, expected.flatten(1), atol=1e-6)
    assert torch.allclose(logits, expected_logits, atol=1e-6)
    assert (opened.name, opened.dim) == ("torchscript-own-net", 6)
    assert re.fullmatch("[0-9a-f]{64}", opened.sha256)
    assert opened.facts == {
        "extractor": "torchscript-own-net",
        "extractor_sha256": opened.sha256,
        "resize": "12x12, bicubic, antialiased, stretched, unit",
        "dim": 6,
    }


def test_an_exported_file_gives_its_networks_features(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "own.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(4, 3, 12, 12),)), path)
    opened = FeatureExtractor.parse(f"exported:path={path},size=12,input=symmetric,chunk=4").open()
    images = pictures(10)
    found, logits = opened.features(images)
    expected, expected_logits = network(images / 127.5 - 1)
    assert torch.allclose(found, expected.flatten(1), atol=1e-6)
    assert torch.allclose(logits, expected_logits, atol=1e-6)
    assert opened.dim == 6


def test_features_do_not_depend_on_the_batch(script: Path) -> None:
    opened = FeatureExtractor.parse(f"torchscript:path={script},size=12,chunk=4,input=unit").open()
    images = pictures(11)
    whole, _ = opened.features(images)
    for size in (1, 3, 4, 7):
        parts = [opened.features(part)[0] for part in images.split(size)]
        assert torch.equal(torch.cat(parts), whole)


def test_no_images_give_no_features(script: Path) -> None:
    opened = FeatureExtractor.parse(f"torchscript:path={script},size=12,input=unit").open()
    assert opened.features(pictures(0))[0].shape == (0, 6)


def test_grey_is_repeated_for_three_channels(script: Path) -> None:
    opened = FeatureExtractor.parse(f"torchscript:path={script},size=12,input=unit").open()
    grey = pictures(3, channels=1)
    assert torch.equal(opened.features(grey)[0], opened.features(grey.repeat(1, 3, 1, 1))[0])
    with pytest.raises(DataError, match="takes images of 3 channels, found 2"):
        opened.features(pictures(3, channels=2))


def test_features_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Brightness(scale=3e38).open()
    with pytest.raises(DataError, match="not finite"):
        opened.features(pictures(2))


def test_tf32_and_autocast_are_off_within_and_as_before_after() -> None:
    seen = []

    def run(images: Tensor) -> tuple[Tensor, None]:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return images.float().flatten(1), None

    opened = Features(name="x", spec="x", network=run, dim=1, sha256="0", resize="none")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            opened.features(pictures(1))
        assert seen == [(False, False, False)]
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_resizing_agrees_with_pillow() -> None:
    for height, width, size in ((12, 20, 31), (50, 40, 16)):
        image = pictures(1, 3, height, width) // 2 + 64  # Pillow clamps after each axis
        ours = features.resized(image, size)[0].permute(1, 2, 0).numpy()
        pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
        assert np.abs(ours - np.asarray(pillow, dtype=np.float32)).max() < 1.5  # ... and rounds


def test_images_of_the_right_size_are_not_touched() -> None:
    assert torch.equal(features.resized(pictures(2), 12), pictures(2).float())


@pytest.mark.parametrize("kind", ["torchscript", "exported"])
def test_a_file_extractor_without_a_file(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--extractor {kind}:path=FILE"):
        FeatureExtractor.parse(kind).open()
    with pytest.raises(DataError, match="No such file"):
        FeatureExtractor.parse(f"{kind}:path={tmp_path / 'none.pt'}").open()


@pytest.mark.parametrize("kind", ["torchscript", "exported"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(
    kind: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Payload(), "bad.pt2", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="cannot be read as a network"):
        FeatureExtractor.parse(f"{kind}:path=bad.pt2").open()
    assert not Path("executed").exists()


@pytest.mark.parametrize("member", ["data/sample_inputs/model.pt", "data/weights/model.pt"])
def test_a_pickle_hidden_in_an_exported_file_is_refused(
    member: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(network, (torch.zeros(4, 3, 12, 12),)), "good.pt2")
    payload = io.BytesIO()
    torch.save(Payload(), payload)
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w", zipfile.ZIP_STORED) as bad:
        root = good.namelist()[0].partition("/")[0]
        for name in good.namelist():
            if name != f"{root}/{member}":
                bad.writestr(name, good.read(name))
        bad.writestr(f"{root}/{member}", payload.getvalue())
    with pytest.raises(DataError, match="cannot be read as a network"):
        FeatureExtractor.parse("exported:path=bad.pt2,size=12,chunk=4").open()
    assert not Path("executed").exists()


def test_pickled_weights_of_an_exported_file_are_refused(network: Network, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(network, (torch.zeros(4, 3, 12, 12),)), tmp_path / "good.pt2")
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name).replace(b'"use_pickle": false', b'"use_pickle": true'))
    with pytest.raises(DataError, match="holds pickled objects"):
        FeatureExtractor.parse(f"exported:path={tmp_path / 'bad.pt2'},size=12,chunk=4").open()


def test_a_network_that_does_not_take_the_images_is_told_of(script: Path) -> None:
    with pytest.raises(DataError, match="does not take 32 images of 1x12x12 as unit"):
        FeatureExtractor.parse(f"torchscript:path={script},size=12,channels=1,input=unit").open()


# inception-tf


def test_inception_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install "openddpm[eval]"')):
        FeatureExtractor.parse("inception-tf").open()


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A package torch_fidelity of our own."""
    (folder / "torch_fidelity").mkdir()
    (folder / "torch_fidelity/__init__.py").write_text("")
    (folder / "torch_fidelity/feature_extractor_inceptionv3.py").write_text(text)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)


STAND_IN = """
import torch
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        self.fc = torch.nn.Linear(2048, 1008)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        assert features_list == ["2048", "logits_unbiased"]
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        h = x.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 2048)
        return h, h @ self.fc.weight.T
"""


def test_inception_beside_a_torchvision_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(MissingDependencyError, match="RuntimeError: operator torchvision::nms does not exist"):
        FeatureExtractor.parse("inception-tf").open()
    forget(monkeypatch)


def test_inception_is_called_so_with_the_released_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, STAND_IN)
    weights = {"fc.weight": torch.ones(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(weights, tmp_path / "own.pth")
    save_file(weights, tmp_path / "own.safetensors")
    for name in ("own.pth", "own.safetensors"):
        opened = FeatureExtractor.parse(f"inception-tf:weights={tmp_path / name}").open()
        found, logits = opened.features(pictures(3))
        assert found.shape == (3, 2048)
        assert torch.allclose(logits, found.sum(1, keepdim=True).expand(-1, 1008))
        assert opened.name == f"inception-tf-{opened.sha256[:8]}"
    monkeypatch.setattr(inception, "SHA256", opened.sha256)
    assert FeatureExtractor.parse(f"inception-tf:weights={tmp_path / name}").open().name == "inception-tf"
    forget(monkeypatch)


def test_inception_weights_that_are_missing_damaged_or_malicious(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(DataError, match=r"by hand.*--weights FILE or --extractor inception-tf:weights=FILE"):
        FeatureExtractor.parse("inception-tf").open()
    with pytest.raises(DataError, match="No such file"):
        FeatureExtractor.parse("inception-tf:weights=none.pth").open()
    torch.save({"fc.weight": torch.ones(2, 2)}, "other.pth")
    with pytest.raises(DataError, match=r"other\.pth: is no weights file"):
        FeatureExtractor.parse("inception-tf:weights=other.pth").open()
    torch.save({"fc.weight": Payload()}, "bad.pth")
    with pytest.raises(DataError, match="nothing in it was executed"):
        FeatureExtractor.parse("inception-tf:weights=bad.pth").open()
    assert not Path("executed").exists()
    torch.save([1, 2], "list.pth")
    with pytest.raises(DataError, match="give a state dict"):
        FeatureExtractor.parse("inception-tf:weights=list.pth").open()
    forget(monkeypatch)


def test_weights_that_torch_fidelity_fetched_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints" / inception.URL.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    monkeypatch.setattr(inception, "SHA256", features.sha256(place))
    assert inception.released_weights() == place


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right architecture with seeded values; the weights proper are a download of 96 MB."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "seeded.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        buffer = io.BytesIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
            torch.save({}, buffer)
            buffer.seek(0)
            network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=buffer)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.full
def test_inception_gives_torch_fidelitys_own_features(inception_weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    opened = FeatureExtractor.parse(f"inception-tf:weights={inception_weights}").open()
    images = pictures(5, 3, 32, 32)
    ours, logits = opened.features(images)
    expected, expected_logits = theirs(images)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(logits, expected_logits, rtol=1e-5, atol=1e-6)
    assert opened.dim == ours.shape[1] == 2048
    assert torch.equal(opened.features(images.float())[0], ours), "whole pixels are the same as floats"
    moved, _ = opened.features((images.float() + 0.4).clamp(max=255))
    assert not torch.equal(moved, ours)


@pytest.mark.full
def test_inceptions_distance_is_torch_fidelitys(inception_weights: Path, tmp_path: Path) -> None:
    """A folder of real digits against another, by `ddpm evaluate` and by torch-fidelity: FID, KID's features, IS."""
    import torch_fidelity
    from PIL import Image

    from ddpm import runs
    from ddpm.config import DataConfig
    from ddpm.data import load_dataset

    digits = load_dataset(DataConfig(dataset="digits", split="all")).images
    for k in range(48):
        path = tmp_path / "ab"[k // 24] / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits[k, 0]).convert("RGB").save(path)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True, isc_splits=1, cuda=False, batch_size=16,
        feature_extractor_weights_path=str(inception_weights), cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    found = runs.evaluate(
        tmp_path / "a", reference=tmp_path / "b", extractor=f"inception-tf:weights={inception_weights}", metrics=["fd", "is"],
        splits=1, out=tmp_path / "out", quiet=True,
    )  # fmt: skip
    fd, score = (found.record["values"][name] for name in sorted(found.record["values"]))
    assert fd["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert score["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)


# dinov2 and clip


def seeded(shapes: dict[str, tuple[int, ...]], factor: float = 0.05) -> dict[str, Tensor]:
    """Weights as a function of their place in the sorted list of names alone; those that scale are around 1."""
    return {
        name: Stream(7, torch.tensor([index])).normal(*shapes[name])[0] * factor
        + float(re.search(r"norm\d?\.weight|scale\d", name) is not None)
        for index, name in enumerate(sorted(shapes))
    }


DIM, DEPTH, PATCH = 128, 2, 56
DINOV2 = {
    "embeddings.cls_token": (1, 1, DIM),
    "embeddings.mask_token": (1, DIM),
    "embeddings.position_embeddings": (1, 17, DIM),
    "embeddings.patch_embeddings.projection.weight": (DIM, 3, PATCH, PATCH),
    "embeddings.patch_embeddings.projection.bias": (DIM,),
    "layernorm.weight": (DIM,),
    "layernorm.bias": (DIM,),
}
CLIP = {
    "vision_model.embeddings.class_embedding": (DIM,),
    "vision_model.embeddings.position_embedding.weight": (17, DIM),
    "vision_model.embeddings.patch_embedding.weight": (DIM, 3, PATCH, PATCH),
    "visual_projection.weight": (32, DIM),
    "text_projection.weight": (32, 8),
    "logit_scale": (1,),
}
for norm in ("pre_layrnorm", "post_layernorm"):
    CLIP |= {f"vision_model.{norm}.{part}": (DIM,) for part in ("weight", "bias")}
for layer in range(DEPTH):
    for name, out, into in (("fc1", 4 * DIM, DIM), ("fc2", DIM, 4 * DIM)):
        DINOV2 |= {
            f"encoder.layer.{layer}.mlp.{name}.weight": (out, into),
            f"encoder.layer.{layer}.mlp.{name}.bias": (out,),
        }
        at = f"vision_model.encoder.layers.{layer}.mlp.{name}"
        CLIP |= {f"{at}.weight": (out, into), f"{at}.bias": (out,)}
    for name in (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    ):
        DINOV2 |= {f"encoder.layer.{layer}.{name}.weight": (DIM, DIM), f"encoder.layer.{layer}.{name}.bias": (DIM,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        at = f"vision_model.encoder.layers.{layer}.self_attn.{name}"
        CLIP |= {f"{at}.weight": (DIM, DIM), f"{at}.bias": (DIM,)}
    for number in (1, 2):
        DINOV2 |= {f"encoder.layer.{layer}.norm{number}.{part}": (DIM,) for part in ("weight", "bias")}
        DINOV2 |= {f"encoder.layer.{layer}.layer_scale{number}.lambda1": (DIM,)}
        CLIP |= {
            f"vision_model.encoder.layers.{layer}.layer_norm{number}.{part}": (DIM,) for part in ("weight", "bias")
        }

# transformers 5.23.0, Dinov2Model and CLIPVisionModelWithProjection with the weights of `seeded`: the first three
# features of two images.
GOLDEN = {
    "dinov2": [[0.5565094, -0.6730355, 0.7019535], [0.8959031, 0.0120705, 0.1762282]],
    "clip": [[0.8839870, 0.5334219, -0.1873481], [0.8746496, 0.4911393, -0.2789005]],
}


@pytest.mark.parametrize(("name", "shapes"), [("dinov2", DINOV2), ("clip", CLIP)])
def test_transformers_agree_with_hugging_faces(name: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    save_file(seeded(shapes), tmp_path / "model.safetensors")
    opened = FeatureExtractor.parse(f"{name}:weights={tmp_path / 'model.safetensors'}").open()
    found, logits = opened.features(pictures(2, 3, 224, 224))
    assert np.allclose(found[:, :3], GOLDEN[name], atol=2e-5)
    assert (opened.name, opened.dim, logits) == (name, {"dinov2": DIM, "clip": 32}[name], None)


def test_dinov2_in_its_authors_names_is_the_same_network(tmp_path: Path) -> None:
    theirs = seeded(DINOV2)
    own = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "mask_token": theirs["embeddings.mask_token"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    for part in ("weight", "bias"):
        own[f"patch_embed.proj.{part}"] = theirs[f"embeddings.patch_embeddings.projection.{part}"]
        for layer in range(DEPTH):
            at, to = f"encoder.layer.{layer}", f"blocks.{layer}"
            own |= {f"{to}.norm{n}.{part}": theirs[f"{at}.norm{n}.{part}"] for n in (1, 2)}
            own |= {f"{to}.mlp.fc{n}.{part}": theirs[f"{at}.mlp.fc{n}.{part}"] for n in (1, 2)}
            own |= {f"{to}.ls{n}.gamma": theirs[f"{at}.layer_scale{n}.lambda1"] for n in (1, 2)}
            own[f"{to}.attn.proj.{part}"] = theirs[f"{at}.attention.output.dense.{part}"]
            own[f"{to}.attn.qkv.{part}"] = torch.cat(
                [theirs[f"{at}.attention.attention.{kind}.{part}"] for kind in ("query", "key", "value")]
            )
    torch.save(own, tmp_path / "own.pth")
    save_file(theirs, tmp_path / "theirs.safetensors")
    images = pictures(2, 3, 32, 32)
    first, second = (
        FeatureExtractor.parse(f"dinov2:weights={tmp_path / name}").open().features(images)[0]
        for name in ("own.pth", "theirs.safetensors")
    )
    assert torch.equal(first, second)


def cubic(grid: int, side: int, scale: float) -> Tensor:
    """(side, grid): convolution with Keys' cubic, a = -0.75, the edge repeated."""
    weights = torch.zeros(side, grid)
    for row in range(side):
        place = (row + 0.5) / scale - 0.5
        for column in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - column)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(column, 0), grid - 1)] += near if x <= 1 else far
    return weights


def test_positions_are_interpolated_as_dinov2s_code_does() -> None:
    """Not by 16 / 37 but by 16.1 / 37."""
    learnt = Stream(1, torch.arange(1 + 37**2)).normal(2)
    found = pretrained._interpolated(learnt, 16)
    along = cubic(37, 16, 16.1 / 37)
    expected = torch.einsum("ri,sj,ijc->rsc", along, along, learnt[1:].reshape(37, 37, 2))
    assert torch.equal(found[0], learnt[0])
    assert torch.allclose(found[1:].reshape(16, 16, 2), expected, atol=1e-5)
    assert torch.equal(pretrained._interpolated(learnt, 37), learnt)


def test_transformers_without_weights_or_with_others(tmp_path: Path) -> None:
    for name in ("dinov2", "clip"):
        with pytest.raises(ConfigError, match=f"--weights FILE or --extractor {name}:weights=FILE; take "):
            FeatureExtractor.parse(name).open()
        save_file({"w12.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(DataError, match=f"does not hold the weights of {name}"):
            FeatureExtractor.parse(f"{name}:weights={tmp_path / 'other.safetensors'}").open()


def test_the_default_is_tiny_cnn_where_its_weights_are_shipped() -> None:
    assert tiny_cnn.default_extractor("cifar10") == "inception-tf"
    for name in tiny_cnn.shipped():
        assert tiny_cnn.default_extractor(name) == f"tiny-cnn:data={name}"
