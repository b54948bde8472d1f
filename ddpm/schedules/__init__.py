"""Noise schedules, one file per family; a file here is all that adding one takes."""

from ddpm.registry import import_submodules
from ddpm.schedules.base import (
    Beta,
    DiscreteSchedule,
    Level,
    Schedule,
    Timesteps,
    broadcast,
    need_table,
    posterior,
    posterior_coefficients,
    posterior_variance,
    step_variance,
)
from ddpm.schedules.continuous import ContinuousSchedule, VarianceExploding
from ddpm.schedules.cosine import Cosine
from ddpm.schedules.linear import Linear

import_submodules(__name__, __path__)

__all__ = [
    "Beta",
    "ContinuousSchedule",
    "Cosine",
    "DiscreteSchedule",
    "Level",
    "Linear",
    "Schedule",
    "Timesteps",
    "VarianceExploding",
    "broadcast",
    "need_table",
    "posterior",
    "posterior_coefficients",
    "posterior_variance",
    "step_variance",
]
