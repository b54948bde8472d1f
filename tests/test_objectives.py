"""Objectives: the target that training asks for leads back to x0 and eps."""

from collections.abc import Callable

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


@pytest.mark.parametrize("name", sorted(set(Objective.names()) - {"edm"}))
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


# --- EDM


@pytest.mark.parametrize("schedule", ["edm", "cosine", "linear"])
def test_edm_is_the_papers_preconditioning(schedule: str, exactness: Callable[..., None]) -> None:
    """Karras et al. (2022), equation 7 with the coefficients of table 1, on x / alpha at sigma / alpha; equation 8, the
    loss of D weighted by 1 / c_out^2, is the even loss on what the network says."""
    objective, levels = Objective.parse("edm:sigma_data=0.7"), Schedule.parse(schedule)
    x0, eps = images(40)
    level = levels.at(torch.linspace(levels.first, levels.last, 40, dtype=torch.float64).round())
    alpha, sigma, data = level.alpha[:, None, None, None], level.sigma[:, None, None, None], 0.7
    x_t, rho = alpha * x0 + sigma * eps, sigma / alpha
    c_skip = data**2 / (rho**2 + data**2)
    c_out = rho * data / (rho**2 + data**2).sqrt()
    c_in = 1 / (rho**2 + data**2).sqrt()
    output = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    denoised = c_skip * (x_t / alpha) + c_out * output

    fed, label = objective.condition(x_t, level)
    found = objective.to_prediction(output, x_t, level, levels)
    target = objective.target(x0, eps, x_t, level, levels)
    weighted = (1 / c_out**2 * (denoised - x0) ** 2, (output - target) ** 2)
    pairs = {
        "input": (fed, c_in * x_t / alpha),
        "noise label": (label.double(), (rho.log() / 4).flatten()),
        "x0": (found.x0, denoised),
        "eps": (found.eps * sigma, x_t - alpha * denoised),
        "loss": (weighted[0] / weighted[0].max(), weighted[1] / weighted[0].max()),
    }
    assert label.dtype == torch.float32
    differences = {what: float((mine - paper).abs().max() / paper.abs().max()) for what, (mine, paper) in pairs.items()}
    assert max(value for what, value in differences.items() if what != "noise label") < 1e-12
    exactness(
        "objective edm",
        f"Karras et al. (2022), equations 7 and 8, {schedule}",
        "exact",
        max(differences.values()),
        1e-6,
    )


def test_edm_feeds_and_asks_for_unit_variance() -> None:
    """For data with deviation sigma_data, at every noise level (appendix B.6 of the paper)."""
    objective, levels = Objective.parse("edm"), Schedule.parse("edm")
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(8, 1, 300, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    level = levels.at(torch.linspace(0, 999, 8))
    at = level.like(x0)
    x0 *= 0.5
    x_t = x0 + at.sigma * eps
    for value in (objective.condition(x_t, level)[0], objective.target(x0, eps, x_t, level, levels)):
        z = ((value**2).mean(dim=(1, 2, 3)) - 1).abs() * (90_000 / 2) ** 0.5
        assert z.max() < 4


def test_edm_with_unit_data_on_a_preserving_schedule_is_v() -> None:
    """F = sigma x0 - alpha eps = -v, and its input is x_t itself."""
    schedule = Schedule.parse("cosine")
    x0, eps = images(5)
    level = schedule.at(torch.tensor([0, 100, 500, 900, 999]))
    x_t = level.like(x0).alpha * x0 + level.like(x0).sigma * eps
    edm, v = Objective.parse("edm:sigma_data=1"), Objective.parse("v")
    target = v.target(x0, eps, x_t, level, schedule)
    torch.testing.assert_close(edm.target(x0, eps, x_t, level, schedule), -target, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edm.condition(x_t, level)[0], x_t, rtol=1e-12, atol=1e-12)
