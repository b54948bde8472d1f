"""Images to learn from: the data sets, each a file of its own, and `load_dataset`, the way in."""

from ddpm.data.base import Dataset, ImageSet, Skipped, load_dataset
from ddpm.registry import import_submodules

__all__ = ["Dataset", "ImageSet", "Skipped", "load_dataset"]

import_submodules(__name__, __path__)
