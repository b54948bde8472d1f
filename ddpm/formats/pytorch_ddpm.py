"""`ckpt.pt` of w86763777/pytorch-ddpm and of DeepSpark's variant: both networks, Adam, the step, the noise of the previews."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

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
    stacked,
    time_rules,
    to_ours,
    to_theirs,
)
from ddpm.models.unet import sinusoids
from ddpm.registry import register
from ddpm.schedules import Linear, Schedule, need_table

_TABLE = "time_embedding.timembedding.0.weight"
_KEYS = {"net_model", "ema_model", "optim", "step"}
_MEANS = {"epsilon": "eps", "xstart": "x0", "xprev": "xprev"}


@register("pytorch-ddpm")
class PytorchDDPM(Format):
    """Its files do not hold the flags that the diffusion was trained with: give those that were not the defaults."""

    title = "pytorch-ddpm"
    beta_1: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_T: Annotated[float, Field(gt=0, lt=1)] = 0.02  # noqa: N815 - the flag's own name
    mean_type: Literal["epsilon", "xstart", "xprev"] = "epsilon"
    var_type: Literal["fixedlarge", "fixedsmall"] = "fixedlarge"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    img_size: Annotated[int, Field(ge=1)] = 32

    def matches(self, source: Source) -> bool:
        if source.is_folder or source.path.suffix == ".safetensors":
            return False
        content = source.content
        return isinstance(content, Mapping) and set(content) >= _KEYS and _TABLE in content["net_model"]

    def load(self, source: Source) -> Snapshot:
        content = source.content
        if not self.matches(source):
            raise CheckpointError(
                f"{source.path}: is no ckpt.pt of pytorch-ddpm (it has no {', '.join(sorted(_KEYS))})."
            )
        net, ema = (source.state(content[name], name) for name in ("net_model", "ema_model"))
        model = _architecture(net, source.path)
        timesteps = _check_table(net[_TABLE], source.path)
        rules = [*_rules(model)]
        weights = to_ours(rules, net, source.path, [_TABLE])
        size = content["x_T"].shape[-1] if isinstance(content.get("x_T"), Tensor) else self.img_size
        return Snapshot(
            model=model,
            diffusion=DiffusionConfig(
                schedule=f"linear:timesteps={timesteps},beta_start={self.beta_1},beta_end={self.beta_T}",
                objective=_MEANS[self.mean_type],
                variance="fixed-large" if self.var_type == "fixedlarge" else "fixed-small",
                thresholding="none",
            ),
            shape=(net["head.weight"].shape[1], size, size),
            weights=weights,
            emas={f"{self.ema_decay:g}": to_ours(rules, ema, source.path, [_TABLE])},
            optimizer=adam_ours(content["optim"], list(net), rules, source.path),
            step=int(content["step"]) + 1,  # it writes the number of the step just done, counted from 0
            sampler="ddpm",
            data={"dataset": "cifar10", "flip": True},
            train={"steps": 800_000, **adam_fields(content["optim"])},
            notes=(
                f"the file does not hold the betas: {self.beta_1:g} to {self.beta_T:g} are taken, by {self.mean_type} and {self.var_type}; "
                f"say otherwise by --format pytorch-ddpm:beta_T=...",
            ),
        )

    def save(self, snapshot: Snapshot, path: Path) -> None:
        """Write a ckpt.pt that pytorch-ddpm's own code loads with strict keys."""
        _check_expressible(snapshot)
        timesteps = need_table(Schedule.parse(snapshot.diffusion.schedule), "pytorch-ddpm").timesteps
        rules = [*_rules(snapshot.model)]
        table = sinusoids(torch.arange(timesteps), snapshot.model.channels, "interleaved")
        net = {_TABLE: table, **to_theirs(rules, snapshot.weights)}
        ema = next(iter(snapshot.emas.values()), snapshot.weights)
        optim = adam_theirs(snapshot, list(net), rules)
        optim["param_groups"][0]["initial_lr"] = optim["param_groups"][0]["lr"]  # its warm-up goes on from it
        content = {
            "net_model": net,
            "ema_model": {_TABLE: table.clone(), **to_theirs(rules, ema)},
            "sched": {
                "last_epoch": snapshot.step,
                "_step_count": snapshot.step + 1,
                "base_lrs": [snapshot.train.get("lr", 2e-4)],
                "lr_lambdas": [None],
            },
            "optim": optim,
            "step": max(snapshot.step - 1, 0),
            "x_T": torch.zeros(0, *snapshot.shape),
        }
        with atomic_path(path) as temporary:
            temporary.write_bytes(torch_bytes(content))


