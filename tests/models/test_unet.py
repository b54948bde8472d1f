"""The U-Net against diffusers' with the same weights, and what each option and promise means."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm.config import ModelConfig
from ddpm.errors import ConfigError
from ddpm.models.unet import Attention, ResBlock, UNet, sinusoids
from ddpm.randomness import Stream, quantised

SMALL: dict[str, Any] = {
    "channels": 16,
    "channel_mults": (1, 2, 2),
    "blocks": 1,
    "attention": (1,),
    "norm_groups": 8,
    "dropout": 0.0,
    "initialisation": "torch",
}
CIFAR10 = ModelConfig(channels=128, channel_mults=(1, 2, 2, 2), blocks=2, attention=(1,))


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


def network(num_labels: int = 0, **changes: Any) -> UNet:
    """Every parameter random, the norms' too, so that nothing is left out by being 1 or 0."""
    torch.manual_seed(0)
    unet = UNet(config(**changes), 3, 3, num_labels).eval()
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return unet


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_labels(n: int) -> Tensor:
    return torch.linspace(3.0, 900.0, n)


def stream(n: int, step: int = 0) -> Stream:
    return Stream(0, torch.arange(n), step=step)


def test_the_cifar10_network_of_ho_et_al_has_its_parameters() -> None:
    with torch.device("meta"):
        unet = UNet(CIFAR10, 3, 3)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307


# --- against diffusers


def _tensors(ours: nn.Module, theirs: str, name: str) -> Iterator[tuple[str, Tensor]]:
    for part, tensor in getattr(ours, name).state_dict().items():
        yield f"{theirs}.{part}", tensor


def _resblock(block: ResBlock, theirs: str) -> Iterator[tuple[str, Tensor]]:
    names = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
    if isinstance(block.skip, nn.Conv2d):
        names["skip"] = "conv_shortcut"
    for ours, other in names.items():
        yield from _tensors(block, f"{theirs}.{other}", ours)


def _attention(block: ResBlock, theirs: str) -> Iterator[tuple[str, Tensor]]:
    attention = block.attention
    if not isinstance(attention, Attention):
        return
    yield from _tensors(attention, f"{theirs}.group_norm", "norm")
    for part, weight, bias in zip("qkv", attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True):
        yield f"{theirs}.to_{part}.weight", weight[:, :, 0, 0]
        yield f"{theirs}.to_{part}.bias", bias
    yield f"{theirs}.to_out.0.weight", attention.out.weight[:, :, 0, 0]
    yield f"{theirs}.to_out.0.bias", attention.out.bias


def _stage(stage: Any, theirs: str, sampler: str) -> Iterator[tuple[str, Tensor]]:
    for j, layer in enumerate(stage):
        if isinstance(layer, ResBlock) and not layer.resample:
            yield from _resblock(layer, f"{theirs}.resnets.{j}")
            yield from _attention(layer, f"{theirs}.attentions.{j}")
        elif isinstance(layer, ResBlock):
            yield from _resblock(layer, f"{theirs}.{sampler}.0")
        else:
            yield from _tensors(layer, f"{theirs}.{sampler}.0.conv", "conv")


def diffusers_state(ours: UNet) -> dict[str, Tensor]:
    """Our weights under the names of diffusers' UNet2DModel."""
    state = dict(
        [
            *_tensors(ours.time, "time_embedding.linear_1", "0"),
            *_tensors(ours.time, "time_embedding.linear_2", "2"),
            *_tensors(ours, "conv_in", "stem"),
            *_tensors(ours, "conv_norm_out", "norm"),
            *_tensors(ours, "conv_out", "head"),
        ]
    )
    if ours.label is not None:
        state["class_embedding.weight"] = ours.label.weight
    for i, stage in enumerate(ours.down):
        state |= dict(_stage(stage, f"down_blocks.{i}", "downsamplers"))
    for i, stage in enumerate(ours.up):
        state |= dict(_stage(stage, f"up_blocks.{i}", "upsamplers"))
    for i, block in enumerate(ours.middle):
        assert isinstance(block, ResBlock)
        state |= dict(_resblock(block, f"mid_block.resnets.{i}")) | dict(_attention(block, "mid_block.attentions.0"))
    return state


