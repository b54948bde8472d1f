"""Both likelihoods against exact ones: Gaussian data, mixtures, noise, and models that have learnt nothing."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

from ddpm import runtime
from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.console import Console
from ddpm.data import ImageSet
from ddpm.distributed import World
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.bound import VariationalBound, progressive_table, term_table
from ddpm.evaluation.flow import BIN, ProbabilityFlow, log_density
from ddpm.evaluation.likelihood import Likelihood, labels_for, measure_images, parse_likelihoods
from ddpm.models import GaussianDiffusion, build_diffusion
from ddpm.objectives import Prediction, eps_from_x0
from ddpm.randomness import Stream
from ddpm.samplers import Thresholding
from ddpm.schedules import DiscreteSchedule, Level, Schedule

NONE, CLIP = Thresholding.parse("none"), Thresholding.parse("clip")
ALL = VariationalBound(timesteps=None)


def measured(
    estimator: Likelihood, model: Any, x0: Tensor, stream: Stream, rule: Thresholding = NONE
) -> dict[str, Any]:
    """Rows as numpy arrays."""
    return {name: value.numpy() for name, value in estimator.measure(model, x0, None, stream, rule).items()}


def pixels(values: Any, shape: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """8-bit numbers as images in [-1, 1], float64."""
    return torch.tensor(np.asarray(values), dtype=torch.float64).reshape(-1, *shape) / 127.5 - 1.0


@dataclass(frozen=True)
class Quadrature(Stream):
    """In place of noise the nodes of Gauss and Hermite, so that weighted means over a batch are expectations."""

    nodes: Tensor = field(kw_only=True)

    def normal(self, *shape: int) -> Tensor:
        return self.nodes.reshape(-1, *shape)


def expected(estimator: Likelihood, model: Any, values: Any, nodes: int = 40) -> np.ndarray:
    """(values, terms): the terms of one-pixel images, their mean over all noise (every band must be one step)."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    x0 = pixels(np.repeat(values, nodes))
    stream = Quadrature(0, torch.arange(len(x0)), nodes=torch.from_numpy(np.tile(z, len(values))))
    bits = measured(estimator, model, x0, stream)["bits"].reshape(len(values), nodes, -1)
    return np.einsum("vnt,n->vt", bits, weights / weights.sum())


