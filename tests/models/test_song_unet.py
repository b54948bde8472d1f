"""DDPM++ and NCSN++ (and our U-Net as ADM) against NVlabs/edm: the same weights give the same output.

Both networks are filled by a rule from the name and shape of each weight (`filled`), so that only small outputs are
stored, in edm.npz. To make it again, with a clone of github.com/NVlabs/edm (commit 008a4e5) in EDM:

    PYTHONPATH=.:EDM python tests/models/test_song_unet.py
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import ConfigError
from ddpm.models import GaussianDiffusion, SongUNet, UNet, build_diffusion
from ddpm.models.song_unet import Block, Conv, Resample
from ddpm.randomness import Stream
from ddpm.samplers import Sampler
from ddpm.samplers.thresholding import Unbounded

STORED = Path(__file__).parent / "edm.npz"
NCSN: dict[str, Any] = {"fourier": True, "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
SMALL: dict[str, Any] = {
    "channels": 16,
    "channel_mults": (1, 2, 2),
    "blocks": 1,
    "attention": (1,),
    "conditioning": "global",
    "augment_labels": 9,
    "dropout": 0.0,
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # size of the images; fields
    "ddpm++": (16, SMALL),
    "ncsn++": (16, {**SMALL, **NCSN}),
    "ncsn++ skip": (16, {**SMALL, **NCSN, "encoder": "skip", "decoder": "skip", "attention": (0, 2), "blocks": 2}),
    "ddpm++ residual": (12, {**SMALL, "encoder": "residual", "decoder": "skip", "conditioning": "none", "time_dim": 48}),
    "ddpm++ cifar10": (32, {"channels": 128, "channel_mults": (2, 2, 2), "blocks": 4, "attention": (1,), "augment_labels": 9}),
    "ncsn++ cifar10": (32, {"channels": 128, "channel_mults": (2, 2, 2), "blocks": 4, "attention": (1,), "augment_labels": 9, **NCSN}),
}  # fmt: skip
CLASSES = 5


def filled(key: str, shape: Sequence[int]) -> Tensor:
    """float32 numbers with mean 0 and variance 1 that follow from a name and a shape: raw bits of PCG64."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(11)
    return torch.from_numpy(((bits / 2.0**52 - 1.0) * 3.0**0.5).astype(np.float32)).reshape(*shape)


def weight(key: str, shape: Sequence[int]) -> Tensor:
    """Matrices with variance 1 / fan-in, gains about 1, biases about 0."""
    value = filled(key, shape)
    if key.endswith(".weight"):
        return value / value[0].numel() ** 0.5 if value.ndim > 1 else 1.0 + 0.3 * value
    return 0.3 * value if key.endswith(".bias") else value


def fill(network: nn.Module) -> None:
    """Every weight by its name; filters stay."""
    state = network.state_dict()
    network.load_state_dict({k: v if k.endswith("resample_filter") else weight(k, v.shape) for k, v in state.items()})


