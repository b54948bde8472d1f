"""`*-model.pth` of the ddpm package (dongwookim-ml/DDPM) and of abarankab/DDPM, with the `*-optim.pth` beside it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import CheckpointError, ConfigError
from ddpm.files import atomic_path
from ddpm.formats.adam import adam_fields, adam_ours, adam_theirs
from ddpm.formats.base import Format, Snapshot, Source, torch_bytes
from ddpm.formats.names import (
    Part,
    Rule,
    check_fields,
    check_groups,
    levels,
    parts,
    same,
    time_rules,
    to_ours,
    to_theirs,
)
from ddpm.registry import register
from ddpm.schedules import DiscreteSchedule, Schedule, need_table

_MODEL, _EMA = "model.", "ema_model."
_KEYS = {"betas", "remove_noise_coeff", "model.init_conv.weight", "ema_model.init_conv.weight"}
_FREE = {"time_dim", "activation", "conditioning"}
"""Fields of ModelConfig that its network has as ours does."""


@register("ddpm-package")
class DDPMPackage(Format):
    """Its files hold the schedule, but not the flags of the network that leave no trace in the shapes: give those that differ."""

    title = "the ddpm package"
    activation: Literal["silu", "relu", "mish"] = "silu"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    img_size: Annotated[int, Field(ge=1)] = 32

    def matches(self, source: Source) -> bool:
        if source.is_folder or source.path.suffix == ".safetensors":
            return False
        return isinstance(source.content, Mapping) and set(source.content) >= _KEYS

    def load(self, source: Source) -> Snapshot:
        if not self.matches(source):
            raise CheckpointError(f"{source.path}: is no model of the ddpm package (it has no {min(_KEYS)}).")
        held = source.state(source.content, "its contents")
        net, ema = _part(held, _MODEL), _part(held, _EMA)
        model = _architecture(net, self.activation, source.path)
        rules = [*_rules(model)]
        optim = _optimizer(source.path)
        moments = {} if optim is None else adam_ours(optim, [*net, *(_EMA + name for name in ema)], rules, source.path)
        classes = net["mid.0.class_bias.weight"].shape[0] if model.conditioning == "block" else 0
        number = re.search(r"iteration-(\d+)", source.path.name)
        return Snapshot(
            model=model,
            diffusion=DiffusionConfig(
                schedule=_schedule(held["betas"], source.path),
                variance="fixed-large",
                thresholding="none",
                label_drop=0.0,
            ),
            shape=(net["init_conv.weight"].shape[1], self.img_size, self.img_size),
            classes=tuple(str(label) for label in range(classes)),
            weights=to_ours(rules, net, source.path),
            emas={f"{self.ema_decay:g}": to_ours(rules, ema, source.path)},
            optimizer=moments,
            step=int(moments["stem.weight.step"]) if moments else int(number[1]) if number else 0,
            sampler="ddpm",
            data={"dataset": "cifar10"},
            train={"warmup": 0, "grad_clip": 0.0, **({} if optim is None else adam_fields(optim))},
            notes=(
                f"the file does not hold the activation: {self.activation} is taken; say otherwise by --format ddpm-package:activation=...",
            ),
        )

    def save(self, snapshot: Snapshot, path: Path) -> None:
        """Write a model file that the package's own code loads with strict keys, and its optimizer beside it."""
        _check_expressible(snapshot)
        if snapshot.optimizer and not path.name.endswith("-model.pth"):
            raise ConfigError(f"--out {path}: must end in -model.pth; the optimizer goes beside it as -optim.pth.")
        rules = [*_rules(snapshot.model)]
        net = to_theirs(rules, snapshot.weights)
        ema = to_theirs(rules, next(iter(snapshot.emas.values()), snapshot.weights))
        content = {
            **_buffers(need_table(Schedule.parse(snapshot.diffusion.schedule), self.name)),
            **{_MODEL + name: value for name, value in net.items()},
            **{_EMA + name: value for name, value in ema.items()},
        }
        if snapshot.optimizer:
            names = [*net, *(_EMA + name for name in ema)]
            with atomic_path(_beside(path)) as temporary:
                temporary.write_bytes(torch_bytes(adam_theirs(snapshot, names, rules)))
        with atomic_path(path) as temporary:
            temporary.write_bytes(torch_bytes(content))


def _part(held: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('-model.pth')}-optim.pth")


def _optimizer(path: Path) -> Mapping[str, Any] | None:
    """The content of the -optim.pth beside it; None where there is none."""
    if not path.name.endswith("-model.pth") or not _beside(path).exists():
        return None
    found: Mapping[str, Any] = Source(_beside(path)).content
    return found


