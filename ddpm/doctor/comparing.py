"""Images drawn beside real ones: their nearest neighbours, and what a judge of real images takes them for."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.data import ImageSet
from ddpm.doctor.evidence import Float64
from ddpm.doctor.exam import Judged, Neighbours, Pixels
from ddpm.evaluation.features import Features
from ddpm.evaluation.references import subset
from ddpm.images import grid
from ddpm.randomness import permutation

MOST_IMAGES = 10_000
"""Real images that neighbours are looked for among, at most."""

MOST_QUERIES = 1000
"""Real images whose neighbours are looked for, at most."""

FEW = 50
"""Distinct images below which a model can do nothing but copy."""

BLOCK_NUMBERS = 20_000_000
PAIRS = 6

Labels = NDArray[np.int64]


def some(images: ImageSet, most: int) -> ImageSet:
    """At most so many of the images, always the same ones, in their order."""
    if len(images) <= most:
        return images
    return subset(images, np.sort(permutation(0, 0, len(images))[:most].numpy()))


def distinct(images: Pixels) -> NDArray[np.int64]:
    """Rows of the first of every set of equal images (N, C, H, W)."""
    seen: dict[int, int] = {}
    for row, image in enumerate(images):
        seen.setdefault(hash(image.tobytes()), row)
    return np.array(list(seen.values()))


def two_nearest(queries: Pixels, references: Pixels) -> tuple[NDArray[np.int64], Float64]:
    """(places, distances), both (n, 2): the nearest and second nearest of at least two references, a block at a time.

    Distances are root mean square differences of pixels, in grey levels.
    """
    n, d = len(queries), queries[0].size
    flat, step = queries.reshape(n, d).astype(np.float32) - 127.5, max(2, BLOCK_NUMBERS // d)
    places, distances = np.zeros((n, 0), np.int64), np.zeros((n, 0))
    for start in range(0, len(references), step):
        part = references[start : start + step].reshape(-1, d).astype(np.float32) - 127.5
        squares = np.einsum("ij,ij->i", part, part) - 2.0 * flat @ part.T
        near = (
            np.argsort(squares, axis=1, kind="stable")[:, :2]
            if part.shape[0] <= 2
            else np.argpartition(squares, 1, axis=1)[:, :2]
        )
        gaps = flat[:, None].astype(np.float64) - part[near]
        exact = np.sqrt(np.einsum("ijk,ijk->ij", gaps, gaps) / d)
        places, distances = np.hstack([places, near + start]), np.hstack([distances, exact])
        order = np.argsort(distances, axis=1, kind="stable")[:, :2]
        places, distances = np.take_along_axis(places, order, axis=1), np.take_along_axis(distances, order, axis=1)
    return places, distances


def neighbours(drawn: Pixels, train: ImageSet, held_out: ImageSet | None) -> Neighbours | None:
    """Real images nearest to those drawn, each distinct one counted once; None with fewer than three trained ones.

    Without held-out images, a trained one stands for an image that was not, its nearest other being what it is to be compared
    with. Equal images count there: where so many real images recur, drawn ones may. (But `FEW` images recurring are no set.)
    """
    all_trained = some(train, MOST_IMAGES).images
    trained = _distinct(all_trained)
    if len(trained) < 3:
        return None
    places, near = two_nearest(drawn, trained)
    closest = np.argsort(near[:, 0], kind="stable")[:PAIRS]
    pairs = np.stack([drawn[closest], trained[places[closest, 0]]], axis=1).reshape(-1, *train.shape)
    others = None if held_out is None else _distinct(some(held_out, MOST_IMAGES).images)
    if held_out is None or others is None or len(others) < 2:
        known = all_trained if len(trained) >= FEW else trained
        real, prior, held = two_nearest(known[:MOST_QUERIES], known)[1][:, 1], 1.0, None
    else:
        real, prior = (
            two_nearest(some(held_out, MOST_QUERIES).images, trained)[1][:, 0],
            len(trained) / (len(trained) + len(others)),
        )
        held = two_nearest(drawn, others)[1][:, 0]
    return Neighbours(
        nearest=near[:, 0], second=near[:, 1], held_out=held, real=real, prior=prior, pairs=grid(pairs, 2)
    )


def _distinct(images: Pixels) -> Pixels:
    return images[distinct(images)]


def judged(
    drawn: Pixels, asked: Labels | None, train: ImageSet, held_out: ImageSet | None, classifier: Features | None
) -> Judged | None:
    """What a classifier with the data set's classes takes the images for, else their nearest training images; None without labels.

    Held-out images say how good the judge is; without them half of the training images do.
    """
    known, real = some(train, MOST_IMAGES), held_out
    if real is None or real.labels is None:
        halves = np.array_split(permutation(0, 1, len(known)).numpy(), 2)
        known, real = subset(known, halves[0]), subset(known, halves[1])
    if known.labels is None or real.labels is None or min(len(known), len(real)) < 2:
        return None
    real = some(real, MOST_QUERIES)
    judge = _nearest_label(known) if classifier is None else _classifier(classifier)
    name = "the nearest training image" if classifier is None else classifier.name
    return Judged(name, judge(drawn), asked, judge(real.images), np.asarray(real.labels))


def _nearest_label(known: ImageSet) -> Callable[[Pixels], Labels]:
    labels = known.labels
    assert labels is not None
    return lambda images: labels[two_nearest(images, known.images)[0][:, 0]]


def _classifier(features: Features) -> Callable[[Pixels], Labels]:
    def judge(images: Pixels) -> Labels:
        _, logits = features.features(torch.from_numpy(np.array(images)))
        assert logits is not None
        found: Labels = logits.argmax(dim=1).numpy()
        return found

    return judge


def label_agreement(images: ImageSet) -> tuple[tuple[int, int], float]:
    """((hits, trials), share by chance) of "an image's nearest other image has its label"; the images have labels, two at least."""
    found = some(images, 2 * MOST_QUERIES)
    rows = distinct(found.images)
    assert found.labels is not None
    labels, pixels = found.labels[rows], found.images[rows]
    places, _ = two_nearest(pixels, pixels)
    other = np.where(places[:, 0] == np.arange(len(rows)), places[:, 1], places[:, 0])
    shares = np.bincount(labels) / len(labels)
    return (int((labels[other] == labels).sum()), len(labels)), float(shares @ shares)