def inputs(size: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, sigmas from 0.02 to 20, labels, augmentation labels."""
    sigma = torch.from_numpy(np.geomspace(0.02, 20.0, n)) if n > 1 else torch.tensor([0.7], dtype=torch.float64)
    return filled("x", (n, 3, size, size)), sigma, torch.arange(n) * 2 % CLASSES, filled("augment", (n, 9))


def ours(name: str) -> tuple[GaussianDiffusion, int]:
    """The model of a case, and how many images its stored output has."""
    size, fields = CASES[name]
    settings = ModelConfig(network="song-unet", **fields)
    model = build_diffusion(
        settings, DiffusionConfig(schedule="edm", objective="edm", label_drop=0.0), (3, size, size), CLASSES
    )
    fill(model.network)
    return model.eval(), 1 if "cifar10" in name else 3


def level_of(model: GaussianDiffusion, sigma: Tensor) -> Any:
    return model.schedule.at(model.schedule.t_of(-2.0 * sigma.log()))


def names(network: nn.Module) -> str:
    """A hash of the names and shapes of all weights, in their order."""
    return hashlib.sha256(repr([(k, tuple(v.shape)) for k, v in network.state_dict().items()]).encode()).hexdigest()


SLOW = [pytest.param(name, marks=pytest.mark.slow if name == "ncsn++ cifar10" else ()) for name in CASES]


@pytest.mark.parametrize("name", SLOW)
def test_the_output_is_that_of_nvlabs_edm(name: str, exactness: Callable[..., None]) -> None:
    """The network's own, told of an augmentation, and that of the preconditioned model."""
    model, n = ours(name)
    x, sigma, labels, augment = inputs(CASES[name][0], n)
    condition = labels if model.num_classes else None
    with torch.no_grad():
        found = model.network(x, (sigma.log() / 4).float(), condition, None, augment)
        denoised = model.predict(x, level_of(model, sigma), condition).x0
    stored = np.load(STORED)
    assert names(model.network) == str(stored[f"{name} names"])
    if name == "ddpm++ cifar10":
        assert sum(parameter.numel() for parameter in model.parameters()) == 55_733_891
    for component, mine, key in (("network song-unet", found, "output"), ("objective edm", denoised, "denoised")):
        theirs = torch.from_numpy(stored[f"{name} {key}"])
        assert theirs.std() > 0.1
        difference = float((mine - theirs).abs().max() / theirs.abs().max())
        exactness(component, f"NVlabs/edm, {name}", "exact", difference, 1e-5)


CHAINS = {"deterministic": {}, "churned": {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}}


@pytest.mark.parametrize("name", CHAINS)
def test_a_whole_chain_is_that_of_nvlabs_edm(name: str, exactness: Callable[..., None]) -> None:
    """18 steps of Heun's method, 35 evaluations of a small DDPM++, from the same noise."""
    model, n = ours("ddpm++")
    options = "".join(f",{key}={value}" for key, value in CHAINS[name].items())
    found = Sampler.parse(f"heun:steps=18,grid=karras{options}").sample(
        model,
        filled("latents", (n, 3, 16, 16)),
        inputs(16, n)[2],
        lambda i: filled(f"noise {i}", (n, 3, 16, 16)),
        Unbounded(),
    )
    theirs = torch.from_numpy(np.load(STORED)[f"{name} chain"])
    assert theirs.std() > 0.5
    difference = float((found - theirs).abs().max() / theirs.abs().max())
    exactness("sampler heun", f"NVlabs/edm edm_sampler, {name}, ddpm++", "exact", difference, 1e-5)


# --- ADM


ADM = ModelConfig(
    channels=128, channel_mults=(1, 2), blocks=1, attention=(1,), head_channels=64, scale_shift=True, resample="block",
    time_embedding="cos-sin", conditioning="global", augment_labels=9,
)  # fmt: skip
ADM_PARTS = {"norm1": "norm0", "conv1": "conv0", "time": "affine", "norm2": "norm1", "conv2": "conv1", "skip": "skip"}
ADM_PARTS |= {"attention.norm": "norm2", "attention.qkv": "qkv", "attention.out": "proj"}
ADM_ENDS = {
    "time.0": "map_layer0",
    "time.2": "map_layer1",
    "label": "map_label",
    "augment": "map_augment",
    "norm": "out_norm",
}
ADM_ENDS |= {"stem": "enc.16x16_conv", "head": "out_conv"}
ADM_BLOCKS = {
    "down.0.0": "enc.16x16_block0", "down.0.1": "enc.8x8_down", "down.1.0": "enc.8x8_block0", "middle.0": "dec.8x8_in0",
    "middle.1": "dec.8x8_in1", "up.0.0": "dec.8x8_block0", "up.0.1": "dec.8x8_block1", "up.0.2": "dec.16x16_up",
    "up.1.0": "dec.16x16_block0", "up.1.1": "dec.16x16_block1",
}  # fmt: skip


def adm_weight(key: str, shape: Sequence[int]) -> Tensor:
    """The weight of our U-Net that in NVlabs/edm has another name, and for labels and attention another order."""
    layer, _, kind = key.rpartition(".")
    if layer in ADM_ENDS:
        return (
            weight(f"{ADM_ENDS[layer]}.{kind}", shape)
            if layer != "label"
            else weight("map_label.weight", shape[::-1]).T
        )
    block = next(block for block in ADM_BLOCKS if layer.startswith(f"{block}."))
    value = weight(f"{ADM_BLOCKS[block]}.{ADM_PARTS[layer.removeprefix(f'{block}.')]}.{kind}", shape)
    if not layer.endswith("qkv"):
        return value
    return value.unflatten(0, (-1, 64, 3)).movedim(2, 0).flatten(0, 2)  # head, channel, q k v -> q k v, head, channel


def test_unet_is_the_adm_network_of_karras_et_al(exactness: Callable[..., None]) -> None:
    unet = UNet(ADM, 3, 3, CLASSES).eval()
    unet.load_state_dict({key: adm_weight(key, value.shape) for key, value in unet.state_dict().items()})
    x, sigma, labels, augment = inputs(16, 3)
    with torch.no_grad():
        found = unet(x, (sigma.log() / 4).float(), labels, None, augment)
    theirs = torch.from_numpy(np.load(STORED)["adm output"])
    assert theirs.std() > 0.1
    exactness(
        "network unet", "NVlabs/edm, ADM", "exact", float((found - theirs).abs().max() / theirs.abs().max()), 1e-5
    )


# --- options and promises


def network(num_labels: int = 0, **changes: Any) -> SongUNet:
    settings = {"channels": 16, "channel_mults": (1, 2), "blocks": 1, "attention": (1,), "dropout": 0.0, **changes}
    found = SongUNet(ModelConfig(network="song-unet", **settings), 3, 3, num_labels).eval()
    fill(found)
    return found


def batch(n: int, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    return filled("images", (n, 3, height, width)), torch.linspace(-1.0, 0.7, n)


OPTIONS: dict[str, Any] = {
    "channels": 24,
    "channel_mults": (1, 3),
    "blocks": 2,
    "attention": (0,),
    "heads": 2,
    "time_dim": 40,
    "norm_groups": 2,
    "fourier": True,
    "encoder": "skip",
    "decoder": "skip",
    "resample_filter": (1, 3, 3, 1),
}
UNSEEN = {
    "network",
    "dropout",
    "conditioning",
    "resolution",
    "augment_labels",
    "gradient_checkpointing",
}  # on their own


def test_every_field_is_used_or_refused() -> None:
    assert (set(OPTIONS) | UNSEEN | SongUNet.UNUSED) == set(ModelConfig.model_fields)
    assert not SongUNet.UNUSED & (set(OPTIONS) | UNSEEN)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_something(name: str) -> None:
    x, t = batch(2)
    with torch.no_grad():
        assert not torch.allclose(network()(x, t), network(**{name: OPTIONS[name]})(x, t), rtol=1e-2)


@pytest.mark.parametrize(
    "changes", [{}, NCSN, {**NCSN, "encoder": "skip", "decoder": "skip"}], ids=["ddpm", "ncsn", "skip"]
)
@pytest.mark.parametrize("size", [(7, 5), (8, 20), (1, 1), (33, 16)])
def test_any_size_comes_back_as_it_was(size: tuple[int, int], changes: dict[str, Any]) -> None:
    """By zeros on both sides that are cut off again."""
    song = network(channel_mults=(1, 2, 2), **changes)
    height, width = size
    top, left = -height % 4 // 2, -width % 4 // 2
    x, t = batch(2, *size)
    padded = torch.zeros(2, 3, height + -height % 4, width + -width % 4)
    padded[..., top : top + height, left : left + width] = x
    with torch.no_grad():
        found = song(x, t)
        assert torch.equal(found, song(padded, t)[..., top : top + height, left : left + width])
    assert found.shape == x.shape
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("resolution", "mults", "expected"),
    [
        (None, (1, 2, 2), [32, 16, 8]),
        (28, (1, 2, 2), [28, 14, 7]),
        (7, (1, 2, 2), [8, 4, 2]),
        (1, (1, 1, 1, 1), [8, 4, 2, 1]),
    ],
)
def test_levels_are_named_by_their_size(resolution: int | None, mults: tuple[int, ...], expected: list[int]) -> None:
    song = network(resolution=resolution, channel_mults=mults, attention=())
    assert list(dict.fromkeys(name.split("_")[0] for name in song.enc)) == [f"{size}x{size}" for size in expected]
    assert len(song.enc) == 2 * len(mults)
    images = build_diffusion(song.config.model_copy(update={"resolution": None}), DiffusionConfig(), (3, 8, 12), 0)
    assert "8x8_conv" in images.network.enc


def test_labels_matter_and_minus_one_is_the_last_row() -> None:
    song = network(4, conditioning="global")
    x, _ = batch(1)
    with torch.no_grad():
        found = song(x.expand(5, -1, -1, -1), torch.zeros(5), torch.tensor([0, 1, 2, 3, -1]))
    assert torch.equal(found[3], found[4])
    assert all(not torch.allclose(found[i], found[j], rtol=1e-2) for i in range(4) for j in range(i))


def test_dropout_depends_on_the_stream_alone_and_layers_have_masks_of_their_own() -> None:
    song, (x, t) = network(dropout=0.5), batch(3)
    purposes = [module.drop.purpose for module in song.modules() if isinstance(module, Block)]
    assert len(set(purposes)) == len(purposes) == 10
    with torch.no_grad():
        still = song(x, t, None, Stream(0, torch.arange(3)))
        assert torch.equal(still, network()(x, t))
        song.train()
        first = song(x, t, None, Stream(0, torch.arange(3)))
        assert torch.equal(first, song(x, t, None, Stream(0, torch.arange(3))))
        assert not torch.allclose(first, still)
        alone = torch.cat([song(x[k : k + 1], t[k : k + 1], None, Stream(0, torch.tensor([k]))) for k in range(3)])
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient_and_recomputing_gives_the_same_bits() -> None:
    def gradients(**changes: Any) -> dict[str, Tensor | None]:
        song = network(
            3, conditioning="global", augment_labels=2, dropout=0.3, decoder="skip", **NCSN, **changes
        ).train()
        song(*batch(2), torch.tensor([0, -1]), Stream(0, torch.arange(2)), torch.ones(2, 2)).square().sum().backward()
        return {name: parameter.grad for name, parameter in song.named_parameters()}

    plain, again = gradients(), gradients(gradient_checkpointing=True)
    assert [name for name, gradient in plain.items() if gradient is None] == []
    assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items() if gradient is not None)


