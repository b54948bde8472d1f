"""Checkpoints of other programs, one file per format: found by content, read without executing anything, written back."""

from ddpm.formats.base import Format, Snapshot, Source, identify
from ddpm.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = ["Format", "Snapshot", "Source", "identify"]