def diffusers_twin(ours: UNet, **options: Any) -> nn.Module:
    from diffusers import UNet2DModel

    settings, levels = ours.config, len(ours.config.channel_mults)
    with_attention = [level in settings.attention for level in range(levels)]
    twin = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(settings.channels * mult for mult in settings.channel_mults),
        layers_per_block=settings.blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)),
        norm_num_groups=settings.norm_groups,
        **{
            "norm_eps": 1e-5,
            "downsample_padding": 1,
            "freq_shift": 0,
            "flip_sin_to_cos": False,
            "attention_head_dim": None,
            **options,
        },
    )
    twin.load_state_dict(diffusers_state(ours))
    return twin.eval()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"blocks": 2, "attention": (0, 2), "channel_mults": (1, 2, 4)}, {}),
        ({"attention": ()}, {}),
        ({"time_embedding": "cos-sin"}, {"flip_sin_to_cos": True}),
        ({"time_exponent": "half-1"}, {"freq_shift": 1}),
        ({"head_channels": 8}, {"attention_head_dim": 8}),
        ({"heads": 4}, {"attention_head_dim": 8}),
        ({"down_padding": "asymmetric"}, {"downsample_padding": 0}),
        ({"scale_shift": True}, {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}),
        ({"resample": "block", "attention": (0, 1, 2)}, {"downsample_type": "resnet", "upsample_type": "resnet"}),
        ({"conditioning": "global"}, {"num_class_embeds": 5}),
        ({"norm_eps": 1e-2}, {"norm_eps": 1e-2}),
        ({"activation": "mish"}, {"act_fn": "mish"}),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_output_is_that_of_diffusers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    conditional = "conditioning" in ours
    unet = network(5 if conditional else 0, **ours)
    twin = diffusers_twin(unet, **theirs)
    x, t, labels = images(3, 3, 16, 16), noise_labels(3), torch.tensor([0, 4, 2]) if conditional else None
    if ours.get("activation") == "mish":
        twin.conv_act = nn.Mish()  # theirs keeps SiLU before the last layer
    with torch.no_grad():
        found, expected = unet(x, t, labels), twin(x, t, class_labels=labels).sample
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# --- sinusoids


