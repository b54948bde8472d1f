"""The estimate for the analytic variance: the right number, the same for any split, made once and given up in time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.config import TrainConfig
from ddpm.data import ImageSet
from ddpm.data.loader import Loader
from ddpm.distributed import World
from ddpm.models import GaussianDiffusion
from ddpm.objectives import Objective
from ddpm.runtime import Runtime
from ddpm.schedules import Schedule
from ddpm.training.estimating import EstimateVariance, mean_square_eps
from ddpm.training.trainer import Trainer

CPU = Runtime(torch.device("cpu"), "float32", channels_last=False, threads=1)
SPEC = "cosine:timesteps=7"


class Half(nn.Module):
    """eps is scale x: its mean square is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, noise_label: Tensor, condition: Tensor | None = None, stream: Any = None) -> Tensor:
        return self.scale * x


def model(images: int = 5) -> GaussianDiffusion:
    parts = (Half(), Schedule.parse(SPEC), Objective.parse("eps"))
    return GaussianDiffusion(*parts, shape=(1, 8, 8), variance=f"analytic:images={images}").eval()


@dataclass(frozen=True)
class Alone(World):
    """One of several processes, without the others."""

    def sum(self, value: Tensor) -> Tensor:
        return value


def test_the_estimate_is_the_mean_square_over_images_and_noise(digits: ImageSet, exactness: Any) -> None:
    """E |x / 2|^2 = (alpha^2 E x0^2 + sigma^2) / 4; its spread is that of images, and of what noise adds."""
    n = 400
    found = mean_square_eps(model(), digits, CPU, n, seed=1).numpy()
    level = Schedule.parse(SPEC).at(torch.arange(7.0))
    x0 = digits.images.reshape(len(digits), -1) / 127.5 - 1
    power = (x0**2).mean(1)
    alpha2, sigma2 = (level.alpha**2).numpy()[:, None], (level.sigma**2).numpy()[:, None]
    expected = (alpha2 * power + sigma2).mean(1) / 4
    of_noise = (2 * sigma2**2 + 4 * alpha2 * sigma2 * power).mean(1) / 64
    spread = np.sqrt((alpha2[:, 0] ** 2 * power.var() + of_noise) / n) / 4
    exactness(
        "variance analytic, estimate",
        "mean square in closed form",
        "statistical",
        np.abs((found - expected) / spread).max(),
        4,
    )


def test_processes_share_the_timesteps_and_find_the_same(digits: ImageSet) -> None:
    whole = mean_square_eps(model(), digits, CPU, 20, seed=1)
    parts = [mean_square_eps(model(), digits, CPU, 20, seed=1, world=Alone(rank, 3)) for rank in range(3)]
    assert all((part == 0).any() for part in parts)
    assert torch.equal(parts[0] + parts[1] + parts[2], whole)
    assert not torch.equal(mean_square_eps(model(), digits, CPU, 20, seed=2), whole)


@pytest.mark.parametrize("ema", [("0.5",), ()])
def test_it_is_made_after_the_last_step_for_the_first_average(digits: ImageSet, ema: tuple[str, ...]) -> None:
    config = TrainConfig(steps=4, batch_size=8, warmup=0, lr=0.1, ema=ema)
    trainer = Trainer(model(), Loader(digits, 8, seed=0), config, CPU, World(), seed=3, warn=pytest.fail)
    module, said = trainer.module, []
    assert isinstance(module, GaussianDiffusion) and isinstance(module.network, Half)
    module.eps_square.fill_(1.0)  # of other weights
    hook = EstimateVariance(trainer, digits, said.append)
    assert module.eps_square.isnan().all()
    before: list[bool] = []

    class Look:
        def after(self, trainer: Trainer, result: Any) -> None:
            before.append(bool(module.eps_square.isnan().all()))

        def finish(self, trainer: Trainer) -> None:
            pass

    trainer.run([hook, Look()], lambda: False)
    assert before == [True, True, True, False]
    assert said == ["estimating the variance of 7 timesteps, by 5 images each."]
    weights = trainer.drawing_weights()
    assert weights.keys() == module.state_dict().keys()
    twin = model()
    twin.load_state_dict(weights)
    assert torch.equal(mean_square_eps(twin, digits, CPU, 5, seed=3), module.eps_square)
    assert torch.equal(weights["eps_square"], module.eps_square)
    assert torch.equal(module.network.scale.detach(), weights["network.scale"]) == (not ema)