def test_first_weights_are_those_of_karras_et_al() -> None:
    """Uniform with variance 1 / fan_avg, times 1/5 for qkv and 1e-10 for the last layer of each branch; biases zero."""
    torch.manual_seed(0)
    song = SongUNet(
        ModelConfig(channels=32, channel_mults=(1, 2), attention=(0,), augment_labels=9, fourier=True), 3, 3
    )
    for name, parameter in song.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim > 1 and parameter.numel() > 2000:
            kind = name.split(".")[-2].rpartition("_")[2]
            gain = 1e-5 if kind in ("conv1", "proj") else 0.2**0.5 if kind == "qkv" else 1.0
            fan = parameter[0][0].numel() * (parameter.shape[0] + parameter.shape[1]) / 2
            assert float(parameter.detach().var() * fan) == pytest.approx(gain**2, rel=0.1), name
    assert float(song.get_buffer("map_noise.freqs").std()) == pytest.approx(16.0, rel=0.4)
    with torch.no_grad():
        assert song(*batch(2)).abs().max() < 1e-3


def test_the_filter_of_two_taps_is_the_general_one() -> None:
    """Pooling and repetition against the convolutions that any filter is done by."""
    x = filled("x", (2, 4, 6, 8))
    for how in ("up", "down"):
        layer = Resample(how, (1, 1))
        quick = layer(x)
        layer.equal = False
        torch.testing.assert_close(layer(x), quick, rtol=1e-6, atol=1e-6)


