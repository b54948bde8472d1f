"""Everything that is measured of a model, in order: on training images, on held-out ones, on images that it draws."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.console import Console
from ddpm.data import ImageSet
from ddpm.doctor.comparing import judged, label_agreement, neighbours, some
from ddpm.doctor.drawing import Recipe, draw_twice, finer
from ddpm.doctor.evidence import Float64
from ddpm.doctor.exam import Average, Exam, LabelLosses, Pixels, Samples
from ddpm.doctor.linear import LinearDenoiser, largest_moment
from ddpm.doctor.measuring import LEVELS, OBJECTIVES, RANGES, Patient, levels_of
from ddpm.evaluation.features import Features
from ddpm.evaluation.protocol import comparable_classes
from ddpm.evaluation.references import subset
from ddpm.images import to_float
from ddpm.models import NO_LABEL, GaussianDiffusion
from ddpm.objectives import Objective
from ddpm.randomness import permutation
from ddpm.runtime import Runtime
from ddpm.schedules import Level
from ddpm.training.trainer import load_weights

TRIED = 32
"""Images that every variant is tried on."""

FITTED = 1024
"""Images that the linear denoiser is fitted to."""

CANDIDATES = 10
"""Labels that an image is tried with, its own among them."""

LEAST = 8
"""Images that can be learnt from, at least."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is examined.

    diffusion: with the weights that images are drawn by, in eval mode, on the machine's device; weights: the weights
    themselves, where those are a moving average; average: how the two compare; recipe, seeds: how images are drawn;
    train, held_out: real images of the model's size, None where they could not be had; classifier: with their classes;
    differs, other_images, metrics, missing: as in `Exam`.
    """

    diffusion: GaussianDiffusion
    machine: Runtime
    recipe: Recipe
    seeds: range
    classes: Sequence[str] = ()
    weights: Mapping[str, Tensor] | None = None
    average: Average | None = None
    train: ImageSet | None = None
    held_out: ImageSet | None = None
    classifier: Features | None = None
    differs: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    other_images: bool = False
    metrics: Sequence[Mapping[str, float]] = ()
    missing: Sequence[str] = ()


def measure(subject: Subject, say: Console) -> Exam:
    """Try the network, draw images, compare; nothing is judged yet. Raises ConfigError for images that cannot be drawn."""
    level = levels_of(subject.diffusion.schedule)
    facts: dict[str, Any] = {"missing": list(subject.missing)}
    for name in ("classes", "differs", "other_images", "average", "metrics"):
        facts[name] = getattr(subject, name)
    if subject.train is not None and len(subject.train) >= LEAST:
        facts |= _Trials(subject, subject.train, level, say).measured()
    facts["samples"] = _samples(subject, level, say)
    if subject.train is not None and subject.train.shape == subject.diffusion.shape:
        drawn, asked = facts["samples"].images, facts["samples"].labels
        facts["neighbours"] = neighbours(drawn, subject.train, subject.held_out)
        if asked is None or not comparable_classes(tuple(subject.classes), subject.train):
            facts["judged"] = judged(drawn, asked, subject.train, subject.held_out, subject.classifier)
    return Exam(schedule=subject.diffusion.schedule, level=level, **facts)


class _Trials:
    """What the network makes of real images."""

    def __init__(self, subject: Subject, train: ImageSet, level: Level, say: Console) -> None:
        self.subject, self.train, self.level, self.say = subject, train, level, say
        rows = permutation(0, 0, len(train)).numpy()
        self.tried = subset(train, rows[:TRIED])
        self.rest = subset(train, rows[TRIED : TRIED + FITTED] if len(train) >= 3 * TRIED else rows)
        held = subject.held_out
        self.held = (
            subset(held, permutation(0, 0, len(held))[:TRIED].numpy())
            if held is not None and len(held) >= LEAST
            else None
        )
        self.bar: Any = None

    def measured(self) -> dict[str, Any]:
        """Fields of `Exam`."""
        orders = list(itertools.permutations(range(3)))[1:] if self.train.shape[0] == 3 else []
        objectives = [name for name in OBJECTIVES if self.subject.diffusion.objective.name in OBJECTIVES]
        objectives = [name for name in objectives if name != self.subject.diffusion.objective.name]
        offsets = self._offsets()
        variants = 2 + len(RANGES) + len(orders) + len(objectives) + LEVELS + len(offsets)
        fit = _floats(self.rest)
        linear = LinearDenoiser.fit(fit)
        with self.say.progress("trying the network", variants * LEVELS * TRIED, "images") as self.bar:
            patient = self._patient(self.tried)
            fitted = patient.losses(linear)
            held = None if self.held is None else self._patient(self.held).losses(linear)
            return {
                "data": some(self.train, FITTED).images,
                "fitted": fitted,
                "held": held,
                "raw": self._raw(),
                "ranges": {
                    name: self._patient(self.tried, way).losses(LinearDenoiser.fit(way(fit)))
                    for name, way in RANGES.items()
                },
                "permuted": {
                    order: self._patient(self.tried, lambda x, to=order: x[:, list(to)]).model_losses()
                    for order in orders
                },
                "objectives": {name: patient.losses(linear, Objective.parse(name)) for name in objectives},
                "by_time": patient.by_time(),
                "moment": largest_moment(fit),
                "labels": self._labels(offsets, fit, fitted.power) if offsets else None,
            }

    def _patient(self, images: ImageSet, way: Any = lambda x: x) -> Patient:
        model = self.subject.diffusion
        labels = None
        if model.num_classes:
            known = images.labels if self._knows_classes() else np.full(len(images), NO_LABEL)
            labels = torch.from_numpy(np.array(known))
        return Patient(model, way(_floats(images)), labels, self.level, self.bar.advance)

    def _knows_classes(self) -> bool:
        """Whether the images' labels are those that the model was trained with."""
        classes = tuple(self.subject.classes)
        return len(classes) == self.train.num_classes and not comparable_classes(classes, self.train)

    def _raw(self) -> Float64 | None:
        """Losses of the weights themselves."""
        if self.subject.weights is None:
            return None
        patient = self._patient(self.held or self.tried)
        model = copy.deepcopy(self.subject.diffusion)
        load_weights(model, self.subject.weights)
        return Patient(model, patient.images, patient.labels, self.level).model_losses()

    def _offsets(self) -> list[int]:
        """What is added to a label for each candidate, the label itself first; [] where labels say nothing."""
        count = self.subject.diffusion.num_classes
        if count < 2 or not self._knows_classes():
            return []
        others = 1 + permutation(0, 1, count - 1)[: CANDIDATES - 1].numpy()
        return [0, *sorted(others.tolist())]

    def _labels(self, offsets: list[int], fit: Tensor, power: Float64) -> LabelLosses:
        """On held-out images where there are some: labels of images that were trained on may be known by heart."""
        images, count = self.held or self.tried, self.subject.diffusion.num_classes
        assert images.labels is not None and self.rest.labels is not None
        candidates: NDArray[np.int64] = (images.labels[:, None] + np.array(offsets)) % count
        classes = LinearDenoiser.fit(fit, torch.from_numpy(np.array(self.rest.labels)), count)
        model, linear = self._patient(images).by_label(candidates, classes, power)
        agreement, by_chance = label_agreement(self.train)
        return LabelLosses(model, linear, candidates, agreement, by_chance)


