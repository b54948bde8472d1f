"""GaussianDiffusion: a network with its noise schedule and objective; the one object that passes between the lanes."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ddpm.augmentation import Augmentation, Unchanged
from ddpm.errors import ConfigError
from ddpm.losses import Criterion, bound_terms, per_image_loss
from ddpm.objectives import Objective, Prediction
from ddpm.randomness import Stream
from ddpm.schedules import Level, Schedule, need_table, posterior
from ddpm.times import Times
from ddpm.variances import Variance
from ddpm.weightings import Uniform, Weighting

NO_LABEL = -1


class Predictor(Protocol):
    """What a sampler sees of a model; guidance wraps one into another."""

    @property
    def schedule(self) -> Schedule:
        """The noise levels it was trained on."""

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """x0 and eps of noisy images."""


class GaussianDiffusion(nn.Module):
    """A denoising diffusion model (Ho et al. 2020).

    Args:
        network: network(x, noise_label, condition, stream) -> output like x, with twice the channels where the variance is
            learned: the objective's, then the variance's.
        schedule: noise levels.
        objective: what the network predicts.
        shape: (C, H, W) of the images.
        variance: of the reverse process (a variance, or its spec).
        loss: the error, l2, l1 or huber.
        criterion: what training minimises: the error, the variational bound, or both (a criterion, or its spec).
        weighting: of the noise levels in the error (a weighting, or its spec).
        times: how training times are drawn (a component, or its spec).
        num_classes: 0 for an unconditional model.
        label_drop: probability of training without the label, which makes guidance possible.
        thresholding: what samplers do to the predicted x0 unless told otherwise (a thresholding spec).
        augmentation: of the training images; where it has labels, the network takes them as augment=(B, num_labels).

    Its state beside the weights: `eps_square`, (T,) float64, E |eps|^2 / d of the predicted eps at each timestep where the
    variance is `analytic` (NaN until it is estimated), and `history` where `times` learns from past losses.

    Raises ConfigError: parts that need a table of steps, on a continuous schedule.
    """

    eps_square: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        objective: Objective,
        *,
        shape: tuple[int, int, int],
        variance: Variance | str = "fixed-large",
        loss: str = "l2",
        criterion: Criterion | str = "simple",
        weighting: Weighting | str = "uniform",
        times: Times | str = "uniform",
        num_classes: int = 0,
        label_drop: float = 0.0,
        thresholding: str = "clip",
        augmentation: Augmentation = Unchanged(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.objective = network, schedule, objective
        self.shape, self.error, self.criterion = shape, loss, Criterion.parse(criterion)
        self.variance, self.weighting, self.times = (
            Variance.parse(variance),
            Weighting.parse(weighting),
            Times.parse(times),
        )
        self.num_classes, self.label_drop, self.thresholding = num_classes, label_drop, thresholding
        self.augmentation = augmentation
        for part in (self.objective, self.variance, self.times):
            part.check(schedule)
        if self.criterion.of_bound:
            need_table(schedule, f"--diffusion.criterion={self.criterion.name}")
        if self.variance.estimated:
            timesteps = need_table(schedule, self.variance.name).timesteps
            self.register_buffer("eps_square", torch.full((timesteps,), math.nan, dtype=torch.float64))
        self.history = self.times.memory(schedule)

    def q_sample(self, x0: Tensor, level: Level, eps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps (Ho et al. 2020, equation 4); images (B, C, H, W), levels (B,) or ()."""
        at = level.like(x0)
        return at.alpha * x0 + at.sigma * eps

    def q_posterior(self, x0: Tensor, x_t: Tensor, level: Level, previous: Level) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_s | x_t, x0) (Ho et al. 2020, equations 6 and 7); see `ddpm.schedules.posterior`."""
        return posterior(x0, x_t, level, previous)

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """x0 and eps of noisy images; never clipped.

        Args:
            x_t: (B, C, H, W).
            level: levels (B,) or ().
            condition: (B,) int64 labels, -1 for no label; None means no label for all.

        Raises ConfigError: no labels, and the model never trained without. (A -1 among labels on an accelerator is not
        looked for, as that would wait for the device.)
        """
        if self.num_classes and not self.label_drop and _lacks_labels(condition):
            raise ConfigError("this model was trained with --diffusion.label-drop=0, so it needs labels.")
        network_input, noise_label = self.objective.condition(x_t, level)
        if self.num_classes and condition is None:
            condition = torch.full((x_t.shape[0],), NO_LABEL, device=x_t.device)
        output = self.network(network_input, noise_label, condition if self.num_classes else None).to(x_t.dtype)
        return self._read(*self._split(output), x_t, level)

    def do_without_estimate(self) -> None:
        """Where the variance is not estimated yet, let x0 have none: steps have beta-tilde, that of `fixed-small`."""
        if self.variance.estimated:
            self.eps_square.nan_to_num_(nan=2.0)  # more than a mean square can be, so Var(x0 | x_t) is kept to 0

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as the objective's channels and the variance's (None: they are not learned)."""
        found, wanted = output.shape[1], self.shape[0] * (2 if self.variance.learned else 1)
        if found != wanted:
            raise ConfigError(
                f"--model.network gives {found} channels, where --diffusion.variance={self.variance.name} needs {wanted} for "
                f"images of {self.shape[0]}; let it give the out_channels it is made with."
            )
        if not self.variance.learned:
            return output, None
        of_objective, of_variance = output.chunk(2, dim=1)
        return of_objective, of_variance

    def _read(self, output: Tensor, values: Tensor | None, x_t: Tensor, level: Level) -> Prediction:
        """What the network's output says of x_t, with its variance."""
        found = self.objective.to_prediction(output, x_t, level, self.schedule)
        return self.variance.attach(found, self.eps_square if self.variance.estimated else values, level, self.schedule)

    def forward(self, x0: Tensor, labels: Tensor | None, stream: Stream) -> Tensor:
        """`loss`, so that data-parallel wrappers see it."""
        return self.loss(x0, labels, stream)

    def loss(self, x0: Tensor, labels: Tensor | None, stream: Stream) -> Tensor:
        """The training loss of each image (Ho et al. 2020, algorithm 1).

        Args:
            x0: (B, C, H, W) float32 in [-1, 1].
            labels: (B,) int64, or None.
            stream: the batch's random numbers.

        Returns:
            (B,) float32.
        """
        x0, augment = self.augmentation.apply(x0, stream)
        told = {} if augment is None else {"augment": augment}
        t, factor = self.times.draw(stream, self.schedule, self.history)
        level = self.schedule.at(t)
        eps = stream.at("noise").normal(*x0.shape[1:])
        x_t = self.q_sample(x0, level, eps)
        network_input, noise_label = self.objective.condition(x_t, level)
        output = self.network(network_input, noise_label, self._drop_labels(labels, stream), stream, **told)
        output, values = self._split(output.to(x_t.dtype))
        loss = torch.zeros((), device=x0.device)
        if self.criterion.of_error:
            loss = self._error(output, self.objective.target(x0, eps, x_t, level, self.schedule), level)
        if self.criterion.of_bound:
            loss = loss + self.criterion.of_bound * self._bound(output, values, x0, x_t, level)
        return loss if factor is None else loss * factor.float()

    def _error(self, output: Tensor, target: Tensor, level: Level) -> Tensor:
        """(B,) float32: the error of each image, weighted."""
        weight = self.weighting.of(self.objective, level, self.schedule)
        error = per_image_loss(self.error, output, target)
        return error if weight is None else error * weight.float()

    def _bound(self, output: Tensor, values: Tensor | None, x0: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """(B,) float32 bits per dimension: T times one term of the bound, which estimates their sum (Nichol & Dhariwal 2021,
        section 3.3)."""
        schedule = need_table(self.schedule, self.criterion.name)
        found = self._read(output if self.criterion.trains_mean else output.detach(), values, x_t, level)
        terms = bound_terms(x0, level, schedule.at(level.t - 1.0), found, schedule.floor_variance)
        return schedule.timesteps * terms.float()

    @property
    def observe(self) -> Callable[[Tensor, Stream], None] | None:
        """observe(losses, stream), to be told every image's loss of a step's global batch, (B,) in order of place, by the
        stream of them all; None: nothing is learnt from them."""
        return self._observe if self.history is not None else None

    def _observe(self, losses: Tensor, stream: Stream) -> None:
        assert self.history is not None
        t, factor = self.times.draw(stream, self.schedule, self.history)
        self.history.add(t, losses if factor is None else losses / factor.to(losses.dtype))

    def check_training(self) -> None:
        """Raise ConfigError for parts that do not go together in training, each with its reason."""
        criterion, variance = (
            f"--diffusion.criterion={self.criterion.name}",
            f"--diffusion.variance={self.variance.name}",
        )
        if self.variance.learned and not self.criterion.of_bound:
            raise ConfigError(f"{variance} is not trained by {criterion}; use hybrid, or vlb.")
        if not self.criterion.trains_mean and not self.variance.learned:
            raise ConfigError(
                f"{criterion} trains a learned variance, which {variance} is not; use learned-range, or simple."
            )
        if self.criterion.of_bound and self.variance.estimated:
            raise ConfigError(
                f"{criterion} needs a variance from the first step on; {variance} is estimated after the last."
            )
        if not self.criterion.of_error and self.error != "l2":
            raise ConfigError(
                f"{criterion} has its own error, so --diffusion.loss={self.error} would do nothing; leave it out."
            )
        if not self.criterion.of_error and not isinstance(self.weighting, Uniform):
            raise ConfigError(
                f"{criterion} has its own weights, so --diffusion.weighting={self.weighting.name} would do nothing; leave it out."
            )

    def _drop_labels(self, labels: Tensor | None, stream: Stream) -> Tensor | None:
        if not self.num_classes:
            return None
        assert labels is not None, "a conditional model is trained with labels"
        return (
            labels.masked_fill(stream.at("label-drop").bernoulli(self.label_drop), NO_LABEL)
            if self.label_drop
            else labels
        )


def _lacks_labels(condition: Tensor | None) -> bool:
    return condition is None or (condition.device.type == "cpu" and bool((condition < 0).any()))
