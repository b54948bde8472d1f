"""Losses as defined; the bound's terms against derivations of their own."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import Tensor, nn

from ddpm.errors import ConfigError
from ddpm.losses import LOSSES, bound_terms, discretised_log_likelihood, gaussian_kl, per_image_loss, prior_term
from ddpm.models import GaussianDiffusion
from ddpm.objectives import Objective, Prediction, eps_from_x0
from ddpm.randomness import Stream
from ddpm.schedules import Schedule, posterior_variance


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


class Tables:
    """Ho et al. (2020), section 3, written down again in numpy; t counts from 0."""

    def __init__(self, betas: np.ndarray) -> None:
        self.betas, alphas = betas, 1 - betas
        self.kept = np.cumprod(alphas)
        before = np.append(1.0, self.kept[:-1])
        self.tilde = betas * (1 - before) / (1 - self.kept)
        self.log_tilde = np.log(np.append(self.tilde[1], self.tilde[1:]))
        self.at_x0 = betas * np.sqrt(before) / (1 - self.kept)
        self.at_x_t = (1 - before) * np.sqrt(alphas) / (1 - self.kept)

    def term(self, x0: np.ndarray, x_t: np.ndarray, t: int, guess: np.ndarray, log_variance: np.ndarray) -> float:
        """Bits per dimension of one image, by the definitions."""
        mean = self.at_x0[t] * guess + self.at_x_t[t] * x_t
        if t > 0:
            truth = self.at_x0[t] * x0 + self.at_x_t[t] * x_t
            log_ratio = log_variance - self.log_tilde[t]
            kl = 0.5 * (log_ratio + np.exp(-log_ratio) + (truth - mean) ** 2 / np.exp(log_variance) - 1)
            return float(kl.mean() / np.log(2))
        deviation = np.exp(log_variance / 2)
        above = np.where(x0 > 0.999, 1.0, ndtr((x0 + 1 / 255 - mean) / deviation))
        below = np.where(x0 < -0.999, 0.0, ndtr((x0 - 1 / 255 - mean) / deviation))
        return float(-np.log2(above - below).mean())


LINEAR, COSINE = np.linspace(1e-4, 0.02, 1000), np.cos((np.arange(4001) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
BETAS = {"linear": LINEAR, "cosine:timesteps=4000": np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.999)}
VARIANCES: dict[str, Callable[[Tables, int, np.ndarray], np.ndarray]] = {
    "fixed-large": lambda of, t, _: np.log(np.append(of.tilde[1], of.betas[1:]))[t],
    "fixed-small": lambda of, t, _: of.log_tilde[t],
    "learned-range": lambda of, t, v: (v + 1) / 2 * np.log(of.betas[t]) + (1 - v) / 2 * of.log_tilde[t],
}
"""ln of the variance at t: the first two as Ho et al. clip them, the third Nichol & Dhariwal (2021), equation 15."""


def step(spec: str, steps: list[int], seed: int = 1) -> tuple[Tensor, ...]:
    """8-bit x0, x_t, a guess of x0 near enough for the decoder, numbers in about (-1, 1), and the levels before and after."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(steps), 3, 4, 4)
    x0 = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    eps, error, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor(steps, dtype=torch.float64)
    at = Schedule.parse(spec).at(t).like(x0)
    scale = torch.where(t > 0, 0.3, 0.004).reshape(-1, 1, 1, 1)
    return x0, at.alpha * x0 + at.sigma * eps, x0 + scale * error, torch.tanh(v), t


@pytest.mark.parametrize("spec", BETAS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_of_the_bound_are_those_of_the_tables(spec: str, variance: str, exactness: Any) -> None:
    """Decoder, neighbours of the clean image and the noisiest steps, all in one batch."""
    tables, schedule = Tables(BETAS[spec]), Schedule.parse(spec)
    x0, x_t, guess, v, t = step(spec, [0, 1, 2, 10, 0, 300, 700, len(tables.betas) - 1])
    level, previous = schedule.at(t), schedule.at(t - 1)
    fraction = {"fixed-large": 1.0, "fixed-small": 0.0, "learned-range": (v + 1) / 2}[variance]
    prediction = Prediction(guess, eps_from_x0(guess, x_t, level), fraction)
    floor = posterior_variance(schedule.at(torch.tensor(1.0)), schedule.at(torch.tensor(0.0)))
    found = bound_terms(x0, level, previous, prediction, floor)
    rows = zip(*(value.numpy() for value in (x0, x_t, t.long(), guess, v)), strict=True)
    expected = [tables.term(a, b, i, c, VARIANCES[variance](tables, i, d)) for a, b, i, c, d in rows]
    difference = np.abs(found.numpy() / expected - 1).max()
    exactness(f"bound terms, {variance}", f"numpy tables of Ho et al., {spec.split(':')[0]}", "exact", difference, 1e-6)


class Affine(nn.Module):
    """A network that can be written down again: x / 2 + 0.1 for the image, and where asked sin(3 x) / 2 - shift for the variance."""

    def __init__(self, channels: int = 1, shift: float = 0.0) -> None:
        super().__init__()
        self.mean, self.variance = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))
        self.channels, self.shift = channels, shift

    def forward(self, x: Tensor, noise_label: Tensor, condition: Any = None, stream: Any = None) -> Tensor:
        mean = self.mean * x + 0.1
        return mean if self.channels == 1 else torch.cat([mean, self.variance * torch.sin(3 * x) - self.shift], dim=1)