@dataclass
class Exact:
    """A predictor that knows mean and variance of x0 given x_t; pixels are independent."""

    schedule: Schedule

    def moments(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        at = level.like(x_t)
        x0, variance = self.moments(x_t, at)
        return Prediction(x0, eps_from_x0(x0, x_t, level), x0_variance=variance)


@dataclass
class White(Exact):
    """Pixels N(mean, std^2)."""

    mean: float = 0.1
    std: float = 0.2

    def moments(self, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        total = (self.std * at.alpha) ** 2 + at.sigma**2
        x0 = self.mean + at.alpha * self.std**2 / total * (x_t - at.alpha * self.mean)
        variance = (self.std * at.sigma) ** 2 / total
        if isinstance(self.schedule, DiscreteSchedule):  # as the analytic variance has it for the decoder
            variance = variance - self.schedule.floor_variance * (at.t == 0)
        return x0, variance

    def bits(self, values: Any) -> np.ndarray:
        """-log2 of the probability of 8-bit values."""
        x, half = np.asarray(values) / 127.5 - 1.0, BIN / 2
        z = np.sign(x - self.mean) * (x - self.mean)  # the nearer tail
        upper, lower = (norm.logsf((z + side) / self.std) for side in (-half, half))
        return -(upper + np.log1p(-np.exp(lower - upper))) / math.log(2)


@dataclass
class Noise(Exact):
    """Pixels that take each of the 256 values equally often."""

    def moments(self, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        values = pixels(range(256)).flatten()
        share = torch.softmax(
            -0.5 * ((x_t[..., None] - at.alpha[..., None] * values) / at.sigma[..., None]) ** 2, dim=-1
        )
        x0 = share @ values
        return x0, ((values - x0[..., None]) ** 2 * share).sum(-1)


def test_the_bound_is_the_exact_likelihood_where_the_reverse_process_is(exactness: Any) -> None:
    """White Gaussian data: with the best mean and variance the chain of any number of steps is that of the data."""
    values = np.arange(80, 210, 10)
    model = White(Schedule.parse("cosine:timesteps=30"))
    found = expected(ALL, model, values).sum(axis=1)
    difference = float(np.abs(found - model.bits(values)).max())
    exactness("likelihood vlb", "exact likelihood of Gaussian data", "exact", difference, 1e-5)


def test_some_timesteps_are_an_unbiased_estimate(exactness: Any) -> None:
    """Six of thirty; images drawn from the data, so what is uncertain is which steps and what noise."""
    model = White(Schedule.parse("cosine:timesteps=30"))
    generator = np.random.default_rng(0)
    values = np.round((generator.normal(0.1, 0.2, (400, 16)) + 1) * 127.5).clip(0, 255)
    exact = model.bits(values).mean(axis=1)
    some = measured(VariationalBound(timesteps=6), model, pixels(values, (1, 4, 4)), Stream(5, torch.arange(400)))
    off = some["bits"].sum(axis=1) - exact
    z = off.mean() / (off.std(ddof=1) / 20)
    exactness("likelihood vlb, some timesteps", "exact likelihood of Gaussian data", "statistical", abs(z), 4.0)


@pytest.mark.parametrize("timesteps", [2, 3, 7, 30, 100, 900, 999, 1000, 2000, None])
def test_bands_cover_every_step_once(timesteps: int | None) -> None:
    schedule = Schedule.parse("linear")
    bands = VariationalBound(timesteps=timesteps).bands(schedule)
    assert [step for band in bands for step in band] == list(range(1000))
    assert len(bands) == min(timesteps or 1000, 1000) and bands[-1] == range(999, 1000)
    widths = list(map(len, bands))
    assert all(a >= b - 1 for a, b in pairwise(widths))


def test_of_uniform_noise_the_bound_nears_8_bits_from_above() -> None:
    """Nothing can be known of such pixels; with more steps the reverse process comes as near to that as one likes."""
    model = Noise(Schedule.parse("edm:sigma_min=0.001"))
    half = np.arange(0, 128, 3)  # a third of those that the others mirror
    excess = [
        expected(VariationalBound(timesteps=None, steps=n), model, half, 12).sum(1).mean() - 8 for n in (16, 32, 64)
    ]
    assert 0 < excess[2] < 0.07
    assert excess[0] > 2 * excess[1] > 4 * excess[2]


def of_a_silent_network(betas: np.ndarray, objective: str, variance: str, values: np.ndarray) -> np.ndarray:
    """(N,) expected bits per dimension of images (N, D) where the network says 0, from Ho et al. (2020), section 3.

    Its x0 misses by an error whose mean square is known; what the decoder costs a value is an integral over the noise.
    """
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    square = ((values / 127.5 - 1.0) ** 2).mean(axis=1, keepdims=True)
    error = {  # of x0 less the guess, of whose parts x0 and eps are independent
        "eps": (1 - kept) / kept + 0 * square,
        "v": (1 - kept) ** 2 * square + kept * (1 - kept),
        "x0": square + 0 * kept,
    }[objective]
    tilde = (betas * (1 - before) / (1 - kept))[1:]
    found = tilde if variance == "fixed-small" else betas[1:]
    ratio, weight = tilde / found, (before * betas**2 / (1 - kept) ** 2)[1:]
    steps = 0.5 * (ratio - 1 - np.log(ratio) + weight * error[:, 1:] / found).sum(axis=1)
    prior = 0.5 * (kept[-1] * square[:, 0] + (1 - kept[-1]) - 1 - np.log(1 - kept[-1]))

    z = np.linspace(-8, 8, 801)
    x0 = np.arange(256)[:, None] / 127.5 - 1.0
    x_1 = np.sqrt(kept[0]) * x0 + np.sqrt(1 - kept[0]) * z
    mean = {"eps": x_1 / np.sqrt(kept[0]), "v": np.sqrt(kept[0]) * x_1, "x0": np.zeros_like(x_1)}[objective]
    std, half = np.sqrt(tilde[0]), BIN / 2
    near, far = (norm.logsf((np.abs(x0 - mean) + side) / std) for side in (-half, half))
    tail = norm.logsf((np.abs(x0) - half - np.sign(x0) * mean) / std)
    log_p = np.where(np.abs(x0) > 0.999, tail, near + np.log1p(-np.exp(far - near)))
    decoder = -(log_p * norm.pdf(z)).sum(axis=1) * (z[1] - z[0])
    return (prior + steps + decoder[values.astype(int)].mean(axis=1)) / math.log(2)


def silent(schedule: str, objective: str, variance: str = "fixed-small") -> GaussianDiffusion:
    """A model before its first step: its last layer, which starts near zero, at zero."""
    diffusion = DiffusionConfig(schedule=schedule, objective=objective, variance=variance)  # type: ignore[arg-type]
    network = ModelConfig(channels=8, channel_mults=(1,), blocks=1, attention=(), norm_groups=4)
    model = build_diffusion(network, diffusion, (1, 8, 8), 0).eval().requires_grad_(False)
    model.network.head.weight.zero_()  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_of_an_untrained_model_it_is_what_theory_predicts(
    objective: str, variance: str, digits: Any, exactness: Any
) -> None:
    """On digits and on uniform noise."""
    model = silent("linear:timesteps=25,scaled=true", objective, variance)
    for name, values in (
        ("digits", digits.images[:32]),
        ("noise", np.random.default_rng(1).integers(0, 256, (32, 1, 8, 8))),
    ):
        x0 = pixels(values, (1, 8, 8)).float()
        found = measured(ALL, model, x0, Stream(3, torch.arange(32)))["bits"].sum(axis=1)
        theory = of_a_silent_network(model.schedule.betas.numpy(), objective, variance, values.reshape(32, -1))
        row = f"likelihood vlb, untrained model, {name}", f"derivation for {objective}, {variance}"
        if objective == "x0":  # its guess does not depend on the noise
            exactness(*row, "exact", float(np.abs(found / theory - 1).max()), 1e-5)
        else:
            off = found - theory
            exactness(*row, "statistical", abs(off.mean() / (off.std(ddof=1) / 32**0.5)), 4.0)


def test_the_bound_is_that_of_the_thresholded_process(digits: Any) -> None:
    """To clip the guess to the range of images brings it nearer to every image."""
    model = silent("linear:timesteps=25,scaled=true", "eps")
    x0, stream = pixels(digits.images[:8], (1, 8, 8)).float(), Stream(0, torch.arange(8))
    plain, clipped = (measured(ALL, model, x0, stream, rule) for rule in (NONE, CLIP))
    assert (clipped["mse_x0"] < plain["mse_x0"]).all()
    assert (clipped["bits"][:, 1:-1] < plain["bits"][:, 1:-1]).all()


# --- the probability-flow ODE


def each_direction(x: Tensor) -> list[Tensor]:
    """Probes that give the divergence itself."""
    return [direction.expand_as(x) for direction in torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])]


@dataclass
class Points(Exact):
    """Points in the plane from three round Gaussians."""

    weights: Tensor = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means: Tensor = torch.tensor([[0.7, 0.5], [-0.6, 0.4], [0.0, -0.8]], dtype=torch.float64)
    variances: Tensor = torch.tensor([0.04, 0.09, 0.02], dtype=torch.float64)

    def predict(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        x = x_t.flatten(1)[:, None]
        total = level.alpha**2 * self.variances + level.sigma**2
        off = x - level.alpha * self.means
        share = torch.softmax(self.weights.log() - 0.5 * (off**2).sum(-1) / total - total.log(), dim=1)
        best = self.means + (level.alpha * self.variances / total)[:, None] * off
        x0 = (share[..., None] * best).sum(1).reshape(x_t.shape)
        return Prediction(x0, eps_from_x0(x0, x_t, level))

    def log_density(self, x: Tensor) -> np.ndarray:
        """Of x at the cleanest level."""
        level = self.schedule.at(torch.tensor(self.schedule.last))
        off = x.flatten(1)[:, None].numpy() - float(level.alpha) * self.means.numpy()
        total = float(level.alpha) ** 2 * self.variances.numpy() + float(level.sigma) ** 2
        terms = np.log(self.weights.numpy()) - np.log(2 * np.pi * total) - 0.5 * (off**2).sum(-1) / total
        return np.asarray(logsumexp(terms, axis=1))

    def draw(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (self.means[which] + self.variances[which].sqrt()[:, None] * noise)[:, None, None]


FAR = "edm:sigma_min=0.02,sigma_max=1e7"
"""Noise so wide that nothing of the data is left in it."""


def test_the_flow_gives_the_exact_density_of_a_mixture(exactness: Any) -> None:
    model = Points(Schedule.parse(FAR))
    x = model.draw(30)
    found = sum(log_density(model, x, None, each_direction(x), 400)).numpy()
    exactness("likelihood ode", "exact density of a mixture", "exact", np.abs(found - model.log_density(x)).max(), 1e-5)


def of_white_data(model: White, x: Tensor) -> np.ndarray:
    """ln density by the closed flow: x_t - alpha m grows as the deviation of x_t, to the prior that sampling starts from."""
    schedule = model.schedule
    start, end = (schedule.at(torch.tensor(t, dtype=torch.float64)) for t in (schedule.last, schedule.first))
    before, after = (float(((model.std * at.alpha) ** 2 + at.sigma**2).sqrt()) for at in (start, end))
    latent = float(end.alpha) * model.mean + after / before * (x - float(start.alpha) * model.mean)
    density = norm.logpdf(latent.numpy(), scale=schedule.prior_std) + math.log(after / before)
    return np.asarray(density.sum(axis=(1, 2, 3)))


PAIRS = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(-1, 1, 1, 2)


@pytest.mark.parametrize("spec", ["linear", "cosine", "vp", "edm", "ve"])
def test_the_flow_of_white_data_is_that_of_the_closed_form(spec: str, exactness: Any) -> None:
    model = White(Schedule.parse(spec))
    found = sum(log_density(model, PAIRS, None, each_direction(PAIRS), 160)).numpy()
    difference = np.abs(found - of_white_data(model, PAIRS)).max()
    exactness(f"likelihood ode, {spec}", "flow of Gaussian data", "exact", difference, 1e-5)


def test_the_flow_is_solved_at_fourth_order(exactness: Any) -> None:
    model = White(Schedule.parse("edm:sigma_min=0.05,sigma_max=20"))
    exact, counts = of_white_data(model, PAIRS), [20, 28, 40, 57]
    errors = [
        np.abs(sum(log_density(model, PAIRS, None, each_direction(PAIRS), n)).numpy() - exact).mean() for n in counts
    ]
    slope = float(np.polyfit(np.log(counts), np.log(errors), 1)[0])
    exactness("likelihood ode, Runge-Kutta", "flow of Gaussian data: order 4", "order", abs(slope + 4), 0.3)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_the_divergence_within_its_error(probe: str, exactness: Any) -> None:
    model = Points(Schedule.parse("edm"))
    x = model.draw(4)
    exact = sum(log_density(model, x, None, each_direction(x), 20))
    repeats, off = 250, []
    many = x.repeat(repeats, 1, 1, 1)
    probes = ProbabilityFlow(probe=probe)._probes(many, Stream(0, torch.arange(len(many)), "probe"))
    found = sum(log_density(model, many, None, probes, 20)).reshape(repeats, 4)
    off = found - exact
    z = (off.mean(0) / (off.std(0) / repeats**0.5)).abs().max()
    exactness(f"likelihood ode, {probe} probes", "exact divergence", "statistical", float(z), 4.0)


def test_bits_of_the_flow_are_those_of_dequantised_gaussian_data(exactness: Any) -> None:
    """Mean and error of repeats: noise within the bin is the only uncertainty, as this divergence has no other probe."""
    model = White(Schedule.parse("edm:sigma_min=0.001"))
    values = np.arange(60, 220, 5)
    estimator = ProbabilityFlow(steps=40, repeats=12)
    rows = measured(estimator, model, pixels(values), Stream(0, torch.arange(len(values))))
    x = values / 127.5 - 1.0
    square = ((x - model.mean) ** 2 + BIN**2 / 12) / model.std**2  # its mean over a bin
    exact = (0.5 * square + math.log(model.std * math.sqrt(2 * math.pi)) - math.log(BIN)) / math.log(2)
    off = rows["totals"].mean() - exact.mean()
    error = estimator.facts(model.schedule, rows)["standard_error_of_repeats"]
    assert np.allclose(rows["bits"].sum(axis=1), rows["totals"].mean(axis=1), atol=1e-12)
    exactness("likelihood ode, dequantised", "closed form of Gaussian data", "statistical", abs(off / error), 4.0)


def test_of_an_untrained_model_the_flow_only_widens(digits: Any, exactness: Any) -> None:
    """eps = 0 leaves x / alpha as it is, so the density is that of x alpha_T / alpha_0 under the prior."""
    model = silent("linear", "eps")
    x = pixels(digits.images[:4], (1, 8, 8)).float()
    found = sum(log_density(model, x, None, [torch.ones_like(x)], 40)).numpy()
    shrink = float((model.schedule.alphas_cumprod[-1] / model.schedule.alphas_cumprod[0]).sqrt())
    expected = (norm.logpdf(x.double().numpy() * shrink) + math.log(shrink)).sum(axis=(1, 2, 3))
    exactness("likelihood ode, untrained model", "closed form", "exact", np.abs(found / expected - 1).max(), 1e-5)


def test_an_untrained_edm_model_is_that_of_white_data(digits: Any, exactness: Any) -> None:
    """A network that says 0 leaves c_skip x, the best denoiser of pixels N(0, sigma_data^2) (Karras et al. 2022, table 1)."""
    model = silent("edm", "edm:sigma_data=0.4")
    x = pixels(digits.images[:4], (1, 8, 8)).float()
    found = sum(log_density(model, x, None, [torch.ones_like(x)], 50)).numpy()
    expected = of_white_data(White(Schedule.parse("edm"), mean=0.0, std=0.4), x.double())
    difference = np.abs(found / expected - 1).max()
    exactness("likelihood ode, untrained EDM model", "flow of Gaussian data", "exact", difference, 1e-5)


# --- progressive decoding


def test_gaussian_data_are_decoded_along_their_rate_distortion_function(exactness: Any) -> None:
    """Shannon: a white Gaussian source needs log2(std / root mean square error) bits a pixel; the best denoiser is there."""
    model = White(Schedule.parse("cosine:timesteps=40"))
    generator = np.random.default_rng(3)
    values = np.round((generator.normal(model.mean, model.std, (300, 64)) + 1) * 127.5).clip(0, 255)
    rows = measured(ALL, model, pixels(values, (1, 8, 8)), Stream(0, torch.arange(300)))
    path, bands = ALL.path(model.schedule), ALL.bands(model.schedule)
    table = progressive_table(path, bands, rows)
    variance = (
        model.std**2
        * (1 - (path.alpha * model.std) ** 2 / ((path.alpha * model.std) ** 2 + path.sigma**2))[:-1].numpy()
    )
    rate = 0.5 * np.log2(model.std**2 / variance)
    received = np.cumsum(rows["bits"], axis=1)[:, :-1]
    z_rate = (table["rate"] - rate)[1:] / (received.std(axis=0, ddof=1) / 300**0.5)[1:]
    z_error = ((table["distortion"] / 127.5) ** 2 - variance) / (rows["mse_x0"].std(axis=0, ddof=1) / 300**0.5)
    oracle = "rate-distortion function of Gaussian data"
    exactness("progressive decoding, rate", oracle, "statistical", np.abs(z_rate).max(), 4.0)
    exactness("progressive decoding, distortion", oracle, "statistical", np.abs(z_error).max(), 4.0)
    assert (
        np.allclose(table["rate"] + table["rest"], table["total"]) and table["total"][0] == rows["bits"].mean(0).sum()
    )


def test_terms_of_bands_and_of_steps_make_one_total() -> None:
    model = White(Schedule.parse("cosine:timesteps=40"))
    x0, stream = pixels(np.arange(0, 256, 4), (1, 4, 4)), Stream(0, torch.arange(4))
    for estimator in (ALL, VariationalBound(timesteps=5)):
        rows = measured(estimator, model, x0, stream)
        path, bands = estimator.path(model.schedule), estimator.bands(model.schedule)
        table = term_table(path, bands, rows)
        total = rows["bits"].sum(axis=1).mean()
        assert table["bits"].sum() == pytest.approx(total, rel=1e-12)
        assert (table["bits_per_step"] * table["steps"]).sum() == pytest.approx(total, rel=1e-12)
        assert table["steps"][1:].sum() == 40 and table["t_first"][1] == 39 and table["t_last"][-1] == 0
        parts = [rows["bits"][:, where].sum() for where in estimator.groups(model.schedule).values()]
        assert sum(parts) / 4 == pytest.approx(total, rel=1e-12)


# --- words


def test_estimators_have_a_written_form() -> None:
    assert [x.spec for x in parse_likelihoods(["vlb", "ode:repeats=3"])] == [
        "vlb:timesteps=50,steps=none",
        "ode:steps=50,repeats=3,probe=rademacher",
    ]
    with pytest.raises(ConfigError, match="did you mean 'vlb'"):
        parse_likelihoods(["vlv"])
    with pytest.raises(ConfigError, match="timesteps=1 is wrong"):
        parse_likelihoods(["vlb:timesteps=1"])


def test_a_schedule_that_ends_without_signal_has_a_bound_and_no_flow() -> None:
    schedule = Schedule.parse("zero-snr:table=linear(timesteps=20)")
    model = White(schedule)
    bits = measured(ALL, model, pixels([100, 150]), Stream(0, torch.arange(2)))["bits"]
    assert np.isfinite(bits).all() and (bits[:, 0] == 0).all()
    for estimator in (ProbabilityFlow(), VariationalBound(steps=10)):
        with pytest.raises(ConfigError, match="ends without signal"):
            estimator.groups(schedule)


@pytest.mark.parametrize("label_drop", [0.0, 0.1])
def test_labels_are_the_images_own(label_drop: float, digits: Any) -> None:
    def conditional(conditioning: Any) -> GaussianDiffusion:
        network = ModelConfig(channels=8, channel_mults=(1,), blocks=1, attention=(), conditioning=conditioning)
        return build_diffusion(network, DiffusionConfig(label_drop=label_drop), (1, 8, 8), 10)

    def pictures(labels: Any, classes: tuple[str, ...]) -> ImageSet:
        return ImageSet("pictures", digits.images[:3], labels, classes)

    names = tuple("abcdefghij")
    assert labels_for(conditional("none"), names, digits) is None
    model, labels = conditional("global"), np.array([2, 0, 1])
    for classes in (names, ("0", "1", "2")):  # numbers stand for names
        assert np.array_equal(labels_for(model, names, pictures(labels, classes)), labels)
    with pytest.raises(DataError, match="its classes are not those of the model"):
        labels_for(model, names, pictures(labels, ("cat", "dog", "cow")))
    if label_drop:
        assert (labels_for(model, names, pictures(None, ())) == -1).all()
    else:
        with pytest.raises(DataError, match=r"has no labels, and the model was trained with --diffusion\.label-drop=0"):
            labels_for(model, names, pictures(None, ()))


def test_a_likelihood_that_is_not_finite_is_refused(digits: Any, tmp_path: Path) -> None:
    model = silent("linear:timesteps=10,scaled=false", "eps")
    model.network.head.bias.fill_(math.nan)  # type: ignore[union-attr, operator]
    how = {"seed": 0, "chunk": 2, "thresholding": CLIP, "world": World(), "say": Console(quiet=True)}
    with pytest.raises(DataError, match="likelihood is NaN or infinite"):
        measure_images(ALL, model, digits, None, 2, runtime.resolve("cpu", "float32"), tmp_path, **how)
