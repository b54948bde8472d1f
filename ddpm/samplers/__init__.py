"""Samplers, one file per family; a file here is all that adding one takes."""

from ddpm.registry import import_submodules
from ddpm.samplers.base import Denoise, History, OnStep, Sampler
from ddpm.samplers.grids import Grid
from ddpm.samplers.thresholding import OfModel, Thresholding

import_submodules(__name__, __path__)

__all__ = ["Denoise", "Grid", "History", "OfModel", "OnStep", "Sampler", "Thresholding"]
