"""`dinov2` and `clip`: vision transformers, built here and given weights out of a local file; no hub, no remote code.

Both are the pre-norm transformer of Dosovitskiy et al. (2021), with heads of 64 channels. The protocol of FD-DINOv2 is
that of Stein et al. (2023): 224x224, bicubic with antialiasing, the class token of ViT-L/14.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.features import (
    IMAGENET,
    OPENAI_CLIP,
    FeatureExtractor,
    Features,
    Output,
    in_words,
    resized,
    standardised,
)
from ddpm.evaluation.inception import read_weights
from ddpm.files import reason, sha256
from ddpm.registry import register

SIZE = 224
_HEAD = 64


class _Block(nn.Module):
    """Attention, then two linear layers, each after a layer norm and (DINOv2) before a learnt scale."""

    def __init__(self, dim: int, eps: float, scaled: bool, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.scale1 = nn.Parameter(torch.ones(dim)) if scaled else 1.0
        self.scale2 = nn.Parameter(torch.ones(dim)) if scaled else 1.0

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, _HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.out(mixed)
        h = self.fc1(self.norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h)
        return x + self.scale2 * self.fc2(h)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Standardised images (B, 3, 224, 224) -> the class token's features (B, D).

    Args:
        dim, depth, patch: channels, blocks, side of a patch.
        grid: patches along a side where the position embeddings were learnt.
        projection: CLIP's last linear layer has so many outputs; None makes the network DINOv2's.
    """

    def __init__(self, dim: int, depth: int, patch: int, grid: int, projection: int | None = None) -> None:
        super().__init__()
        clip = projection is not None
        eps = 1e-5 if clip else 1e-6
        self.patch = nn.Conv2d(3, dim, patch, stride=patch, bias=not clip)
        self.token = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros(1 + grid**2, dim))
        self.before = nn.LayerNorm(dim, eps) if clip else nn.Identity()
        self.blocks = nn.Sequential(*(_Block(dim, eps, scaled=not clip, quick=clip) for _ in range(depth)))
        self.after = nn.LayerNorm(dim, eps)
        self.projection = nn.Linear(dim, projection, bias=False) if projection is not None else nn.Identity()
        self.dim = projection or dim

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images)
        positions = _interpolated(self.positions, x.shape[-1])
        x = torch.cat([self.token.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1) + positions
        return self.projection(self.after(self.blocks(self.before(x))[:, 0]))  # type: ignore[no-any-return]


def _interpolated(positions: Tensor, side: int) -> Tensor:
    """Position embeddings for a grid of another side: bicubic, with the 0.1 that DINOv2's code adds to the side."""
    grid = round((len(positions) - 1) ** 0.5)
    if grid == side:
        return positions
    square = positions[1:].unflatten(0, (grid, grid)).permute(2, 0, 1)[None]
    moved = F.interpolate(square, scale_factor=(side + 0.1) / grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], moved[0].flatten(1).T])


_DINOV2 = (
    (r"^(?:module\.|backbone\.|dinov2\.)+", ""),
    (r"^(?:embeddings\.)?cls_token$", "token"),
    (r"^(?:pos_embed|embeddings\.position_embeddings)$", "positions"),
    (r"^(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.", "patch."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attn\.proj\.", ".out."),
    (r"\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".out."),
    (r"\.(?:ls|layer_scale)(\d)\.(?:gamma|lambda1)$", r".scale\1"),
    (r"\.mlp\.", "."),
    (r"^(?:layernorm|norm)\.", "after."),
)
_CLIP = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "token"),
    (r"^embeddings\.position_embedding\.weight$", "positions"),
    (r"^embeddings\.patch_embedding\.", "patch."),
    (r"^pre_layrnorm\.", "before."),
    (r"^post_layernorm\.", "after."),
    (r"^visual_projection\.", "projection."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.(q|k|v)_proj\.", r".\1."),
    (r"\.self_attn\.out_proj\.", ".out."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.", "."),
)
"""Names in other programs' files -> names here, one rule after the other."""

_UNUSED = re.compile(r"mask_token|position_ids|^text_|^logit_scale|^head\.|^classifier\.")


def _renamed(tensors: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if not _UNUSED.search(name):
            for pattern, to in rules:
                name = re.sub(pattern, to, name)
            renamed[name] = tensor.float()
    for name in [name for name in renamed if re.search(r"\.q\.(weight|bias)$", name)]:
        parts = [renamed.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return {**renamed, "token": renamed["token"].flatten(), "positions": renamed["positions"].flatten(0, -2)}


def build_transformer(tensors: Mapping[str, Tensor], clip: bool) -> VisionTransformer:
    """The transformer that a state dict belongs to, with its weights; may raise KeyError, RuntimeError or ValueError."""
    renamed = _renamed(tensors, _CLIP if clip else _DINOV2)
    dim, _, patch, _ = renamed["patch.weight"].shape
    if dim % _HEAD:
        raise ValueError(f"its {dim} channels make no heads of {_HEAD}")
    depth = 1 + max(int(found[1]) for name in renamed if (found := re.match(r"blocks\.(\d+)\.", name)))
    grid = round((len(renamed["positions"]) - 1) ** 0.5)
    network = VisionTransformer(dim, depth, patch, grid, len(renamed["projection.weight"]) if clip else None)
    network.load_state_dict(renamed)
    return network.eval().requires_grad_(False)


def _open(extractor: Any, device: torch.device | str, clip: bool) -> Features:
    name, path = extractor.name, extractor.weights
    if path is None:
        raise ConfigError(
            f"the extractor {name} needs weights: --weights FILE or --extractor {name}:weights=FILE; {extractor.where}."
        )
    digest, place = sha256(path), torch.device(device)
    try:
        network = build_transformer(read_weights(path), clip).to(place)
    except (KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: does not hold the weights of {name} ({reason(error)}); {extractor.where}.") from None
    statistics = OPENAI_CLIP if clip else IMAGENET

    def run(images: Tensor) -> Output:
        return network(standardised(resized(images, SIZE), statistics)), None

    return Features(
        name=name,
        spec=extractor.spec,
        network=run,
        dim=network.dim,
        sha256=digest,
        resize=in_words(SIZE),
        chunk=16,
        device=place,
    )


@register("dinov2")
class DinoV2(FeatureExtractor):
    """DINOv2 (Oquab et al. 2023) ViT-S, B or L without registers; weights=FILE, of its authors (.pth) or in Hugging Face's names."""

    weights: Path | None = None

    where = (
        "take dinov2_vitl14_pretrain.pth from github.com/facebookresearch/dinov2, "
        "or model.safetensors of facebook/dinov2-large from Hugging Face"
    )

    def open(self, device: torch.device | str = "cpu") -> Features:
        return _open(self, device, clip=False)


@register("clip")
class Clip(FeatureExtractor):
    """OpenAI's CLIP (Radford et al. 2021), the projected image features of a ViT; weights=FILE in Hugging Face's names."""

    weights: Path | None = None

    where = "take model.safetensors or pytorch_model.bin of openai/clip-vit-large-patch14 from Hugging Face"

    def open(self, device: torch.device | str = "cpu") -> Features:
        return _open(self, device, clip=True)
