"""Wiring: one function a verb; every component is built and every path resolved here before any work starts."""

from ddpm.runs.comparing import metrics
from ddpm.runs.demonstration import demo
from ddpm.runs.diagnosing import Diagnosis, diagnose
from ddpm.runs.drawing import SampleResult, draw_images, sample
from ddpm.runs.editing import editor
from ddpm.runs.evaluating import Evaluation, evaluate, stats
from ddpm.runs.exchanging import export_checkpoint, import_checkpoint
from ddpm.runs.likelihoods import likelihood
from ddpm.runs.loading import Model, find_checkpoint, load
from ddpm.runs.showing import contact_sheet, data_info, data_prepare, info
from ddpm.runs.sweeping import Sweep, sweep
from ddpm.runs.training import TrainResult, train

__all__ = [
    "Diagnosis",
    "Evaluation",
    "Model",
    "SampleResult",
    "Sweep",
    "TrainResult",
    "contact_sheet",
    "data_info",
    "data_prepare",
    "demo",
    "diagnose",
    "draw_images",
    "editor",
    "evaluate",
    "export_checkpoint",
    "find_checkpoint",
    "import_checkpoint",
    "info",
    "likelihood",
    "load",
    "metrics",
    "sample",
    "stats",
    "sweep",
    "train",
]
