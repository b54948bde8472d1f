"""The UCI handwritten digits that the package carries: real images with no download."""

from pathlib import Path

import numpy as np

from ddpm.config import DataConfig
from ddpm.data.base import Dataset, ImageSet, in_split
from ddpm.registry import register

ASSET = Path(__file__).parent.parent / "assets" / "digits.npz"


@register("digits")
class Digits(Dataset):
    """1,797 grey 8x8 images of ten classes (Alpaydin and Kaynak, UCI repository, 1998; CC BY 4.0).

    Their levels 0..16 become 0..255. Of each class every fifth image is the test part.
    """

    reads = ()

    def load(self, config: DataConfig) -> ImageSet:
        with np.load(ASSET, allow_pickle=False) as asset:
            levels, labels = asset["images"], asset["labels"].astype(np.int64)
        images = ((levels.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)[:, None]
        chosen = in_split(labels, config.split)
        return ImageSet("digits", images[chosen], labels[chosen], tuple("0123456789"))