def _rules(model: ModelConfig) -> Iterator[Rule]:
    """Our names and theirs, for every tensor but the table of sinusoids."""
    yield from time_rules(model, "time_embedding.timembedding.1", "time_embedding.timembedding.3", "interleaved")
    yield from same("stem", "head")
    for part in parts(model):
        theirs = {
            "down": f"downblocks.{part.index}",
            "middle": f"middleblocks.{part.index}",
            "up": f"upblocks.{part.index}",
        }[part.stage]
        yield from _block_rules(part, theirs) if part.kind == "block" else same(f"{part.ours}.conv", f"{theirs}.main")
    yield from same("norm", "tail.0")
    yield from same("head", "tail.2")


def _block_rules(part: Part, theirs: str) -> Iterator[Rule]:
    names = {"norm1": "block1.0", "conv1": "block1.2", "time": "temb_proj.1", "norm2": "block2.0", "conv2": "block2.3"}
    if part.skip:
        names["skip"] = "shortcut"
    for ours, other in names.items():
        yield from same(f"{part.ours}.{ours}", f"{theirs}.{other}")
    if part.attention:
        attention = f"{part.ours}.attention"
        yield from same(f"{attention}.norm", f"{theirs}.attn.group_norm")
        yield from stacked(f"{attention}.qkv", [f"{theirs}.attn.proj_{x}" for x in "qkv"], 4, 4)
        yield from same(f"{attention}.out", f"{theirs}.attn.proj")


def _architecture(net: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """Channels, levels, blocks and attention from names and shapes; raises CheckpointError."""
    try:
        channels = net["head.weight"].shape[0]
        widths, attention = levels(net, "downblocks", "block1.2.weight", "main.weight", "attn.proj_q.weight")
        return ModelConfig(
            channels=channels,
            channel_mults=tuple(level[0] // channels for level in widths),
            blocks=len(widths[0]),
            attention=attention,
            time_embedding="interleaved",
            norm_groups_exact=True,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its tensors are no U-Net of pytorch-ddpm ({type(error).__name__}: {error})."
        ) from None


def _check_table(table: Tensor, path: Path) -> int:
    """The number of timesteps; raises CheckpointError for another table than that of the code."""
    timesteps, channels = table.shape
    expected = sinusoids(torch.arange(timesteps), channels, "interleaved")
    if not torch.allclose(table, expected, atol=2e-3):
        raise CheckpointError(
            f"{path}: its table of sinusoids is not pytorch-ddpm's; this is a checkpoint of changed code."
        )
    return timesteps


def _check_expressible(snapshot: Snapshot) -> None:
    """Raise ConfigError for what pytorch-ddpm's network or schedule does not have."""
    model, diffusion = snapshot.model, snapshot.diffusion
    check_fields(model, "pytorch-ddpm")
    check_groups(model, "pytorch-ddpm")
    if diffusion.objective.partition(":")[0] not in _MEANS.values() or "label_scale" in diffusion.objective:
        raise ConfigError(f"--format pytorch-ddpm: it knows no --diffusion.objective={diffusion.objective}.")
    if diffusion.variance not in ("fixed-large", "fixed-small"):
        raise ConfigError(f"--format pytorch-ddpm: it knows no --diffusion.variance={diffusion.variance}.")
    schedule = Schedule.parse(diffusion.schedule)
    if not isinstance(schedule, Linear) or schedule.scaled:
        raise ConfigError(f"--format pytorch-ddpm: it knows the linear schedule alone, not {diffusion.schedule}.")
    if snapshot.shape[0] != 3:
        raise ConfigError(f"--format pytorch-ddpm: its images have 3 channels, not {snapshot.shape[0]}.")
