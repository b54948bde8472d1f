"""Figures that others have published, and the protocol under which ours may stand beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published figure: who, the metric's name as in evaluations.jsonl, its value, network evaluations, source, and
    whether pixels were rounded to 8 bits (`--no-quantise` scores them unrounded)."""

    who: str
    metric: str
    value: float
    evaluations: int
    source: str
    quantisation: str = "uint8"


_HO = "Ho et al. 2020, table 1"
_DDIM = "Song et al. 2021 (DDIM), table 1"
_EDM = "Karras et al. 2022 (EDM), table 2"
_TORCH = "README of github.com/w86763777/pytorch-ddpm"
_TQCH = "README of github.com/tqch/ddpm-torch"

CIFAR10 = (
    Published("DDPM", "FID", 3.17, 1000, _HO, "none"),
    Published("DDPM", "IS", 9.46, 1000, _HO, "none"),
    Published("pytorch-ddpm", "FID", 3.249, 1000, _TORCH, "none"),
    Published("pytorch-ddpm", "IS", 9.475, 1000, _TORCH, "none"),
    Published("ddpm-torch", "FID", 3.188, 1000, _TQCH),
    Published("DDIM, eta = 0", "FID", 13.36, 10, _DDIM),
    Published("DDIM, eta = 0", "FID", 6.84, 20, _DDIM),
    Published("DDIM, eta = 0", "FID", 4.67, 50, _DDIM),
    Published("DDIM, eta = 0", "FID", 4.16, 100, _DDIM),
    Published("DDIM, eta = 0", "FID", 4.04, 1000, _DDIM),
    Published("EDM, unconditional", "FID", 1.97, 35, _EDM),
    Published("EDM, class-conditional", "FID", 1.79, 35, _EDM),
)
"""CIFAR-10: 50,000 images against the 50,000 training images, by TensorFlow's Inception."""


def published(record: Mapping[str, Any]) -> tuple[Published, ...]:
    """The figures that a line of evaluations.jsonl may be held against: those of its very protocol, mostly none."""
    reference = record["reference"]
    matches = (
        record["extractor"]["extractor"] == "inception-tf"
        and record["num_images"] == 50_000
        and reference.get("name") == "cifar10"
        and reference.get("n") == 50_000
    )
    return tuple(figure for figure in CIFAR10 if matches and figure.quantisation == record["quantisation"])
