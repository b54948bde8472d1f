"""How a foreign network names the tensors of ours: rules that are read in both directions."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm.config import ModelConfig
from ddpm.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Rule:
    """One of our tensors and those of theirs that make it: `join` puts theirs together, `split` takes ours apart."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda whole: (whole,)


def same(ours: str, theirs: str) -> Iterator[Rule]:
    """Weight and bias of a layer that is the same in both."""
    for part in ("weight", "bias"):
        yield Rule(f"{ours}.{part}", (f"{theirs}.{part}",))


def reshaped(ours: str, theirs: str, to_ours: int, to_theirs: int) -> Iterator[Rule]:
    """A layer whose weight has trailing dimensions of 1 in one of them: `to_ours` and `to_theirs` are the numbers of dimensions."""
    yield Rule(
        f"{ours}.weight",
        (f"{theirs}.weight",),
        lambda p: with_dims(p[0], to_ours),
        lambda w: (with_dims(w, to_theirs),),
    )
    yield Rule(f"{ours}.bias", (f"{theirs}.bias",))


def stacked(ours: str, theirs: Sequence[str], to_ours: int, to_theirs: int) -> Iterator[Rule]:
    """A layer of ours that holds several of theirs, one after another, such as q, k and v."""
    n = len(theirs)
    yield Rule(
        f"{ours}.weight",
        tuple(f"{name}.weight" for name in theirs),
        lambda parts: torch.cat([with_dims(part, to_ours) for part in parts]),
        lambda whole: [with_dims(part, to_theirs) for part in whole.chunk(n)],
    )
    yield Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), torch.cat, lambda whole: whole.chunk(n))  # type: ignore[arg-type]


def time_rules(config: ModelConfig, first: str, second: str, layout: str) -> Iterator[Rule]:
    """The two layers of the time embedding; the columns of the first follow the layout of the sinusoids."""
    order = _columns(config.channels, config.time_embedding, layout)
    back = torch.argsort(order)
    yield Rule("time.0.weight", (f"{first}.weight",), lambda p: p[0][:, order], lambda w: (w[:, back],))
    yield Rule("time.0.bias", (f"{first}.bias",))
    yield from same("time.2", second)


def _columns(dim: int, ours: str, theirs: str) -> Tensor:
    """Where the columns of our layout stand in theirs."""
    half = dim // 2
    sin, cos = torch.arange(half), torch.arange(half) + half  # where they stand in sin-cos
    layouts = {
        "sin-cos": torch.cat([sin, cos]),
        "cos-sin": torch.cat([cos, sin]),
        "interleaved": torch.stack([sin, cos], dim=1).flatten(),
    }
    kept = torch.arange(2 * half, dim)  # an odd dimension ends in a zero
    return torch.cat([torch.argsort(layouts[theirs])[layouts[ours]], kept])


def with_dims(weight: Tensor, dims: int) -> Tensor:
    """A weight with trailing dimensions of size 1 added or taken off."""
    return weight.reshape(*weight.shape[:dims], *(1,) * (dims - weight.ndim))


@dataclass(frozen=True)
class Part:
    """A piece of our U-Net, in the order in which it runs.

    Attributes:
        ours: its name, such as "down.0.1".
        kind: "block", "down" or "up".
        stage: "down", "middle" or "up".
        level: 0 is full size; -1 in the middle.
        place: its place within its level.
        index: its place within the stage, levels one after another.
        skip, attention: whether a block has a 1x1 shortcut, or attention.
    """

    ours: str
    kind: str
    stage: str
    level: int
    place: int
    index: int
    skip: bool = False
    attention: bool = False


def parts(config: ModelConfig) -> Iterator[Part]:
    """Every piece of `models.unet.UNet` but stem, time, norm and head."""
    widths = [config.channels * mult for mult in config.channel_mults]
    last, skips, index, channels = len(widths) - 1, [config.channels], 0, config.channels
    for level, width in enumerate(widths):
        for place in range(config.blocks):
            yield Part(
                f"down.{level}.{place}",
                "block",
                "down",
                level,
                place,
                index,
                channels != width,
                level in config.attention,
            )
            channels, index = width, index + 1
            skips.append(width)
        if level != last:
            yield Part(f"down.{level}.{config.blocks}", "down", "down", level, config.blocks, index)
            skips.append(width)
            index += 1
    for place in range(2):
        yield Part(f"middle.{place}", "block", "middle", -1, place, place, False, place == 0)
    index = 0
    for order, level in enumerate(reversed(range(len(widths)))):
        for place in range(config.blocks + 1):
            narrowed = channels + skips.pop() != widths[level]
            yield Part(f"up.{order}.{place}", "block", "up", level, place, index, narrowed, level in config.attention)
            channels, index = widths[level], index + 1
        if level:
            yield Part(f"up.{order}.{config.blocks + 1}", "up", "up", level, config.blocks + 1, index)
            index += 1