def test_sinusoids_are_those_of_vaswani_et_al() -> None:
    t = torch.tensor([0.0, 1.0, 500.5])
    angles = t[:, None].double() * torch.tensor([10000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(sinusoids(t, 8).double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-4)
    angles = t[:, None].double() * torch.tensor([10000 ** (-i / 3) for i in range(4)], dtype=torch.float64)
    found = sinusoids(t, 8, "cos-sin", "half-1").double()
    torch.testing.assert_close(found, torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=1e-4)


def test_layouts_hold_the_same_numbers() -> None:
    t = noise_labels(5)
    sin, cos = sinusoids(t, 12).chunk(2, dim=1)
    assert torch.equal(sinusoids(t, 12, "cos-sin"), torch.cat([cos, sin], 1))
    interleaved = sinusoids(t, 12, "interleaved")
    assert torch.equal(interleaved[:, 0::2], sin)
    assert torch.equal(interleaved[:, 1::2], cos)
    odd = sinusoids(t, 13)
    assert torch.equal(odd[:, :12], sinusoids(t, 12))
    assert (odd[:, 12] == 0).all()


# --- sizes


@pytest.mark.parametrize(
    ("size", "mults"),
    [((7, 5), (1, 2, 2)), ((28, 28), (1, 2, 2, 2)), ((8, 20), (1, 2)), ((1, 1), (1, 2)), ((33, 16), (1, 1, 1))],
)
@pytest.mark.parametrize("resample", ["conv", "pool", "block"])
def test_any_size_comes_back_as_it_was(size: tuple[int, int], mults: tuple[int, ...], resample: str) -> None:
    unet = network(channel_mults=mults, resample=resample)
    x = images(2, 3, *size)
    with torch.no_grad():
        found = unet(x, noise_labels(2))
    assert found.shape == x.shape
    assert found.isfinite().all()


def test_padding_is_zeros_on_both_sides_and_is_cut_off_again() -> None:
    unet = network()
    x, t = images(1, 3, 6, 9), noise_labels(1)
    padded = torch.zeros(1, 3, 8, 12)
    padded[..., 1:7, 1:10] = x
    with torch.no_grad():
        assert torch.equal(unet(x, t), unet(padded, t)[..., 1:7, 1:10])


# --- options


OPTIONS: dict[str, Any] = {
    "channels": 24,
    "channel_mults": (1, 2, 3),
    "blocks": 2,
    "attention": (0,),
    "heads": 2,
    "head_channels": 4,
    "time_dim": 40,
    "time_embedding": "interleaved",
    "time_exponent": "half-1",
    "activation": "relu",
    "norm": "instance",
    "norm_groups": 4,
    "norm_eps": 0.1,
    "scale_shift": True,
    "resample": "pool",
    "down_padding": "asymmetric",
    "initialisation": "xavier",
}
UNSEEN = {
    "network",
    "dropout",
    "conditioning",
    "augment_labels",
    "gradient_checkpointing",
    "norm_groups_exact",
}  # on their own below


def test_every_field_is_tested() -> None:
    assert set(OPTIONS) | UNSEEN | UNet.UNUSED == set(ModelConfig.model_fields)
    assert not UNet.UNUSED & (set(OPTIONS) | UNSEEN)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_something(name: str) -> None:
    x, t = images(2, 3, 16, 16), noise_labels(2)
    with torch.no_grad():
        assert not torch.allclose(network()(x, t), network(**{name: OPTIONS[name]})(x, t), rtol=1e-3)


def test_the_number_of_groups_is_kept_where_that_is_asked_for() -> None:
    """One channel a group takes the time out again: avoided, unless a network was trained that way."""
    safe, exact = (network(norm_groups=16, norm_groups_exact=value) for value in (False, True))
    groups = [[m.num_groups for m in unet.modules() if isinstance(m, nn.GroupNorm)] for unet in (safe, exact)]
    assert set(groups[1]) == {16} and min(groups[0]) == 8
    x, t = images(2, 3, 16, 16), noise_labels(2)
    with torch.no_grad():
        assert not torch.allclose(safe(x, t), exact(x, t), rtol=1e-3)


@pytest.mark.parametrize("value", ["batch", "none"])
def test_other_norms(value: str) -> None:
    x, t = images(2, 3, 16, 16), noise_labels(2)
    kind = {"batch": nn.BatchNorm2d, "none": nn.GroupNorm}[value]
    unet = network(norm=value)
    assert any(isinstance(module, kind) for module in unet.modules()) == (value == "batch")
    with torch.no_grad():
        assert not torch.allclose(network()(x, t), unet(x, t), rtol=1e-3)


def test_group_norm_has_as_many_groups_as_divide_the_channels() -> None:
    unet = network(channels=24, norm_groups=32)
    assert {module.num_groups for module in unet.modules() if isinstance(module, nn.GroupNorm)} == {8, 16, 32}


def _conditioned(width: int, groups: int, **changes: Any) -> tuple[UNet, Tensor]:
    unet = network(3, channels=width, channel_mults=(1, 2), attention=(), norm_groups=groups, **changes)
    return unet, images(1, 3, 8, 8).expand(2, -1, -1, -1)


BLIND_ALLEYS = [(2, 2), (2, 32), (6, 6), (8, 8), (9, 9), (16, 16), (32, 32), (32, 8)]


@pytest.mark.parametrize("norm", ["group", "instance", "batch", "none"])
@pytest.mark.parametrize(("width", "groups"), BLIND_ALLEYS)
@pytest.mark.parametrize("how", ["none", "global", "block", "scale-shift"])
def test_every_block_hears_the_noise_level_and_the_label(norm: str, width: int, groups: int, how: str) -> None:
    conditioning = "global" if how == "scale-shift" else how
    unet, x = _conditioned(width, groups, norm=norm, conditioning=conditioning, scale_shift=how == "scale-shift")
    heard: list[Tensor] = []
    for module in unet.modules():
        if isinstance(module, ResBlock):
            h = images(1, module.conv1.in_channels, 8, 8).expand(2, -1, -1, -1)
            times = images(2, module.time.in_features)
            labels = torch.tensor([0, 0]) if conditioning == "block" else None
            with torch.no_grad():
                heard.append((module(h, times, labels, None)[0] - module(h, times, labels, None)[1]).abs().max())
    assert min(heard) > 1e-3
    t, label = torch.full((2,), 9.0), torch.tensor([0, 0])
    with torch.no_grad():
        by_time = unet(x, torch.tensor([3.0, 300.0]), label)
        by_label = unet(x, t, torch.tensor([0, 1]))
    assert not torch.allclose(by_time[0], by_time[1], rtol=1e-3, atol=1e-5)
    assert torch.allclose(by_label[0], by_label[1], rtol=1e-3, atol=1e-5) == (how == "none")


@pytest.mark.parametrize(
    ("width", "groups", "expected"), [(32, 32, 16), (8, 8, 4), (8, 32, 4), (9, 9, 3), (7, 7, 1), (32, 8, 8)]
)
def test_the_second_norm_has_two_channels_a_group(width: int, groups: int, expected: int) -> None:
    unet, _ = _conditioned(width, groups)
    block = next(module for module in unet.modules() if isinstance(module, ResBlock))
    assert (block.norm1.num_groups, block.norm2.num_groups) == (min(groups, width), expected)
    scaled, _ = _conditioned(width, groups, scale_shift=True, conditioning="global")
    block = next(module for module in scaled.modules() if isinstance(module, ResBlock))
    assert block.norm2.num_groups == min(groups, width)


def test_one_channel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--model\.channels=1 is too few: .* at least 2\.$"):
        network(channels=1)


@pytest.mark.parametrize("conditioning", ["global", "block"])
def test_labels_matter_and_minus_one_is_the_last_row(conditioning: str) -> None:
    unet = network(4, conditioning=conditioning)
    x, t = images(1, 3, 8, 8).expand(5, -1, -1, -1), torch.full((5,), 9.0)
    with torch.no_grad():
        found = unet(x, t, torch.tensor([0, 1, 2, 3, -1]))
    assert torch.equal(found[3], found[4])
    assert all(not torch.allclose(found[i], found[j], rtol=1e-2) for i in range(4) for j in range(i))


def test_the_network_is_told_of_augmentation() -> None:
    """Zeros are nothing; and without the field the first weights are what they were."""
    unet, (x, t) = network(augment_labels=4), (images(2, 3, 8, 8), noise_labels(2))
    told = images(2, 4)
    with torch.no_grad():
        plain = unet(x, t)
        assert torch.equal(plain, unet(x, t, augment=torch.zeros(2, 4)))
        assert not torch.allclose(plain, unet(x, t, augment=told), rtol=1e-2)
        assert torch.equal(unet(x, t, augment=told)[1], unet(x, t, augment=told * torch.tensor([[0.0], [1.0]]))[1])
    assert set(unet.state_dict()) - set(network().state_dict()) == {"augment.weight"}


def test_the_noise_label_matters() -> None:
    x = images(1, 3, 8, 8).expand(2, -1, -1, -1)
    with torch.no_grad():
        found = network()(x, torch.tensor([3.0, 300.0]))
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"attention": (3,)}, r"--model.attention=3 is no level: .* levels 0 to 2"),
        ({"heads": 5}, r"--model.heads=5 does not divide the 32 channels"),
        ({"head_channels": 12}, r"--model.head-channels=12 does not divide the 32 channels"),
        ({"conditioning": "block", "scale_shift": True}, r"--model.conditioning=block cannot go with"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment) as caught:
        network(4, **changes)
    assert str(caught.value).endswith(".")


