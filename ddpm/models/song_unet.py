"""The U-Nets of Song et al. (2021), "Score-based generative modeling through stochastic differential equations", DDPM++
and NCSN++, as Karras et al. (2022), "Elucidating the design space" (EDM), set them up (its appendix F.1, table 7).

Weights have the names of EDM's files (`enc.32x32_block0.conv0.weight`), so that those load by name.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.config import ModelConfig
from ddpm.errors import ConfigError
from ddpm.models.unet import Dropout, check_levels, label_rows, padded, run_block, sinusoids, time_dim, told
from ddpm.randomness import Stream

_HALF = math.sqrt(0.5)
"""What a sum of two branches is multiplied by, to keep its variance."""


class Resample(nn.Module):
    """Halve ("down") or double ("up") height and width with a separable filter; "" leaves them.

    The filter is a buffer, as in EDM's files; that of two equal taps is done as average pooling and repetition.
    """

    resample_filter: Tensor | None

    def __init__(self, how: str, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.how, self.equal, self.margin = how, taps == (1, 1), (len(taps) - 1) // 2
        line = torch.tensor(taps, dtype=torch.float32)
        plane = (line[:, None] * line / line.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", plane if how else None)

    def resample(self, x: Tensor, margin: int | None = None) -> Tensor:
        """x (B, C, H, W); `margin` overrides the zeros put around it, half the filter."""
        if self.resample_filter is None:
            return x
        if self.equal:
            return F.avg_pool2d(x, 2) if self.how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        channels, margin = x.shape[1], self.margin if margin is None else margin
        weight = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.how == "down":
            return F.conv2d(x, weight, stride=2, padding=margin, groups=channels)
        return F.conv_transpose2d(x, 4 * weight, stride=2, padding=margin, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W)."""
        return self.resample(x)


class Conv(Resample):
    """A convolution after the resampling; with `first`, before it (the filter's zeros are then put around the image)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        gain: float = 1.0,
        how: str = "",
        taps: tuple[int, ...] = (1, 1),
        first: bool = False,
    ) -> None:
        super().__init__(how, taps)
        self.in_channels, self.first = in_channels, first
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W)."""
        around = self.weight.shape[-1] // 2
        if self.first:
            return self.resample(F.conv2d(x, self.weight, self.bias, padding=around + self.margin), margin=0)
        return F.conv2d(self.resample(x), self.weight, self.bias, padding=around)