_FIXED = (
    "network", "heads", "head_channels", "conditioning", "time_dim", "activation", "norm", "norm_groups", "norm_eps", "scale_shift",
    "resample", "down_padding", "time_exponent",
)  # fmt: skip
"""Fields of ModelConfig of which the networks of pytorch-ddpm's family have the defaults alone."""


def levels(
    net: Mapping[str, Tensor], down: str, conv: str, resample: str, attention: str
) -> tuple[list[list[int]], tuple[int, ...]]:
    """The widths of the blocks of every level, and the levels with attention, of a flat list of pieces on the way down.

    Args:
        net: their tensors.
        down: what the list is called.
        conv, resample, attention: tensors that tell a block, a piece that halves, and a block with attention.
    """
    widths: list[list[int]] = [[]]
    found: dict[int, None] = {}
    count = len({name.split(".")[1] for name in net if name.startswith(f"{down}.")})
    for index in range(count):
        if f"{down}.{index}.{resample}" in net:
            widths.append([])
            continue
        widths[-1].append(net[f"{down}.{index}.{conv}"].shape[0])
        if f"{down}.{index}.{attention}" in net:
            found[len(widths) - 1] = None
    return widths, tuple(found)


def check_fields(model: ModelConfig, title: str, free: Collection[str] = ()) -> None:
    """Raise ConfigError for a field that a network of pytorch-ddpm's family does not have, but for those in `free`."""
    for name in _FIXED:
        found, wanted = getattr(model, name), ModelConfig.model_fields[name].default
        if found != wanted and name not in free:
            raise ConfigError(
                f"--format {title}: its network has no --model.{name.replace('_', '-')}={found}, only {wanted}."
            )
    if model.time_embedding == "cos-sin":
        raise ConfigError(f"--format {title}: its network has no --model.time-embedding=cos-sin.")


def check_groups(model: ModelConfig, title: str) -> None:
    """Raise ConfigError for widths at which a network whose norms all have 32 groups is another one than ours."""
    widths = [model.channels, *(model.channels * mult for mult in model.channel_mults)]
    if wrong := [width for width in widths if width % 32]:
        raise ConfigError(f"--format {title}: its levels have multiples of 32 channels, not {wrong[0]}.")
    if 32 in widths and not model.norm_groups_exact:
        raise ConfigError(
            f"--format {title}: its norms have 32 groups, ours of 32 channels fewer groups after the embedding; "
            "only a network with --model.norm-groups-exact can be written."
        )


def to_ours(
    rules: Iterable[Rule], theirs: Mapping[str, Tensor], path: Path, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Our tensors from theirs; raises CheckpointError that names the first tensor that is missing or not known."""
    left, found = dict(theirs), {}
    for rule in rules:
        if missing := [name for name in rule.theirs if name not in theirs]:
            raise CheckpointError(
                f"{path}: the tensor {missing[0]} is missing; this is a checkpoint of another architecture."
            )
        found[rule.ours] = rule.join([theirs[name] for name in rule.theirs]).contiguous()
        for name in rule.theirs:
            left.pop(name, None)
    for name in ignored:
        left.pop(name, None)
    if left:
        raise CheckpointError(
            f"{path}: the tensor {next(iter(left))} is not known; this is a checkpoint of another architecture."
        )
    return found


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours, the bias of a layer right behind its weight, which is the order of parameters."""
    found: dict[str, Tensor] = {}
    for rule in rules:
        found |= {name: part.contiguous() for name, part in zip(rule.theirs, rule.split(ours[rule.ours]), strict=True)}
    pairs = [(name, f"{name.removesuffix('.weight')}.bias") for name in found]
    return {name: found[name] for pair in pairs for name in pair if name in found}
