"""Features of a set of images, taken once and kept on disk, and their moments."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.console import Console
from ddpm.data.base import ImageSet
from ddpm.data.places import cache_root
from ddpm.distributed import World
from ddpm.evaluation.features import Features as Extractor
from ddpm.evaluation.metrics import Features, blocks
from ddpm.evaluation.statistics import Moments, ReferenceStatistics
from ddpm.evaluation.store import Store, extract, feature_arrays


@dataclass(frozen=True, eq=False)
class Side:
    """One of two sets: features (N, D), logits (N, K) where the extractor has them, and the images they are of."""

    features: Features
    logits: Features | None
    images: ImageSet


def cached_side(found: ImageSet, extractor: Extractor, world: World, say: Console, what: str) -> Side:
    """The features of images that are on disk, kept in the cache by their contents; every process must call."""
    folder = cache_root() / "features" / f"{found.fingerprint[:16]}-{extractor_key(extractor)}"
    return side(folder, found, extractor, world, say, what, wait=True)


def side(
    folder: Path,
    found: ImageSet,
    extractor: Extractor,
    world: World,
    say: Console,
    what: str,
    wait: bool = False,
    pixels: NDArray[np.float32] | None = None,
) -> Side:
    """The features of images (of their pixels before rounding, where these are given), in a folder where an earlier call
    may have put some; every process must call."""
    arrays = feature_arrays(extractor, found.shape)
    with Store(folder, len(found), arrays, world, wait) as store, say.counting(what, "images") as tell:
        extract(found.images if pixels is None else pixels, extractor, store, tell)
        store.sync()
        return Side(store.read("features"), store.read("logits") if "logits" in arrays else None, found)


def statistics_of(taken: Side, extractor: Extractor) -> ReferenceStatistics:
    """Mean and covariance of features with their protocol."""
    found = moments(taken.features)
    _, height, width = taken.images.shape
    return ReferenceStatistics(
        mu=found.mean,
        sigma=found.covariance,
        n=found.count,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        image_size=(height, width),
        resize=extractor.resize,
        quantisation="uint8",
    )


def extractor_key(extractor: Extractor) -> str:
    """A folder's name for features of an extractor: another protocol has another."""
    return f"{extractor.name}-{digest(extractor.facts)}"


def moments(features: Features) -> Moments:
    """Of features (N, D), a block at a time."""
    found = Moments(features.shape[1])
    for _, block in blocks(features):
        found.add(block)
    return found


def digest(facts: Mapping[str, Any]) -> str:
    """Eight digits for JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
