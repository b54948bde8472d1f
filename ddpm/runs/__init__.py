"""Wiring: one function a verb; every component is built and every path resolved here before any work starts."""

from ddpm.runs.demonstration import demo
from ddpm.runs.drawing import SampleResult, draw_images, sample
from ddpm.runs.loading import Model, find_checkpoint, load
from ddpm.runs.showing import contact_sheet, data_info, data_prepare, info
from ddpm.runs.training import TrainResult, train

__all__ = [
    "Model",
    "SampleResult",
    "TrainResult",
    "contact_sheet",
    "data_info",
    "data_prepare",
    "demo",
    "draw_images",
    "find_checkpoint",
    "info",
    "load",
    "sample",
    "train",
]
