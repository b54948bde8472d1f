"""Objectives: the target that training asks for leads back to x0 and eps."""

import pytest
import torch
from torch import Tensor

from ddpm.objectives import Objective, eps_from_x0
from ddpm.schedules import Schedule

T = 1000


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("spec", ["linear", "cosine"])
@pytest.mark.parametrize("name", Objective.names())
def test_targets_lead_back_to_x0_and_eps(name: str, spec: str) -> None:
    """For every timestep, the first included, and for one level of the whole batch."""
    schedule, objective = Schedule.parse(f"{spec}:timesteps={T}"), Objective.parse(name)
    x0, eps = images(T)
    level = schedule.at(torch.arange(T))
    at = level.like(x0)
    x_t = at.alpha * x0 + at.sigma * eps
    found = objective.to_prediction(objective.target(x0, eps, x_t, level, schedule), x_t, level, schedule)
    # What is not predicted itself is divided by alpha or sigma, so rounding grows with 1 / alpha and 1 / sigma.
    assert ((found.x0 - x0) * at.alpha).abs().max() < 1e-12
    assert ((found.eps - eps) * at.sigma).abs().max() < 1e-12
    if spec == "linear":
        assert (found.x0 - x0).abs().max() < 1e-9
        assert (found.eps - eps).abs().max() < 1e-9
    assert (at.alpha * found.x0 + at.sigma * found.eps - x_t).abs().max() < 1e-12

    single = schedule.at(torch.tensor(7.0))
    x_t = single.alpha * x0 + single.sigma * eps
    found = objective.to_prediction(objective.target(x0, eps, x_t, single, schedule), x_t, single, schedule)
    assert max((found.x0 - x0).abs().max(), (found.eps - eps).abs().max()) < 1e-9


def test_targets_are_the_papers() -> None:
    schedule = Schedule.parse("linear")
    x0, eps = images(3)
    t = torch.tensor([0, 400, 999])
    level = schedule.at(t)
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    alpha, sigma = (value[t].sqrt()[:, None, None, None] for value in (kept, 1 - kept))
    x_t = alpha * x0 + sigma * eps

    def target(name: str) -> Tensor:
        return Objective.parse(name).target(x0, eps, x_t, level, schedule)

    assert torch.equal(target("eps"), eps)
    assert torch.equal(target("x0"), x0)
    torch.testing.assert_close(target("v"), alpha * eps - sigma * x0, rtol=0, atol=1e-12)
    beta = betas[t][:, None, None, None]
    # Ho et al. (2020), equation 10: the posterior mean in terms of x_t and eps.
    mean = (x_t - beta / sigma * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(target("xprev"), mean, rtol=0, atol=1e-12)


def test_the_v_prediction_is_a_rotation() -> None:
    """x_t and v are (x0, eps) turned by an angle phi with tan phi = sigma / alpha (Salimans & Ho 2022, appendix D)."""
    schedule = Schedule.parse("cosine")
    x0, eps = images(5)
    level = schedule.at(torch.tensor([0, 100, 500, 900, 999]))
    at = level.like(x0)
    x_t = at.alpha * x0 + at.sigma * eps
    v = Objective.parse("v").target(x0, eps, x_t, level, schedule)
    torch.testing.assert_close(x_t**2 + v**2, x0**2 + eps**2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", Objective.names())
def test_noise_labels_are_times_scaled(name: str) -> None:
    schedule = Schedule.parse("linear:timesteps=500")
    x_t = torch.zeros(3, 1, 2, 2)
    for spec, scale in ((name, 1.0), (f"{name}:label_scale=2.0", 2.0)):
        fed, label = Objective.parse(spec).condition(x_t, schedule.at(torch.tensor([0.0, 2.5, 499.0])))
        assert fed is x_t
        assert label.dtype == torch.float32
        assert label.tolist() == [0, 2.5 * scale, 499 * scale]
        _, label = Objective.parse(spec).condition(x_t, schedule.at(torch.tensor(7.0)))
        assert label.tolist() == [7 * scale] * 3


def test_eps_from_x0_inverts_the_forward_process() -> None:
    x0, eps = images(2)
    level = Schedule.parse("linear").at(torch.tensor([3, 700]))
    at = level.like(x0)
    assert (eps_from_x0(x0, at.alpha * x0 + at.sigma * eps, level) - eps).abs().max() < 1e-12