def _rules(model: ModelConfig) -> Iterator[Rule]:
    """Our names and theirs, in the order of their parameters."""
    yield from time_rules(model, "time_mlp.1", "time_mlp.3", "sin-cos")
    yield from same("stem", "init_conv")
    stages = {"down": "downs", "up": "ups", "middle": "mid"}
    for stage, name in stages.items():
        for part in parts(model):
            if part.stage == stage:
                yield from _part_rules(part, f"{name}.{part.index}", model.conditioning == "block")
    yield from same("norm", "out_norm")
    yield from same("head", "out_conv")


def _part_rules(part: Part, theirs: str, conditional: bool) -> Iterator[Rule]:
    if part.kind != "block":
        yield from same(f"{part.ours}.conv", f"{theirs}.{'downsample' if part.kind == 'down' else 'upsample.1'}")
        return
    names = {"norm1": "norm_1", "conv1": "conv_1", "norm2": "norm_2", "conv2": "conv_2.1", "time": "time_bias"}
    for ours, other in names.items():
        yield from same(f"{part.ours}.{ours}", f"{theirs}.{other}")
    if conditional:
        yield Rule(f"{part.ours}.label.weight", (f"{theirs}.class_bias.weight",))
    if part.skip:
        yield from same(f"{part.ours}.skip", f"{theirs}.residual_connection")
    if part.attention:
        for ours, other in {"norm": "norm", "qkv": "to_qkv", "out": "to_out"}.items():
            yield from same(f"{part.ours}.attention.{ours}", f"{theirs}.attention.{other}")


def _architecture(net: Mapping[str, Tensor], activation: Any, path: Path) -> ModelConfig:
    """Channels, levels, blocks and attention from names and shapes; raises CheckpointError."""
    if "mid.0.norm_1.running_mean" in net:
        raise CheckpointError(
            f"{path}: its network has batch norm (mid.0.norm_1.running_mean); only group norm is read."
        )
    try:
        widths, attention = levels(net, "downs", "conv_1.weight", "downsample.weight", "attention.to_qkv.weight")
        channels, time_dim = net["init_conv.weight"].shape[0], net["time_mlp.1.weight"].shape[0]
        return ModelConfig(
            channels=channels,
            channel_mults=tuple(level[0] // channels for level in widths),
            blocks=len(widths[0]),
            attention=attention,
            time_dim=None if time_dim == 4 * channels else time_dim,
            activation=activation,
            conditioning="block" if "mid.0.class_bias.weight" in net else "none",
            norm_groups_exact=True,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its tensors are no U-Net of the ddpm package ({type(error).__name__}: {error})."
        ) from None


def _schedule(betas: Tensor, path: Path) -> str:
    """The spec of the schedule whose table the file holds; raises CheckpointError for one that is neither linear nor cosine."""
    ends = [float(f"{beta:.7g}") for beta in (float(betas[0]), float(betas[-1]))]
    steps = len(betas)
    for spec in (
        f"linear:timesteps={steps},beta_start={ends[0]!r},beta_end={ends[1]!r}",
        f"cosine:timesteps={steps}",
    ):
        if torch.allclose(need_table(Schedule.parse(spec), "").betas.float(), betas, rtol=1e-6, atol=1e-9):
            return spec
    raise CheckpointError(f"{path}: its betas are neither linear nor cosine; this is a checkpoint of changed code.")


def _buffers(schedule: DiscreteSchedule) -> dict[str, Tensor]:
    """The tables that its GaussianDiffusion registers, float32."""
    betas = schedule.betas
    alphas = 1.0 - betas
    kept = alphas.cumprod(0)
    tables = {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": kept,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - kept).sqrt(),
        "reciprocal_sqrt_alphas": (1.0 / alphas).sqrt(),
        "remove_noise_coeff": betas / (1.0 - kept).sqrt(),
        "sigma": betas.sqrt(),
    }
    return {name: table.float() for name, table in tables.items()}


def _check_expressible(snapshot: Snapshot) -> None:
    """Raise ConfigError for what the package's network or diffusion does not have."""
    model, diffusion = snapshot.model, snapshot.diffusion
    check_fields(model, "ddpm-package", free=_FREE)
    check_groups(model, "ddpm-package")
    if model.conditioning == "global" or model.activation == "gelu":
        raise ConfigError("--format ddpm-package: its network has neither global conditioning nor gelu.")
    if diffusion.objective.partition(":")[0] != "eps" or "label_scale" in diffusion.objective:
        raise ConfigError(f"--format ddpm-package: it predicts eps alone, not {diffusion.objective}.")
    if diffusion.variance != "fixed-large":
        raise ConfigError(f"--format ddpm-package: its variance is fixed-large, not {diffusion.variance}.")
    need_table(Schedule.parse(diffusion.schedule), "--format ddpm-package")
    if model.conditioning == "block" and diffusion.label_drop:
        raise ConfigError(
            "--format ddpm-package: it has no row for a label left out; --diffusion.label-drop must be 0."
        )