# --- first weights


def test_first_weights_are_those_of_ho_et_al() -> None:
    """Biases zero, the last layer of each branch and of the network near zero, the others uniform with variance
    1 / fan_avg; so the first output is almost nothing."""
    torch.manual_seed(0)
    unet = UNet(config(channels=32, initialisation="ddpm"), 3, 3)
    last = [unet.head.weight]
    last += [m.conv2.weight for m in unet.modules() if isinstance(m, ResBlock)]
    last += [m.out.weight for m in unet.modules() if isinstance(m, Attention)]
    assert all(0 < weight.abs().max() < 1e-5 for weight in last)
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
    block = unet.down[1][0]
    for layer in (unet.stem, unet.time[0], block.conv1, block.skip):
        weight = layer.weight.detach()
        fan = weight[0][0].numel() * (weight.shape[0] + weight.shape[1]) / 2
        assert float(weight.var() * fan) == pytest.approx(1.0, rel=0.15)
        assert float(weight.abs().max()) <= (3 / fan) ** 0.5
    with torch.no_grad():
        assert unet(images(2, 3, 16, 16), noise_labels(2)).abs().max() < 1e-3


def test_first_weights_of_zero_are_pytorchs_but_for_the_last_layers() -> None:
    """Nichol & Dhariwal's zero_module: so the first output is nothing, and the other weights are as PyTorch drew them."""
    networks = []
    for how in ("torch", "zero"):
        torch.manual_seed(0)
        networks.append(UNet(config(channels=32, initialisation=how), 3, 3))
    plain, zero = networks
    last = (".conv2.", ".out.", ".head.")
    for (name, one), other in zip(plain.named_parameters(), zero.parameters(), strict=True):
        expected = torch.zeros_like(one) if any(part in f".{name}" for part in last) else one
        assert torch.equal(other, expected), name
    assert (zero(images(2, 3, 16, 16), noise_labels(2)) == 0).all()


