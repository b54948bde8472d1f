"""GaussianDiffusion: a network with its noise schedule and objective; the one object that passes between the lanes."""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ddpm.errors import ConfigError
from ddpm.losses import per_image_loss
from ddpm.objectives import Objective, Prediction
from ddpm.randomness import Stream
from ddpm.schedules import Level, Schedule, posterior

Variance = Literal["fixed-large", "fixed-small"]
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
        network: network(x, noise_label, condition, stream) -> output like x.
        schedule: noise levels.
        objective: what the network predicts.
        shape: (C, H, W) of the images.
        variance: of the reverse process, beta (`fixed-large`) or beta-tilde (`fixed-small`); Ho et al., section 3.2.
        loss: l2, l1 or huber.
        num_classes: 0 for an unconditional model.
        label_drop: probability of training without the label, which makes guidance possible.
        thresholding: what samplers do to the predicted x0 unless told otherwise (a thresholding spec).
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        objective: Objective,
        *,
        shape: tuple[int, int, int],
        variance: Variance = "fixed-large",
        loss: str = "l2",
        num_classes: int = 0,
        label_drop: float = 0.0,
        thresholding: str = "clip",
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.objective = network, schedule, objective
        self.shape, self.variance, self.error = shape, variance, loss
        self.num_classes, self.label_drop, self.thresholding = num_classes, label_drop, thresholding

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
        found = self.objective.to_prediction(output, x_t, level, self.schedule)
        return Prediction(found.x0, found.eps, 1.0 if self.variance == "fixed-large" else 0.0)

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
        level = self.schedule.at(self.schedule.draw(stream.at("time").uniform()))
        eps = stream.at("noise").normal(*x0.shape[1:])
        x_t = self.q_sample(x0, level, eps)
        network_input, noise_label = self.objective.condition(x_t, level)
        output = self.network(network_input, noise_label, self._drop_labels(labels, stream), stream)
        return per_image_loss(self.error, output, self.objective.target(x0, eps, x_t, level, self.schedule))

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
