"""The U-Net of the DDPM family: Ho et al. (2020), and by options those of its descendants.

    x -> stem -> [blocks, down] per level -> middle -> [blocks, up] per level -> head

Every residual block hears the noise level, and where asked the class. Skips join the way down to the way up.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm.config import ModelConfig
from ddpm.errors import ConfigError
from ddpm.randomness import Stream, quantised

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "mish": F.mish, "gelu": F.gelu}


def sinusoids(t: Tensor, dim: int, layout: str = "sin-cos", exponent: str = "half") -> Tensor:
    """(B,) noise labels -> (B, dim) float32 sines and cosines of t 10000^(-i / n) (Vaswani et al. 2017, section 3.5).

    n is dim / 2 for `half`, dim / 2 - 1 for `half-1`. The layout is [sin | cos], [cos | sin] or interleaved
    (sin, cos, sin, cos, ...). An odd dim ends in a zero.
    """
    half = dim // 2
    n = half if exponent == "half" else max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / n))
    angles = t.float()[:, None] * frequencies
    sin, cos = angles.sin(), angles.cos()
    if layout == "interleaved":
        embedded = torch.stack([sin, cos], dim=-1).flatten(1)
    else:
        embedded = torch.cat([sin, cos] if layout == "sin-cos" else [cos, sin], dim=-1)
    return F.pad(embedded, (0, dim - 2 * half))


def make_norm(config: ModelConfig, channels: int) -> nn.Module:
    """The configured normalisation; group norm falls back to as many groups as divide the channels."""
    if config.norm == "group":
        return _group_norm(config, math.gcd(config.norm_groups, channels), channels)
    if config.norm == "instance":
        return nn.InstanceNorm2d(channels, eps=config.norm_eps)
    if config.norm == "batch":
        return nn.BatchNorm2d(channels, eps=config.norm_eps)
    return nn.Identity()


def make_shifted_norm(config: ModelConfig, channels: int) -> nn.Module:
    """The norm over an added embedding: group norm has at least two channels a group, since a group of one takes out
    whatever constant was added to it; `norm_groups_exact` leaves the number as it is."""
    groups = math.gcd(config.norm_groups, channels)
    if config.norm != "group" or groups < channels or config.norm_groups_exact:
        return make_norm(config, channels)
    return _group_norm(config, max(d for d in range(1, channels // 2 + 1) if channels % d == 0), channels)


def _group_norm(config: ModelConfig, groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=config.norm_eps)


class Downsample(nn.Module):
    """Halve height and width: a strided 3x3 convolution, or 2x2 average pooling without parameters."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.asymmetric = config.down_padding == "asymmetric"
        self.conv = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.asymmetric else 1)
            if config.resample == "conv"
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then for `conv` a 3x3 convolution."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if config.resample == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input (Ho et al. 2020, appendix B)."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        if config.head_channels and channels % config.head_channels:
            raise ConfigError(
                f"--model.head-channels={config.head_channels} does not divide the {channels} channels of an attention level."
            )
        self.heads = channels // config.head_channels if config.head_channels else config.heads
        if channels % self.heads:
            raise ConfigError(
                f"--model.heads={self.heads} does not divide the {channels} channels of an attention level."
            )
        self.norm = make_norm(config, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))  # (B, 3, heads, c, pixels)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return x + self.out(mixed)  # type: ignore[no-any-return]


class Dropout(nn.Module):
    """Dropout whose masks come from the batch's stream; `index` tells the layers of a network apart."""

    def __init__(self, probability: float, index: int) -> None:
        super().__init__()
        self.probability, self.purpose = probability, f"dropout/{index}"

    def forward(self, h: Tensor, stream: Stream | None) -> Tensor:
        """h (B, ...); without a stream the masks come from PyTorch's global generator."""
        if not (self.training and self.probability):
            return h
        if stream is None:
            return F.dropout(h, self.probability)
        dropped = stream.at(self.purpose).bernoulli(self.probability, *h.shape[1:])
        return h.masked_fill(dropped, 0.0) / (1.0 - quantised(self.probability))