# --- dropout and recomputation


def test_dropout_keeps_the_mean_and_drops_at_its_rate() -> None:
    block = network(dropout=0.3).down[0][0].train()
    h = torch.ones(8, 16, 32, 32)
    dropped = block.drop(h, stream(8))
    p, n = quantised(0.3), h.numel()
    zeros = int((dropped == 0).sum())
    assert abs(zeros - p * n) / (n * p * (1 - p)) ** 0.5 < 4
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - p))}


def test_the_largest_dropout_is_finite() -> None:
    block = network(dropout=0.999_999).down[0][0].train()
    assert block.drop(torch.ones(1, 16, 32, 32), stream(1)).isfinite().all()


def test_dropout_depends_on_the_stream_alone_and_stops_in_eval() -> None:
    unet = network(dropout=0.5)
    x, t = images(3, 3, 8, 8), noise_labels(3)
    with torch.no_grad():
        still = unet(x, t, None, stream(3))
        assert torch.equal(still, unet(x, t, None, stream(3, step=1)))
        assert torch.equal(still, network(dropout=0.0)(x, t))
        unet.train()
        torch.manual_seed(1)
        first = unet(x, t, None, stream(3))
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert torch.equal(first, unet(x, t, None, stream(3)))
        assert torch.equal(before, torch.get_rng_state())
        assert not torch.allclose(first, unet(x, t, None, stream(3, step=1)))
        assert not torch.allclose(first, still)
        alone = torch.cat([unet(x[k : k + 1], t[k : k + 1], None, Stream(0, torch.tensor([k]))) for k in range(3)])
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


def test_layers_have_masks_of_their_own() -> None:
    unet = network(dropout=0.5, blocks=2)
    purposes = [module.drop.purpose for module in unet.modules() if isinstance(module, ResBlock)]
    assert len(set(purposes)) == len(purposes)


@pytest.mark.parametrize("with_stream", [True, False])
@pytest.mark.parametrize("conditioning", ["none", "block"])
def test_gradient_checkpointing_gives_the_same_bits(with_stream: bool, conditioning: str) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        labels = torch.tensor([0, 2]) if conditioning != "none" else None
        unet = network(3, dropout=0.3, gradient_checkpointing=recompute, conditioning=conditioning).train()
        torch.manual_seed(7)
        loss = unet(images(2, 3, 8, 8), noise_labels(2), labels, stream(2) if with_stream else None).square().sum()
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in unet.parameters() if parameter.grad is not None)]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_every_parameter_gets_a_gradient() -> None:
    """What DDP needs to run without find_unused_parameters."""
    for conditioning in ("global", "block"):
        unet = network(3, conditioning=conditioning).train()
        unet(images(2, 3, 8, 8), noise_labels(2), torch.tensor([0, -1]), stream(2)).sum().backward()
        assert [name for name, parameter in unet.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("norm", ["group", "instance", "none"])
def test_rows_of_a_batch_do_not_mix(norm: str) -> None:
    unet = network(norm=norm)
    x, t = images(4, 3, 8, 8), noise_labels(4)
    other = torch.cat([x[:1], images(3, 3, 8, 8, seed=9) * 5])
    with torch.no_grad():
        whole = unet(x, t)
        assert torch.equal(whole[0], unet(other, t)[0])
        torch.testing.assert_close(
            whole, torch.cat([unet(x[k : k + 1], t[k : k + 1]) for k in range(4)]), rtol=1e-4, atol=1e-5
        )