SMOOTH = "cosine:timesteps=20"
CRITERIA = {("vlb", "fixed-large"): (0, 1), ("vlb", "learned-range"): (0, 1), ("vlb", "learned"): (0, 1),
            ("hybrid:weight=0.03", "learned-range"): (1, 0.03), ("hybrid", "learned"): (1, 0.001)}  # fmt: skip
"""Criterion and variance: what they make of error and bound."""


def affine(criterion: str, variance: str, network: nn.Module | None = None, **options: Any) -> GaussianDiffusion:
    learned = variance.startswith("learned")
    network = network or Affine(1 + learned, shift=4.0 if variance == "learned" else 0.0)
    parts = (Schedule.parse(SMOOTH), Objective.parse("x0"))
    return GaussianDiffusion(network, *parts, shape=(3, 4, 4), variance=variance, criterion=criterion, **options)


@pytest.mark.parametrize(("criterion", "variance"), CRITERIA)
def test_training_minimises_what_the_criterion_says(criterion: str, variance: str, exactness: Any) -> None:
    """Nichol & Dhariwal (2021), equation 16 and section 3.3: T times one term of the bound, in numpy."""
    n, model = 80, affine(criterion, variance)
    x0 = torch.randint(0, 256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(2)).double() / 127.5 - 1
    x0[:, 0] = (
        0.2 + x0[:, 0] / 100
    )  # near what the network says, so that no probability is too small to be written down
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    stream = Stream(1, torch.arange(n))
    found = model(x0, None, stream).detach().numpy()

    t = np.floor(stream.at("time").uniform().numpy() * 20).astype(int)
    f = np.cos((np.arange(21) / 20 + 0.008) / 1.008 * np.pi / 2) ** 2
    tables = Tables(np.minimum(1 - f[1:] / f[:-1], 0.999))
    eps, x0 = stream.at("noise").normal(3, 4, 4).double().numpy(), x0.numpy()
    of_error, of_bound = CRITERIA[criterion, variance]
    expected = []
    for i in range(n):
        kept = tables.kept[t[i]]
        x_t = np.sqrt(kept) * x0[i] + np.sqrt(1 - kept) * eps[i]
        guess, v = 0.5 * x_t + 0.1, 0.5 * np.sin(3 * x_t)
        log_variance = v - 4.0 if variance == "learned" else VARIANCES[variance](tables, t[i], v)
        term = tables.term(x0[i], x_t, t[i], guess, np.broadcast_to(log_variance, x_t.shape))
        expected.append(of_error * ((guess - x0[i]) ** 2).mean() + of_bound * 20 * term)
    assert 0 in t and len(set(t)) > 15 and np.isfinite(expected).all()
    name = f"criterion {criterion.partition(':')[0]}, {variance}"
    exactness(name, "numpy tables of Nichol & Dhariwal", "exact", np.abs(found / expected - 1).max(), 1e-5)


