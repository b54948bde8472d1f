"""Losses as defined; the bound's terms against derivations of their own."""

import math
from typing import Any

import pytest
import torch

from ddpm.losses import LOSSES, discretised_log_likelihood, gaussian_kl, per_image_loss, prior_term, vlb_term
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.schedules import Schedule


def test_losses_are_as_defined() -> None:
    output, target = torch.tensor([[[[0.0, 3.0]]], [[[1.0, -0.5]]]]), torch.zeros(2, 1, 1, 2)
    expected = {"l2": [4.5, 0.625], "l1": [1.5, 0.75], "huber": [1.25, 0.3125]}
    assert set(expected) == set(LOSSES)
    for name, values in expected.items():
        assert per_image_loss(name, output, target).tolist() == values


def test_losses_are_float32_whatever_autocast_gave() -> None:
    output = torch.full((2, 1, 64, 64), 0.1, dtype=torch.bfloat16)
    loss = per_image_loss("l2", output, torch.zeros(2, 1, 64, 64))
    assert loss.dtype == torch.float32
    assert math.isclose(float(loss[0]), float(output[0, 0, 0, 0]) ** 2, rel_tol=1e-6)


def test_the_divergence_of_gaussians_is_torchs(exactness: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n, a, b = torch.randn(4, 100, generator=generator, dtype=torch.float64)
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Normal(m, (a / 2).exp()), torch.distributions.Normal(n, (b / 2).exp())
    )
    difference = float((gaussian_kl(m, a, n, b) - oracle).abs().max())
    exactness("losses: KL of Gaussians", "torch.distributions", "exact", difference, 1e-12)


@pytest.mark.parametrize("log_std", [-8.0, -3.0, 0.0, 2.0])
def test_the_decoder_is_a_distribution_over_256_values(log_std: float) -> None:
    """Its probabilities sum to 1, and in the middle they are differences of normal distribution functions."""
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
    for mean in (-1.3, -0.2, 0.004, 0.9):
        found = discretised_log_likelihood(values, torch.tensor(mean), torch.tensor(log_std, dtype=torch.float64))
        assert float(torch.logsumexp(found, 0)) == pytest.approx(0.0, abs=1e-9)
        normal = torch.distributions.Normal(torch.tensor(mean).double(), math.exp(log_std))
        direct = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
        seen = direct[1:-1] > 1e-6
        assert (
            ((found[1:-1].exp() - direct[1:-1])[seen] / direct[1:-1][seen]).abs().max() < 1e-8 if seen.any() else True
        )


def test_the_decoder_is_finite_far_from_the_mean() -> None:
    x0 = torch.tensor([-1.0, 0.0, 1.0])
    found = discretised_log_likelihood(x0, torch.tensor([1.0, -1.0, -1.0]), torch.tensor(-5.0))
    assert found.isfinite().all() and (found < -1000).all()


def test_a_term_of_the_bound_is_the_squared_error_over_the_variance() -> None:
    """Ho et al. (2020), equations 8 and 12: with the posterior's own variance the rest of the divergence is zero."""
    schedule = Schedule.parse("linear")
    generator = torch.Generator().manual_seed(1)
    x0, eps, guess = torch.randn(3, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([1.0, 10.0, 300.0, 700.0, 999.0])
    level, previous = schedule.at(t), schedule.at(t - 1)
    at = level.like(x0)
    x_t = at.alpha * x0 + at.sigma * eps
    beta, alphas = schedule.betas[t.long()], 1 - schedule.betas[t.long()]  # type: ignore[attr-defined]
    tilde = beta * (1 - schedule.alphas_cumprod[t.long() - 1]) / (1 - schedule.alphas_cumprod[t.long()])  # type: ignore[attr-defined]
    factor = beta**2 / (2 * tilde * alphas * (1 - schedule.alphas_cumprod[t.long()]))  # type: ignore[attr-defined]
    expected = factor * (eps - guess).square().flatten(1).mean(1) / math.log(2)
    predicted = (x_t - at.sigma * guess) / at.alpha
    found = vlb_term(x0, x_t, level, previous, Prediction(predicted, eps_from_x0(predicted, x_t, level), 0.0))
    assert (found / expected - 1).abs().max() < 1e-9


def test_the_prior_term_of_white_noise_is_zero() -> None:
    schedule = Schedule.parse("linear")
    level = schedule.at(torch.tensor(999.0))
    x0 = torch.ones(2, 1, 2, 2, dtype=torch.float64) * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    found = prior_term(x0, level)
    variance = level.sigma**2
    none = 0.5 * (variance - 1 - variance.log()) / math.log(2)
    assert found[0] == pytest.approx(float(none), rel=1e-6, abs=1e-15)
    assert found[1] - found[0] == pytest.approx(float(level.alpha**2 / 2 / math.log(2)), rel=1e-9)
