"""From features to named numbers: which metrics there are, what each needs, what it is called and what it means.

A number is called after its extractor: FID, KID and IS are said of `inception-tf` alone; `fd_tiny-cnn` is another scale.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ddpm.evaluation
from ddpm.data.base import ImageSet
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.copies import Copies, compare_copies
from ddpm.evaluation.features import FeatureExtractor
from ddpm.evaluation.features import Features as Extractor
from ddpm.evaluation.frechet import frechet_distance, frechet_estimate
from ddpm.evaluation.inception_score import inception_score
from ddpm.evaluation.kernel_distance import kernel_distance
from ddpm.evaluation.metrics import Estimate, Features, blocks, by_class
from ddpm.evaluation.prdc import precision_recall_density_coverage
from ddpm.evaluation.sides import Side, moments
from ddpm.evaluation.statistics import ReferenceStatistics
from ddpm.evaluation.tiny_cnn import default_extractor
from ddpm.randomness import permutation
from ddpm.registry import import_submodules, nearest

METRICS = ("fd", "kid", "is", "pr", "classes", "memorisation")
MOST = 10_000
"""Images that kid, pr and memorisation take of larger sets: a subset seeded with 0."""
NEIGHBOURS = 5

_NAMED = {"fd": "FID", "kid": "KID", "is": "IS"}
_MEANING = {
    "fd": "distance to the reference: lower is better; grows as images become fewer",
    "kid": "distance to the reference by a kernel: lower is better, about 0 for equal",
    "is": "clear and varied classes: higher is better",
    "precision": "share of images that look like the reference",
    "recall": "share of the reference that images come near to",
    "density": "how densely the reference surrounds images: about 1 for equal",
    "coverage": "share of the reference that has an image near it",
    "nearest_train": "mean pixel distance to the nearest training image, of 255",
    "nearest_held_out": "the same for real images that were held out",
    "copies": "share nearer to a training image than 99 % of held-out ones: 0.01 without copying",
}


@dataclass
class Scores:
    """What was found: metric name -> estimate, and by class; notes on what was left out; how it was done."""

    values: dict[str, Estimate] = field(default_factory=dict)
    classes: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    pairs: NDArray[np.uint8] | None = None


def open_extractor(spec: str | None, weights: Path | None, dataset: str, device: torch.device | str) -> Extractor:
    """The extractor of a spec; None: the data set's default. `weights` is the file it reads.

    Raises ConfigError, MissingDependencyError, DataError.
    """
    _import_extractors()
    chosen = FeatureExtractor.parse(default_extractor(dataset) if spec is None or spec == "auto" else spec)
    if weights is not None:
        options = {option.name for option in dataclasses.fields(chosen)}  # type: ignore[arg-type]
        takes = next((name for name in ("weights", "path") if name in options), None)
        if takes is None:
            raise ConfigError(f"--weights: the extractor {chosen.name} reads no file; leave it out.")
        chosen = dataclasses.replace(chosen, **{takes: weights, **({"data": None} if "data" in options else {})})  # type: ignore[type-var]
    return chosen.open(device)


@cache
def _import_extractors() -> None:
    import_submodules(ddpm.evaluation.__name__, ddpm.evaluation.__path__)


def named(metric: str, extractor: str) -> str:
    """('fd', 'inception-tf') -> 'FID', ('fd', 'tiny-cnn') -> 'fd_tiny-cnn'."""
    return _NAMED[metric] if extractor == "inception-tf" and metric in _NAMED else f"{metric}_{extractor}"


def meaning(name: str) -> str:
    """What a named number says, in a few words."""
    plain = {written: metric for metric, written in _NAMED.items()}
    return _MEANING.get(plain.get(name, name.partition("_")[0]), _MEANING.get(name, ""))


@dataclass(frozen=True)
class Facts:
    """What is known of both sets before any image is drawn: how many, what they come with."""

    images: int | None
    references: int | None
    has_logits: bool
    splits: int
    same_shape: bool
    classes: str = ""

    def missing(self, metric: str) -> str:
        """What a metric lacks, or ""."""
        if metric != "fd" and self.images is None:
            return "needs images, and these are statistics"
        if metric not in ("fd", "is") and self.references is None:
            return "needs reference images, and the reference is statistics alone"
        if metric == "is" and not self.has_logits:
            return "needs an extractor with classes; choose another with --extractor"
        if metric == "memorisation" and not self.same_shape:
            return "needs a reference of the same image size"
        if metric == "classes" and self.classes:
            return self.classes
        least = {"is": self.splits, "pr": NEIGHBOURS + 1}.get(metric, 2)
        for count, what in ((self.images, "images"), (None if metric == "is" else self.references, "reference images")):
            if count is not None and count < least:
                return f"needs at least {least} {what}, and there are {count}; add some"
        return ""


def choose(asked: Sequence[str] | None, facts: Facts) -> tuple[list[str], list[str]]:
    """(metrics to compute, notes on those left out): all that can be had, or those asked for.

    Raises ConfigError (no such metric), DataError (one asked for cannot be had, or the distance cannot).
    """
    for metric in asked or ():
        if metric not in METRICS:
            raise ConfigError(
                f"--metrics: {metric!r} is no metric{nearest(metric, METRICS)}; choose from {','.join(METRICS)}."
            )
    reasons = {metric: facts.missing(metric) for metric in METRICS if asked is None or metric in asked}
    chosen = [metric for metric, reason in reasons.items() if not reason]
    for metric, reason in reasons.items():
        if reason and (asked is not None or metric == "fd"):
            raise DataError(f"the metric {metric} {reason}.")
    left_out: dict[str, list[str]] = {}
    for metric, reason in reasons.items():
        left_out.setdefault(reason, []).append(metric)
    return chosen, [f"left out: {', '.join(names)} ({reason})." for reason, names in left_out.items() if reason]


def comparable_classes(classes: tuple[str, ...], reference: ImageSet | None) -> str:
    """Why classes cannot be compared one by one, or "". Classes of an .npz file are numbers, which fit any names."""
    if reference is None or reference.labels is None:
        return "needs a reference with classes"
    if not classes:
        return "needs images with classes"
    numbers = classes == tuple(map(str, range(len(classes)))) and len(classes) <= reference.num_classes
    if classes != reference.classes and not numbers:
        return "needs the same classes on both sides"
    return ""


def score(
    metrics: Sequence[str],
    extractor: str,
    ours: Side,
    reference: Side | None,
    statistics: ReferenceStatistics,
    held_out: ImageSet | None,
    splits: int = 10,
) -> Scores:
    """Compute metrics of features against those of a reference (None: its statistics alone). Raises DataError."""
    found = Scores()
    name = partial(named, extractor=extractor)
    same = reference is not None and _same(ours.features, reference.features)
    if "fd" in metrics:
        fd = frechet_estimate(ours.features, statistics.mu, statistics.sigma)
        found.values[name("fd")] = Estimate(0.0, 0.0, 0.0) if same else fd
    if "kid" in metrics and reference is not None:
        kid = _kid(ours.features, reference.features, found.settings)
        found.values[name("kid")] = Estimate(0.0, 0.0, 0.0) if same else kid
    if "is" in metrics and ours.logits is not None:
        found.values[name("is")] = inception_score(ours.logits, splits, seed=0)
        found.settings["splits"] = splits
    if "pr" in metrics and reference is not None:
        _add_shares(found, name, ours.features, reference.features)
    if "classes" in metrics and reference is not None:
        _add_classes(found, name, ours, reference, same)
    if "memorisation" in metrics and reference is not None:
        _add_memorisation(found, ours.images, reference.images, held_out)
    if same:
        found.notes.append("these are the very images of the reference: distances are 0, not estimates.")
    return found


def score_statistics(ours: ReferenceStatistics, reference: ReferenceStatistics, extractor: str) -> Scores:
    """The Frechet distance of statistics, without an interval."""
    value = frechet_distance(ours.mu, ours.sigma, reference.mu, reference.sigma)
    return Scores({named("fd", extractor): Estimate(value)})


def some(count: int, most: int = MOST) -> NDArray[np.int64] | slice:
    """Which of `count` rows to take: all, or a seeded subset of `most`, rising."""
    return slice(None) if count <= most else np.sort(permutation(0, 0, count).numpy()[:most])


def _same(a: Features, b: Features) -> bool:
    """Whether two sets are one: then a distance between samples is 0, and an unbiased estimate would be below it."""
    return a.shape == b.shape and all(np.array_equal(block, b[where]) for where, block in blocks(a))


def _kid(features: Features, reference: Features, settings: dict[str, Any]) -> Estimate:
    ours, theirs = (x[some(len(x))] for x in (features, reference))
    settings["kid_images"], settings["kid_reference_images"] = len(ours), len(theirs)
    return kernel_distance(ours, theirs)


def _add_shares(found: Scores, name: Any, features: Features, reference: Features) -> None:
    """Precision and its kin depend on how many there are, so both sides give the same number."""
    count = min(len(features), len(reference), MOST)
    ours, theirs = (x[some(len(x), count)] for x in (features, reference))
    found.settings |= {"pr_images": count, "pr_neighbours": NEIGHBOURS}
    shares = precision_recall_density_coverage(ours, theirs, NEIGHBOURS)
    found.values |= {name(which): getattr(shares, which) for which in ("precision", "recall", "density", "coverage")}


def _add_classes(found: Scores, name: Any, ours: Side, reference: Side, same: bool) -> None:
    labels, theirs = ours.images.labels, reference.images.labels
    assert labels is not None and theirs is not None
    classes = reference.images.classes
    zero = Estimate(0.0, 0.0, 0.0)
    for metric, compute in (("fd", _class_fd), ("kid", kernel_distance)):
        results = by_class(compute, ours.features, labels, reference.features, theirs)
        if results.results:
            values = {classes[k]: zero if same else value for k, value in results.results.items()}
            found.classes[name(metric)] = values
        for k, why in list(results.left_out.items())[:1]:
            more = f" (and {len(results.left_out) - 1} more)" if len(results.left_out) > 1 else ""
            found.notes.append(f"{name(metric)} of class {classes[k]}{more} left out: {why}")


def _class_fd(features: Features, reference: Features) -> Estimate:
    """The Frechet distance of a class; with no more images than features it is bias above all."""
    fewest, width = min(len(features), len(reference)), features.shape[1]
    if fewest <= width:
        raise DataError(f"it has {fewest} images, and a distance of {width} features needs more than {width}.")
    found = moments(reference)
    return frechet_estimate(features, found.mean, found.covariance)


def _add_memorisation(found: Scores, images: ImageSet, train: ImageSet, held_out: ImageSet | None) -> None:
    result: Copies = compare_copies(np.asarray(images.images[some(len(images))]), train, held_out)
    found.settings["memorisation_images"] = min(len(images), MOST)
    found.values |= {
        key: value
        for key in ("nearest_train", "nearest_held_out", "copies")
        if (value := getattr(result, key)) is not None
    }
    found.pairs = result.pairs
    if held_out is None:
        found.notes.append("nothing was held out of the reference, so copies cannot be told from near neighbours.")