@pytest.mark.parametrize("variance", ["learned", "learned-range"])
def test_the_bound_of_hybrid_reaches_the_variance_alone(variance: str) -> None:
    """Nichol & Dhariwal (2021), section 3.1: the mean gets the gradient of the error, the variance that of the bound."""
    x0, stream = (
        torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1,
        Stream(1, torch.arange(16)),
    )

    def gradients(criterion: str) -> tuple[Tensor | None, Tensor | None]:
        model = affine(criterion, variance)
        model(x0, None, stream).sum().backward()
        assert isinstance(model.network, Affine)
        return model.network.mean.grad, model.network.variance.grad

    (simple, idle), (hybrid, of_hybrid), (of_mean, of_bound) = (
        gradients(c) for c in ("simple", "hybrid:weight=0.25", "vlb")
    )
    assert simple is not None and hybrid is not None and of_mean is not None
    torch.testing.assert_close(hybrid, simple, rtol=1e-6, atol=0)
    assert idle == 0 and of_hybrid is not None and of_bound is not None
    torch.testing.assert_close(of_hybrid, 0.25 * of_bound, rtol=1e-5, atol=0)
    assert abs(float(of_mean / simple - 1)) > 0.1


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (
            {"variance": "learned"},
            "--diffusion.variance=learned is not trained by --diffusion.criterion=simple; use hybrid",
        ),
        ({"criterion": "hybrid"}, "hybrid trains a learned variance, which --diffusion.variance=fixed-large is not"),
        ({"criterion": "hybrid", "variance": "analytic"}, "hybrid trains a learned variance, which .*analytic is not"),
        (
            {"criterion": "vlb", "variance": "analytic"},
            "needs a variance from the first step on; .*analytic is estimated",
        ),
        ({"criterion": "vlb", "loss": "l1"}, "--diffusion.loss=l1 would do nothing"),
        ({"criterion": "vlb", "weighting": "min-snr"}, "--diffusion.weighting=min-snr would do nothing"),
    ],
)
def test_what_does_not_go_together_in_training_is_told_in_a_sentence(options: dict[str, str], fragment: str) -> None:
    model = affine(**{"criterion": "simple", "variance": "fixed-large", **options})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=fragment) as caught:
        model.check_training()
    assert str(caught.value).endswith(".")


def test_what_goes_together_is_not_refused() -> None:
    for criterion, variance in [*CRITERIA, ("simple", "analytic"), ("simple", "fixed-small"), ("vlb", "fixed-small")]:
        affine(criterion, variance).check_training()
    affine("hybrid", "learned-range", loss="huber", weighting="min-snr").check_training()