def test_a_filter_keeps_a_constant_image_but_for_its_border() -> None:
    for how, size in (("up", 16), ("down", 4)):
        found = Resample(how, (1, 3, 3, 1))(torch.ones(1, 2, 8, 8))
        assert found.shape[-2:] == (size, size)
        assert (found[..., 1:-1, 1:-1] - 1).abs().max() < 1e-6
    convolved = Conv(1, 1, 3, how="down", taps=(1, 3, 3, 1), first=True)(torch.ones(1, 1, 8, 8))
    assert convolved.shape[-2:] == (4, 4)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"attention": (2,)}, r"--model.attention=2 is no level"),
        ({"heads": 5}, r"--model.heads=5 does not divide the 32 channels"),
        ({"channels": 1}, r"--model.channels=1 is too few"),
        ({"conditioning": "block"}, r"--model.conditioning=block: song-unet"),
        ({"resample_filter": (1, 2, 1)}, r"--model.resample-filter=1,2,1 has an odd number of taps"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment) as caught:
        network(4, **changes)
    assert str(caught.value).endswith(".")


def remake() -> None:
    """Write edm.npz from a clone of NVlabs/edm on the path."""
    from generate import edm_sampler
    from training.networks import DhariwalUNet, EDMPrecond

    x, sigma, labels, augment = inputs(16, 3)
    adm = DhariwalUNet(16, 3, 3, CLASSES, 9, ADM.channels, ADM.channel_mults, num_blocks=1, attn_resolutions=[8]).eval()
    fill(adm)
    with torch.no_grad():
        output = adm(x, (sigma.log() / 4).float(), torch.nn.functional.one_hot(labels, CLASSES).float(), augment)
    stored: dict[str, Any] = {"adm output": output.numpy()}
    for name, (size, _) in CASES.items():
        model, n = ours(name)
        config = model.network.config
        theirs = EDMPrecond(
            img_resolution=size,
            img_channels=3,
            label_dim=model.num_classes,
            model_type="SongUNet",
            augment_dim=config.augment_labels,
            model_channels=config.channels,
            channel_mult=config.channel_mults,
            channel_mult_emb=(config.time_dim or 4 * config.channels) // config.channels,
            num_blocks=config.blocks,
            attn_resolutions=[size >> level for level in config.attention],
            embedding_type="fourier" if config.fourier else "positional",
            channel_mult_noise=2 if config.fourier else 1,
            encoder_type=config.encoder,
            decoder_type=config.decoder,
            resample_filter=list(config.resample_filter),
        ).eval()
        fill(theirs.model)
        stored[f"{name} names"] = names(theirs.model)
        x, sigma, labels, augment = inputs(size, n)
        one_hot = torch.nn.functional.one_hot(labels, CLASSES).float() if model.num_classes else None
        with torch.no_grad():
            stored[f"{name} output"] = theirs.model(x, (sigma.log() / 4).float(), one_hot, augment).numpy()
            stored[f"{name} denoised"] = theirs(x, sigma, one_hot).numpy()
            for chain, options in CHAINS.items() if name == "ddpm++" else ():
                steps = (filled(f"noise {i}", x.shape) for i in range(18))
                churn = {key.replace("s_t", "S_").replace("s_", "S_"): value for key, value in options.items()}
                drawn = edm_sampler(theirs, filled("latents", x.shape), one_hot, lambda _: next(steps), 18, **churn)  # noqa: B023
                stored[f"{chain} chain"] = drawn.numpy()
    np.savez_compressed(STORED, **stored)


if __name__ == "__main__":
    remake()