class ResBlock(nn.Module):
    """norm, activation, convolution, embeddings, norm, activation, dropout, convolution; then attention where asked.

    resample: "down" or "up" makes the block halve or double its input, as in guided diffusion (Dhariwal & Nichol 2021).

    Instance norm subtracts each channel's mean, and with it an embedding added before: there the embedding is added
    after the second norm, where other implementations that offer instance norm add it before and lose it. Group norm
    with as many groups as channels would do the same, so the second norm then has fewer groups (`make_shifted_norm`).
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        in_channels: int,
        out_channels: int,
        num_labels: int,
        attention: bool = False,
        resample: str = "",
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]
        self.drop = Dropout(config.dropout, index)
        self.scale_shift, self.resample = config.scale_shift, resample
        self.shift_last = config.norm == "instance"
        self.norm1 = make_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim(config), out_channels * (2 if config.scale_shift else 1))
        self.label = nn.Embedding(num_labels, out_channels) if config.conditioning == "block" and num_labels else None
        self.norm2 = (make_norm if config.scale_shift else make_shifted_norm)(config, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(config, out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None, stream: Stream | None) -> Tensor:
        """x (B, C, H, W), time (B, time_dim) already activated, labels (B,) indices or None."""
        h = self.activation(self.norm1(x))
        if self.resample:
            h, x = _resize(h, self.resample), _resize(x, self.resample)
        h = self.conv1(h)
        shift = self.time(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            if self.label is not None:
                assert labels is not None
                shift = shift + self.label(labels)[:, :, None, None]
            h = self.norm2(h) + shift if self.shift_last else self.norm2(h + shift)
        h = self.drop(self.activation(h), stream)
        return self.attention(self.skip(x) + self.conv2(h))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """network(x, noise_label, condition) -> output.

    Args:
        config: the architecture.
        in_channels, out_channels: of the images, and of the output.
        num_labels: rows of the label embedding (classes, plus one for "no label" where labels are dropped); 0: none.
    """

    UNUSED = frozenset({"fourier", "encoder", "decoder", "resample_filter", "resolution"})
    """Fields of ModelConfig that it does not have."""

    def __init__(self, config: ModelConfig, in_channels: int, out_channels: int, num_labels: int = 0) -> None:
        super().__init__()
        _check(config)
        self.config, self.num_labels = config, num_labels
        width, dim = config.channels, time_dim(config)
        self.time = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_labels, dim) if config.conditioning == "global" and num_labels else None
        self.augment = nn.Linear(config.augment_labels, width, bias=False) if config.augment_labels else None
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.activation = _ACTIVATIONS[config.activation]
        self._blocks = 0
        channels = self._make_down(width)
        self.middle = nn.ModuleList(
            [self._block(channels[-1], channels[-1], attention=True), self._block(channels[-1], channels[-1])]
        )
        self._make_up(channels)
        self.norm = make_norm(config, width * config.channel_mults[0])
        self.head = nn.Conv2d(width * config.channel_mults[0], out_channels, 3, padding=1)
        initialise(self, config.initialisation)

    def _block(self, in_channels: int, out_channels: int, attention: bool = False, resample: str = "") -> ResBlock:
        self._blocks += 1
        return ResBlock(self.config, self._blocks, in_channels, out_channels, self.num_labels, attention, resample)

    def _make_down(self, width: int) -> list[int]:
        config, last, channels = self.config, len(self.config.channel_mults) - 1, [width]
        self.down = nn.ModuleList()
        for level, mult in enumerate(config.channel_mults):
            stage: list[nn.Module] = []
            for _ in range(config.blocks):
                stage.append(self._block(channels[-1], width * mult, level in config.attention))
                channels.append(width * mult)
            if level != last:
                stage.append(
                    self._block(channels[-1], channels[-1], resample="down")
                    if config.resample == "block"
                    else Downsample(config, channels[-1])
                )
                channels.append(channels[-1])
            self.down.append(nn.ModuleList(stage))
        return channels

    def _make_up(self, skips: list[int]) -> None:
        """Levels in the order they run: the deepest first."""
        config, channels, skips = self.config, skips[-1], list(skips)
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mults))):
            stage: list[nn.Module] = []
            for _ in range(config.blocks + 1):
                stage.append(self._block(channels + skips.pop(), config.channels * mult, level in config.attention))
                channels = config.channels * mult
            if level:
                stage.append(
                    self._block(channels, channels, resample="up")
                    if config.resample == "block"
                    else Upsample(config, channels)
                )
            self.up.append(nn.ModuleList(stage))

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        condition: Tensor | None = None,
        stream: Stream | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Denoise.

        Args:
            x: (B, C, H, W) of any height and width; sizes the levels cannot halve are padded, and the output cropped.
            noise_label: (B,) float.
            condition: (B,) int64 class labels; -1 is "no label" (the last row of the embedding). None without classes.
            stream: where dropout masks come from in training; None falls back to PyTorch's global generator.
            augment: (B, augment_labels) what was done to the images in training; None: nothing, the same as zeros.

        Returns:
            (B, out_channels, H, W).
        """
        x, (rows, columns) = padded(x, len(self.config.channel_mults))
        labels = None if self.config.conditioning == "none" else label_rows(condition, self.num_labels)
        embedded = sinusoids(noise_label, self.config.channels, self.config.time_embedding, self.config.time_exponent)
        if self.augment is not None:
            embedded = embedded + self.augment(told(augment, self.augment, len(x)))
        time = self.time(embedded)
        if self.label is not None and labels is not None:
            time = time + self.label(labels)
        return self._run(x, self.activation(time), labels, stream)[..., rows, columns]

    def _run(self, x: Tensor, time: Tensor, labels: Tensor | None, stream: Stream | None) -> Tensor:
        h = self.stem(x)
        skips = [h]
        for stage in self.down:
            for layer in stage:  # type: ignore[attr-defined]
                h = self._apply_layer(layer, h, time, labels, stream)
                skips.append(h)
        for layer in self.middle:
            h = self._apply_layer(layer, h, time, labels, stream)
        for stage in self.up:
            for layer in stage:  # type: ignore[attr-defined]
                if isinstance(layer, ResBlock) and not layer.resample:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = self._apply_layer(layer, h, time, labels, stream)
        return self.head(self.activation(self.norm(h)))  # type: ignore[no-any-return]

    def _apply_layer(
        self, layer: nn.Module, h: Tensor, time: Tensor, labels: Tensor | None, stream: Stream | None
    ) -> Tensor:
        if not isinstance(layer, ResBlock):
            return layer(h)  # type: ignore[no-any-return]
        return run_block(self.config, layer, stream, h, time, labels)


