"""Adam's state as PyTorch saves it, where parameters have numbers, not names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.errors import CheckpointError
from ddpm.formats.base import Snapshot
from ddpm.formats.names import Rule

_MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_ours(optim: Mapping[str, Any], names: Sequence[str], rules: Sequence[Rule], path: Path) -> dict[str, Tensor]:
    """Adam's tensors by our names, where `names` are their parameters in order; {} where it has not stepped.

    Raises CheckpointError: a parameter without state.
    """
    held = optim["state"]
    if not held:
        return {}
    by_name = {names[int(index)]: values for index, values in held.items() if int(index) < len(names)}
    found: dict[str, Tensor] = {}
    for rule in rules:
        if missing := [name for name in rule.theirs if name not in by_name]:
            raise CheckpointError(f"{path}: its optimizer has no state for {missing[0]}.")
        values = [by_name[name] for name in rule.theirs]
        found[f"{rule.ours}.step"] = torch.as_tensor(float(values[0]["step"]))
        for key in _MOMENTS:
            found[f"{rule.ours}.{key}"] = rule.join([value[key] for value in values]).contiguous()
    return found


def adam_theirs(snapshot: Snapshot, names: Sequence[str], rules: Sequence[Rule]) -> dict[str, Any]:
    """Adam's state_dict over their parameters in order; those that no rule names, frozen ones, have no state."""
    numbers = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for rule in rules if snapshot.optimizer else ():
        pieces = {key: rule.split(snapshot.optimizer[f"{rule.ours}.{key}"]) for key in _MOMENTS}
        for place, name in enumerate(rule.theirs):
            state[numbers[name]] = {
                "step": snapshot.optimizer[f"{rule.ours}.step"].clone(),
                **{key: values[place].contiguous() for key, values in pieces.items()},
            }
    group = {
        "lr": snapshot.train.get("lr", 2e-4),
        "betas": tuple(snapshot.train.get("betas", (0.9, 0.999))),
        "eps": snapshot.train.get("adam_eps", 1e-8),
        "weight_decay": snapshot.train.get("weight_decay", 0.0),
        "amsgrad": False,
        "params": list(range(len(names))),
    }
    return {"state": state, "param_groups": [group]}


def adam_fields(optim: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of TrainConfig that it says."""
    group = optim["param_groups"][0]
    return {
        "lr": float(group.get("initial_lr", group["lr"])),
        "betas": tuple(group["betas"]),
        "adam_eps": float(group["eps"]),
    }