@pytest.mark.parametrize("options", [{"criterion": "vlb"}, {"variance": "learned"}, {"times": "loss-second-moment"}])
def test_parts_of_a_table_are_refused_in_continuous_time(options: dict[str, str]) -> None:
    parts = (Affine(), Schedule.parse("vp"), Objective.parse("x0"))
    with pytest.raises(
        ConfigError, match=r"^--diffusion\.\w+=.* needs a schedule of numbered steps, .*'vp' is continuous\.$"
    ):
        GaussianDiffusion(*parts, shape=(3, 4, 4), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^--diffusion\.objective=xprev, the step before, needs"):
        GaussianDiffusion(Affine(), Schedule.parse("edm"), Objective.parse("xprev"), shape=(3, 4, 4))


@pytest.mark.parametrize(("channels", "variance"), [(1, "learned-range"), (2, "fixed-large")])
def test_a_network_of_the_wrong_width_is_told_in_a_sentence(channels: int, variance: str) -> None:
    model = affine("hybrid" if channels == 1 else "simple", variance, Affine(channels))
    said = rf"^--model\.network gives {3 * channels} channels, where --diffusion\.variance={variance} needs {9 - 3 * channels}"
    with pytest.raises(ConfigError, match=said):
        model(torch.zeros(2, 3, 4, 4), None, Stream(0, torch.arange(2)))
    with pytest.raises(ConfigError, match=said):
        model.predict(torch.zeros(2, 3, 4, 4), model.schedule.at(torch.tensor(3.0)))


class PerTime(nn.Module):
    """The output a[t] x + b[t]: the shape of the best one for Gaussian data."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, timesteps, dtype=torch.float64))

    def forward(self, x: Tensor, noise_label: Tensor, condition: Any = None, stream: Any = None) -> Tensor:
        a, b = (row[noise_label.long(), None, None, None] for row in self.weights)
        return a * x + b


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "xprev"])
def test_the_best_network_of_an_objective_predicts_the_mean_of_x0(objective: str, exactness: Any) -> None:
    """Pixels are N(m, v). The loss is quadratic in the weights, so its minimum is one Newton step away; 40 samples of it."""
    m, v, schedule = 0.3, 0.2, Schedule.parse("linear:timesteps=3,beta_start=0.1,beta_end=0.5")
    network = PerTime(3)
    model = GaussianDiffusion(network, schedule, Objective.parse(objective), shape=(1, 4, 4))

    def gradient(weights: Tensor, first: int) -> Tensor:
        network.weights.data = weights.reshape(2, 3)
        stream = Stream(7, torch.arange(first, first + 300))
        x0 = m + v**0.5 * stream.at("data").normal(1, 4, 4).double()
        (found,) = torch.autograd.grad(model(x0, None, stream).sum(), network.weights)
        return found.flatten()

    x, level = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64), schedule.at(torch.arange(3.0))
    found = []
    for first in range(0, 40 * 300, 300):
        start = gradient(torch.zeros(6, dtype=torch.float64), first)
        hessian = torch.stack([gradient(row, first) - start for row in torch.eye(6, dtype=torch.float64)])
        network.weights.data = torch.linalg.solve(hessian, -start).reshape(2, 3)
        with torch.no_grad():
            found.append(torch.stack([model.predict(x.expand(3, 1, 1, 3), level).x0[:, 0, 0]]))
    samples = torch.cat(found)
    spread = level.alpha**2 * v + level.sigma**2
    expected = (level.alpha * v)[:, None] * x + (level.sigma**2 * m)[:, None]
    z = (samples.mean(0) - expected / spread[:, None]) / (samples.std(0) / math.sqrt(40))
    exactness(f"objective {objective}", "posterior mean of Gaussian data", "statistical", float(z.abs().max()), 4)
    assert float((samples.mean(0) - expected / spread[:, None]).abs().max()) < 0.01


def test_one_level_for_all_images_gives_the_same_terms() -> None:
    schedule = Schedule.parse("linear")
    floor = posterior_variance(schedule.at(torch.tensor(1.0)), schedule.at(torch.tensor(0.0)))
    for i in (0, 1, 500):
        x0, x_t, guess, v, t = step("linear", [i] * 3)
        for fraction in (1.0, (v + 1) / 2):
            prediction = Prediction(guess, eps_from_x0(guess, x_t, schedule.at(t)), fraction)
            each = bound_terms(x0, schedule.at(t), schedule.at(t - 1), prediction, floor)
            single = bound_terms(x0, schedule.at(t[0]), schedule.at(t[0] - 1), prediction, floor)
            torch.testing.assert_close(single, each, rtol=1e-13, atol=0)


@pytest.mark.parametrize("variance", [0.0, 0.3, "map"])
def test_with_the_true_moments_a_term_is_the_entropy_that_is_lost(variance: Any) -> None:
    """Any two levels: with Var(x_s | x_t) = beta-tilde + c^2 Var(x0 | x_t) and an error of that size, KL = log-ratio / 2
    on average (Bao et al. 2022, proof of theorem 1)."""
    schedule = Schedule.parse("linear")
    x0, x_t, _, v, _ = step("linear", [600] * 4)
    of_x0 = v.square() if variance == "map" else torch.full_like(x0, variance)
    level, previous = schedule.at(torch.tensor(600.0)), schedule.at(torch.tensor(400.0))
    guess = x0 - of_x0.sqrt()  # its squared error is what it says it is
    prediction = Prediction(guess, eps_from_x0(guess, x_t, level), x0_variance=of_x0 if variance == "map" else variance)
    found = bound_terms(x0, level, previous, prediction, torch.tensor(1e-4))
    snr = previous.alpha**2 / previous.sigma**2 - level.alpha**2 / level.sigma**2
    expected = 0.5 * torch.log2(1 + snr * of_x0).flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_the_gradient_of_a_term_is_finite_far_from_the_image() -> None:
    """At every level, decoder and divergence alike, whichever of the two a row uses."""
    x0, _, _, _, t = step("linear", [0, 0, 1, 999])
    schedule = Schedule.parse("linear")
    guess, fraction = (torch.full_like(x0, value).requires_grad_() for value in (-30.0, 0.5))
    prediction = Prediction(guess, torch.zeros_like(x0), fraction)
    found = bound_terms(x0, schedule.at(t), schedule.at(t - 1), prediction, torch.tensor(5e-5))
    found.sum().backward()
    assert found.isfinite().all()
    assert guess.grad is not None and guess.grad.isfinite().all() and (guess.grad != 0).all()
    assert fraction.grad is not None and fraction.grad.isfinite().all()


def test_the_prior_term_of_white_noise_is_zero() -> None:
    schedule = Schedule.parse("linear")
    level = schedule.at(torch.tensor(999.0))
    x0 = torch.ones(2, 1, 2, 2, dtype=torch.float64) * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    found = prior_term(x0, level)
    variance = level.sigma**2
    none = 0.5 * (variance - 1 - variance.log()) / math.log(2)
    assert found[0] == pytest.approx(float(none), rel=1e-6, abs=1e-15)
    assert found[1] - found[0] == pytest.approx(float(level.alpha**2 / 2 / math.log(2)), rel=1e-9)