def _samples(subject: Subject, level: Level, say: Console) -> Samples:
    model, recipe, n = subject.diffusion, subject.recipe, len(subject.seeds)
    with say.progress("drawing", n, "images") as bar:
        drawn = draw_twice(model, recipe, subject.machine, subject.seeds, bar.advance)
    labels = torch.from_numpy(drawn.labels) if drawn.labels is not None and model.num_classes else None

    def patient(images: Pixels) -> Patient:
        return Patient(model, to_float(torch.from_numpy(images)), labels, level, bar.advance)

    with say.progress("trying the network on them", (1 + (drawn.finer is not None)) * LEVELS * n, "images") as bar:
        losses, power = patient(drawn.images).losses_and_power()
        finer_losses = None if drawn.finer is None else patient(drawn.finer).model_losses()
    twin = finer(recipe.sampler, model.schedule)
    return Samples(
        images=drawn.images,
        labels=drawn.labels,
        out_of_range=drawn.out_of_range,
        thresholding=recipe.rule.spec,
        steps=recipe.sampler.count(model.schedule),
        finer_steps=0 if twin is None else twin.count(model.schedule),
        losses=losses,
        power=power,
        finer_losses=finer_losses,
    )


def _floats(images: ImageSet) -> Tensor:
    return to_float(torch.from_numpy(np.array(images.images)))