def time_dim(config: ModelConfig) -> int:
    """Width of the time embedding."""
    return config.time_dim or 4 * config.channels


def initialise(network: nn.Module, how: str) -> None:
    """Set the first weights. "ddpm": Glorot-uniform, with gain 1e-5 on the last layer of each branch (Ho et al. 2020, code);
    "xavier": Glorot-uniform everywhere; "torch": left as PyTorch made them; "zero": the same, but zero in those last layers
    (Nichol & Dhariwal 2021, code). Biases are zero in the first two."""
    last_of: dict[type, str] = {ResBlock: "conv2", Attention: "out", UNet: "head"}
    last = [getattr(module, last_of[type(module)]) for module in network.modules() if type(module) in last_of]
    if how == "zero":
        for parameter in (parameter for layer in last for parameter in layer.parameters()):
            nn.init.zeros_(parameter)
    if how in ("torch", "zero"):
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if how == "ddpm":
        for module in network.modules():
            if isinstance(module, Attention):
                for weight in module.qkv.weight.chunk(3):  # three layers in one: each by its own fan-out
                    nn.init.xavier_uniform_(weight)
        for layer in last:
            nn.init.xavier_uniform_(layer.weight, gain=1e-5)


def check_levels(config: ModelConfig) -> None:
    """Raise ConfigError for attention at a level that is not there, or a width that cannot hold the noise level."""
    levels = len(config.channel_mults)
    if config.channels < 2:
        raise ConfigError(
            f"--model.channels={config.channels} is too few: the sinusoids of the noise level need at least 2."
        )
    if wrong := [level for level in config.attention if level >= levels]:
        raise ConfigError(
            f"--model.attention={wrong[0]} is no level: --model.channel-mults makes levels 0 to {levels - 1}."
        )


def _check(config: ModelConfig) -> None:
    check_levels(config)
    if config.conditioning == "block" and config.scale_shift:
        raise ConfigError("--model.conditioning=block cannot go with --model.scale-shift: use global conditioning.")


def _resize(x: Tensor, how: str) -> Tensor:
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


def padded(x: Tensor, levels: int) -> tuple[Tensor, tuple[slice, slice]]:
    """Images with zeros around them, so that `levels` levels can halve both sides; and where the images lie in it."""
    height, width = x.shape[-2:]
    multiple = 2 ** (levels - 1)
    top, left = (-height % multiple) // 2, (-width % multiple) // 2
    x = F.pad(x, (left, -width % multiple - left, top, -height % multiple - top))
    return x, (slice(top, top + height), slice(left, left + width))


def label_rows(condition: Tensor | None, num_labels: int) -> Tensor | None:
    """Rows of the label embedding: (B,) class labels with -1 as the last row; None without labels."""
    if not num_labels:
        return None
    assert condition is not None, "a conditional network needs labels; -1 stands for none"
    return torch.where(condition < 0, num_labels - 1, condition)


def told(augment: Tensor | None, layer: nn.Linear, n: int) -> Tensor:
    """(n, augment_labels): what was done to images, zeros for None. So no weight is ever without a gradient, which
    data-parallel training would take for a mistake."""
    return layer.weight.new_zeros(n, layer.in_features) if augment is None else augment


def run_block(config: ModelConfig, block: nn.Module, stream: Stream | None, *inputs: Tensor | None) -> Tensor:
    """block(*inputs, stream); with gradient checkpointing its activations are made again in the backward pass."""
    if config.gradient_checkpointing and torch.is_grad_enabled():
        result: Any = checkpoint(block, *inputs, stream, use_reentrant=False, preserve_rng_state=stream is None)
        return result  # type: ignore[no-any-return]
    return block(*inputs, stream)  # type: ignore[no-any-return]