def make_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A Glorot-uniform linear layer with a bias of zero."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def make_norm(config: ModelConfig, channels: int) -> nn.GroupNorm:
    """Group norm with at most `norm_groups` groups of at least four channels."""
    most = max(1, min(config.norm_groups, channels // 4))
    return nn.GroupNorm(max(n for n in range(1, most + 1) if channels % n == 0), channels, eps=1e-6)


class Block(nn.Module):
    """norm, SiLU, convolution, the embedding's shift, norm, SiLU, dropout, convolution; then attention where asked.

    how: "down" or "up" makes the first convolution and the skip resample.
    """

    def __init__(
        self, config: ModelConfig, index: int, channels: tuple[int, int], attention: bool = False, how: str = ""
    ) -> None:
        super().__init__()
        (self.in_channels, out_channels), taps = channels, config.resample_filter
        if attention and out_channels % config.heads:
            raise ConfigError(
                f"--model.heads={config.heads} does not divide the {out_channels} channels of an attention level."
            )
        self.heads = config.heads
        self.norm0 = make_norm(config, self.in_channels)
        self.conv0 = Conv(self.in_channels, out_channels, 3, how=how, taps=taps)
        self.affine = make_linear(time_dim(config), out_channels)
        self.norm1 = make_norm(config, out_channels)
        self.drop = Dropout(config.dropout, index)
        self.conv1 = Conv(out_channels, out_channels, 3, gain=1e-5)
        changes = how or self.in_channels != out_channels
        self.skip = Conv(self.in_channels, out_channels, 1, how=how, taps=taps) if changes else nn.Identity()
        self.norm2 = make_norm(config, out_channels) if attention else None
        if attention:
            self.qkv = Conv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x: Tensor, embedding: Tensor, stream: Stream | None) -> Tensor:
        """x (B, in_channels, H, W), embedding (B, time_dim)."""
        h: Tensor = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        h = self.conv1(self.drop(F.silu(self.norm1(h)), stream))
        h = (h + self.skip(x)) * _HALF
        return h if self.norm2 is None else (h + self._mixed(self.norm2(h))) * _HALF

    def _mixed(self, h: Tensor) -> Tensor:
        """Self-attention over the pixels; q, k and v alternate along the channels of `qkv`."""
        qkv = self.qkv(h).flatten(2).unflatten(1, (self.heads, -1, 3))  # (B, heads, c, 3, pixels)
        q, k, v = qkv.transpose(2, -1).unbind(3)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(h.shape)
        return self.proj(mixed)  # type: ignore[no-any-return]


class Fourier(nn.Module):
    """Random Fourier features, [sin | cos], of frequencies that stay as drawn (Song et al. 2021, appendix C.1: scale 16)."""

    freqs: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16.0 * torch.randn(features // 2))

    def forward(self, noise_label: Tensor) -> Tensor:
        """(B,) -> (B, features)."""
        angles = 2.0 * math.pi * noise_label[:, None] * self.freqs
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class SongUNet(nn.Module):
    """network(x, noise_label, condition) -> output: DDPM++ by default, NCSN++ with fourier, encoder=residual and
    resample_filter=1,3,3,1.

    Args:
        config: the architecture. Attention is as in EDM: in every encoder block of
            its levels, in the last decoder block of each, and in the middle.
        in_channels, out_channels: of the images, and of the output.
        num_labels: rows of the label embedding (classes, plus one for "no label" where labels are dropped); 0: none.
    """

    UNUSED = frozenset(
        {"head_channels", "time_embedding", "time_exponent", "activation", "norm", "norm_groups_exact", "norm_eps"}
        | {"scale_shift", "resample", "down_padding", "initialisation"}
    )
    """Fields of ModelConfig that it does not have."""

    def __init__(self, config: ModelConfig, in_channels: int, out_channels: int, num_labels: int = 0) -> None:
        super().__init__()
        _check(config)
        self.config, self.num_labels = config, num_labels if config.conditioning == "global" else 0
        width, dim = config.channels * (2 if config.fourier else 1), time_dim(config)
        self.map_noise = Fourier(width) if config.fourier else None
        self.map_label = make_linear(self.num_labels, width) if self.num_labels else None
        self.map_augment = make_linear(config.augment_labels, width, bias=False) if config.augment_labels else None
        self.map_layer0, self.map_layer1 = make_linear(width, dim), make_linear(dim, dim)
        self._blocks = 0
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._make_decoder(self._make_encoder(in_channels), out_channels)

    def _name(self, level: int) -> str:
        halved = 2 ** (len(self.config.channel_mults) - 1)
        size = -(-(self.config.resolution or 32) // halved) * halved >> level  # of the padded image
        return f"{size}x{size}"

    def _block(self, in_channels: int, out_channels: int, attention: bool = False, how: str = "") -> Block:
        self._blocks += 1
        return Block(self.config, self._blocks, (in_channels, out_channels), attention, how)

    def _make_encoder(self, in_channels: int) -> list[int]:
        """The way down; returns the channels of what it hands to the way up."""
        config, taps, image = self.config, self.config.resample_filter, in_channels
        self.enc[f"{self._name(0)}_conv"] = Conv(in_channels, config.channels, 3)
        skips = [config.channels]
        for level, mult in enumerate(config.channel_mults):
            name, channels = self._name(level), skips[-1]
            if level:
                self.enc[f"{name}_down"] = self._block(channels, channels, how="down")
                skips.append(channels)
            if level and config.encoder == "skip":
                self.enc[f"{name}_aux_down"] = Resample("down", taps)
                self.enc[f"{name}_aux_skip"] = Conv(image, channels, 1)
            if level and config.encoder == "residual":
                self.enc[f"{name}_aux_residual"] = Conv(image, channels, 3, how="down", taps=taps, first=True)
                image = channels
            for i in range(config.blocks):
                self.enc[f"{name}_block{i}"] = self._block(
                    skips[-1], config.channels * mult, attention=level in config.attention
                )
                skips.append(config.channels * mult)
        return skips

    def _make_decoder(self, skips: list[int], out_channels: int) -> None:
        config, channels, last = self.config, skips[-1], len(self.config.channel_mults) - 1
        for level, mult in reversed(list(enumerate(config.channel_mults))):
            name = self._name(level)
            if level == last:
                self.dec[f"{name}_in0"] = self._block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = self._block(channels, channels)
            else:
                self.dec[f"{name}_up"] = self._block(channels, channels, how="up")
            for i in range(config.blocks + 1):
                attention = i == config.blocks and level in config.attention
                self.dec[f"{name}_block{i}"] = self._block(channels + skips.pop(), config.channels * mult, attention)
                channels = config.channels * mult
            if config.decoder == "skip" and level < last:
                self.dec[f"{name}_aux_up"] = Resample("up", config.resample_filter)
            if config.decoder == "skip" or level == 0:
                self.dec[f"{name}_aux_norm"] = make_norm(config, channels)
                self.dec[f"{name}_aux_conv"] = Conv(channels, out_channels, 3, gain=1e-5)

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        condition: Tensor | None = None,
        stream: Stream | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Denoise; arguments and result as for `ddpm.models.unet.UNet`."""
        x, (rows, columns) = padded(x, len(self.config.channel_mults))
        embedding = self._embed(noise_label.float(), label_rows(condition, self.num_labels), augment)
        h, skips = self._encode(x, embedding, stream)
        return self._decode(h, skips, embedding, stream)[..., rows, columns]

    def _embed(self, noise_label: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        if self.map_noise is not None:
            h = self.map_noise(noise_label)
        else:
            h = sinusoids(noise_label, self.config.channels, exponent="half-1")
        if self.map_label is not None and labels is not None:
            one_hot = F.one_hot(labels, self.num_labels).to(h.dtype)
            h = h + self.map_label(one_hot * math.sqrt(self.num_labels))
        if self.map_augment is not None:
            h = h + self.map_augment(told(augment, self.map_augment, len(h)))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(h))))

    def _encode(self, x: Tensor, embedding: Tensor, stream: Stream | None) -> tuple[Tensor, list[Tensor]]:
        h, image, skips = x, x, list[Tensor]()
        for name, layer in self.enc.items():
            if name.endswith("_aux_down"):
                image = layer(image)
            elif name.endswith("_aux_skip"):
                h = skips[-1] = h + layer(image)
            elif name.endswith("_aux_residual"):
                h = image = skips[-1] = (h + layer(image)) * _HALF
            else:
                h = self._apply_layer(layer, h, embedding, stream)
                skips.append(h)
        return h, skips

    def _decode(self, h: Tensor, skips: list[Tensor], embedding: Tensor, stream: Stream | None) -> Tensor:
        image: Tensor | None = None
        for name, layer in self.dec.items():
            if name.endswith("_aux_up"):
                image = layer(image)
            elif name.endswith("_aux_norm"):
                normed = layer(h)
            elif name.endswith("_aux_conv"):
                image = layer(F.silu(normed)) if image is None else layer(F.silu(normed)) + image
            else:
                h = torch.cat([h, skips.pop()], dim=1) if "_block" in name else h
                h = self._apply_layer(layer, h, embedding, stream)
        assert image is not None
        return image

    def _apply_layer(self, layer: nn.Module, h: Tensor, embedding: Tensor, stream: Stream | None) -> Tensor:
        return run_block(self.config, layer, stream, h, embedding) if isinstance(layer, Block) else layer(h)


def _check(config: ModelConfig) -> None:
    check_levels(config)
    if config.conditioning == "block":
        raise ConfigError("--model.conditioning=block: song-unet hears classes with the noise level; use global.")
    if len(config.resample_filter) % 2:
        raise ConfigError(
            f"--model.resample-filter={','.join(map(str, config.resample_filter))} has an odd number of taps; "
            "halving needs an even one, such as 1,1 or 1,3,3,1."
        )
