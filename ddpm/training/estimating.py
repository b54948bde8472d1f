"""The estimate behind `--diffusion.variance=analytic`: the mean square of the predicted noise at every timestep."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddpm.data.base import ImageSet
from ddpm.distributed import World
from ddpm.images import to_float
from ddpm.models import GaussianDiffusion
from ddpm.randomness import Stream
from ddpm.runtime import Runtime
from ddpm.training.trainer import StepResult, Trainer, load_weights
from ddpm.variances import Analytic

TOGETHER = 16
"""Images that go through the network together; another number would change float rounding."""


@torch.inference_mode()
def mean_square_eps(
    model: GaussianDiffusion,
    data: ImageSet,
    runtime: Runtime,
    images: int,
    seed: int,
    world: World = World(),  # noqa: B008 - frozen
) -> Tensor:
    """(T,) float64: E |eps|^2 / d of the predicted eps at each timestep (Bao et al. 2022, the Monte Carlo estimate Gamma).

    Image i of timestep t and its noise are a function of (seed, t, i), so the estimate does not depend on the processes,
    which share the timesteps; all of them must call.

    Args:
        model: on the runtime's device, in eval mode, with a table of steps.
        data: the training images (and their labels, where the model knows classes).
        runtime: the machine.
        images: how many for each timestep.
        seed: of images and noise.
        world: the processes.
    """
    timesteps = len(model.eps_square)
    found = torch.zeros(timesteps, dtype=torch.float64)
    for t in range(timesteps)[world.share(timesteps)]:
        level = model.schedule.at(torch.tensor(float(t)))
        for places in torch.arange(t * images, (t + 1) * images, device=runtime.device).split(TOGETHER):
            stream = Stream(seed, places, "estimate")
            chosen = (stream.at("estimate-image").uniform() * len(data)).long().clamp(max=len(data) - 1).cpu().numpy()
            x0 = runtime.images(
                to_float(torch.from_numpy(np.ascontiguousarray(data.images[chosen])).to(runtime.device))
            )
            x_t = model.q_sample(x0, level, stream.normal(*model.shape))
            labels = None if data.labels is None else torch.from_numpy(data.labels[chosen]).to(runtime.device)
            with runtime.autocast():
                eps = model.predict(x_t, level, labels).eps
            found[t] += float(eps.double().square().sum()) / (images * math.prod(model.shape))
    return world.sum(found)


class EstimateVariance:
    """A hook of every process: after the last step, estimates for the first moving average, in time to be saved with it.

    An estimate belongs to the weights that it was made with: where training goes on, the one of a checkpoint is given up.
    """

    def __init__(self, trainer: Trainer, data: ImageSet, say: Callable[[str], None]) -> None:
        self.data, self.say = data, say
        assert isinstance(trainer.module, GaussianDiffusion)
        trainer.module.eps_square.fill_(math.nan)

    def after(self, trainer: Trainer, result: StepResult) -> None:
        """Estimate, where the run is at its end."""
        if result.step < trainer.config.steps:
            return
        assert isinstance(trainer.module, GaussianDiffusion) and isinstance(trainer.module.variance, Analytic)
        images, timesteps = trainer.module.variance.images, len(trainer.module.eps_square)
        self.say(f"estimating the variance of {timesteps} timesteps, by {images} images each.")
        model = copy.deepcopy(trainer.module).eval().requires_grad_(False)
        load_weights(model, trainer.drawing_weights())
        found = mean_square_eps(model, self.data, trainer.runtime, images, trainer.seed, trainer.world)
        trainer.module.eps_square.copy_(found)

    def finish(self, trainer: Trainer) -> None:
        """Nothing is owed."""
