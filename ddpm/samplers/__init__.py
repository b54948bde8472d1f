"""Samplers, one file per family; a file here is all that adding one takes."""

from ddpm.registry import import_submodules
from ddpm.samplers.base import Denoise, OfModel, OnStep, Sampler, Thresholding
from ddpm.samplers.grids import Grid

import_submodules(__name__, __path__)

__all__ = ["Denoise", "Grid", "OfModel", "OnStep", "Sampler", "Thresholding"]
