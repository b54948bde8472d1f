"""GaussianDiffusion: the loss re-derived in numpy from the stream's own numbers, and what a model is built from."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.augmentation import Augmentation
from ddpm.config import DiffusionConfig, ModelConfig
from ddpm.errors import ConfigError
from ddpm.models import NO_LABEL, GaussianDiffusion, UNet, build_diffusion
from ddpm.objectives import Objective
from ddpm.randomness import Stream, quantised
from ddpm.schedules import Schedule, posterior

SHAPE = (2, 4, 3)
TINY = ModelConfig(
    channels=8, channel_mults=(1, 2), blocks=1, attention=(1,), dropout=0.2, initialisation="torch", norm_groups=2
)


class Wave(nn.Module):
    """A network simple enough to write down again: sin(x + t / 100 + label), and it keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.given: tuple[Any, ...] = ()

    def forward(self, x: Tensor, noise_label: Tensor, condition: Tensor | None = None, stream: Any = None) -> Tensor:
        self.given = (x, noise_label, condition, stream)
        shift = noise_label / 100 + (0 if condition is None else condition)
        return self.scale * torch.sin(x + shift[:, None, None, None])


def wave_model(objective: str = "eps", schedule: str = "linear", **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(Wave(), Schedule.parse(schedule), Objective.parse(objective), shape=SHAPE, **options)


def stream(n: int, step: int = 3, first: int = 0) -> Stream:
    return Stream(11, torch.arange(first, first + n), step=step)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def expected_target(name: str, x0: np.ndarray, eps: np.ndarray, x_t: np.ndarray, t: np.ndarray) -> np.ndarray:
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)
    beta, alpha2 = betas[t], kept[t]
    before = np.where(t > 0, kept[t - 1], 1.0)
    column = (slice(None), None, None, None)
    if name == "v":
        return np.sqrt(alpha2)[column] * eps - np.sqrt(1 - alpha2)[column] * x0
    if name == "xprev":
        at_x0 = np.sqrt(before) * beta / (1 - alpha2)
        at_x_t = np.sqrt(1 - beta) * (1 - before) / (1 - alpha2)
        return at_x0[column] * x0 + at_x_t[column] * x_t
    return {"eps": eps, "x0": x0}[name]


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize("objective", ["eps", "x0", "v", "xprev"])
def test_the_loss_is_what_the_paper_says_of_these_numbers(objective: str, loss: str) -> None:
    n = 40
    x0, s = images(n), stream(n)
    found = wave_model(objective, loss=loss)(x0, None, s).detach().numpy()

    t = np.floor(s.at("time").uniform().numpy() * 1000).astype(int)
    eps = s.at("noise").normal(*SHAPE).double().numpy()
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t][:, None, None, None]
    x_t = np.sqrt(kept) * x0.double().numpy() + np.sqrt(1 - kept) * eps
    output = np.sin(x_t + t[:, None, None, None] / 100)
    error = output - expected_target(objective, x0.double().numpy(), eps, x_t, t)
    elementwise = {
        "l2": error**2,
        "l1": np.abs(error),
        "huber": np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5),
    }[loss]
    assert found.shape == (n,)
    assert found.dtype == np.float32
    assert np.abs(found - elementwise.mean(axis=(1, 2, 3))).max() < 2e-5
    assert len(set(t)) > 30


def test_the_network_hears_the_timestep_and_the_stream() -> None:
    model, s = wave_model("eps:label_scale=2.0"), stream(6)
    model(images(6), None, s)
    assert isinstance(model.network, Wave)
    _, noise_label, condition, given = model.network.given
    assert noise_label.dtype == torch.float32
    assert torch.equal(noise_label.double(), (s.at("time").uniform() * 1000).floor() * 2)
    assert condition is None
    assert given is s


def test_an_images_loss_does_not_depend_on_its_batch() -> None:
    """Bit for bit where the network works row by row; the U-Net's own rounding aside."""
    x0 = images(7)
    model = wave_model("v")
    whole = model(x0, None, stream(7))
    parts = [model(x0[i:j], None, stream(j - i, first=i)) for i, j in ((0, 1), (1, 4), (4, 7))]
    assert torch.equal(torch.cat(parts), whole)

    unet = build_diffusion(TINY, DiffusionConfig(), SHAPE, 0)
    parts = [unet(x0[i:j], None, stream(j - i, first=i)) for i, j in ((0, 2), (2, 7))]
    torch.testing.assert_close(torch.cat(parts), unet(x0, None, stream(7)), rtol=1e-5, atol=1e-6)


def test_the_loss_is_a_function_of_the_stream_alone() -> None:
    model, x0 = build_diffusion(TINY, DiffusionConfig(), SHAPE, 0), images(3)
    torch.manual_seed(1)
    first = model(x0, None, stream(3))
    torch.manual_seed(2)
    assert torch.equal(first, model(x0, None, stream(3)))
    assert torch.equal(first, model.loss(x0, None, stream(3)))
    assert not torch.equal(first, model(x0, None, stream(3, step=4)))


def test_labels_are_dropped_at_their_rate() -> None:
    n, p = 5000, quantised(0.1)
    model = wave_model(num_classes=10, label_drop=0.1)
    labels = torch.arange(n) % 10
    model(images(n), labels, stream(n))
    assert isinstance(model.network, Wave)
    given = model.network.given[2]
    dropped = given == NO_LABEL
    assert abs(int(dropped.sum()) - n * p) / math.sqrt(n * p * (1 - p)) < 4
    assert torch.equal(given[~dropped], labels[~dropped])
    assert torch.equal(labels, torch.arange(n) % 10)
    model(images(n), labels, stream(n, step=4))
    assert not torch.equal(dropped, model.network.given[2] == NO_LABEL)


def test_labels_stay_where_none_are_dropped() -> None:
    model = wave_model(num_classes=10)
    model(images(3), torch.tensor([1, 0, 9]), stream(3))
    assert isinstance(model.network, Wave)
    assert model.network.given[2].tolist() == [1, 0, 9]


def test_an_unconditional_model_ignores_labels() -> None:
    model = wave_model()
    model(images(2), torch.tensor([1, 2]), stream(2))
    assert isinstance(model.network, Wave)
    assert model.network.given[2] is None
    with_labels = model.predict(images(2), model.schedule.at(torch.tensor(5.0)), torch.tensor([1, 2]))
    assert torch.equal(with_labels.x0, model.predict(images(2), model.schedule.at(torch.tensor(5.0))).x0)


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_noisy_images_have_the_marginals_of_the_forward_process(t: int) -> None:
    n = 4000
    model = wave_model()
    x0 = images(1).expand(n, -1, -1, -1)
    eps = stream(n).at("noise").normal(*SHAPE)
    kept = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1]))
    x_t = model.q_sample(x0, model.schedule.at(torch.full((n,), t)), eps).double()
    z = (x_t - math.sqrt(kept) * x0) / math.sqrt(1 - kept)
    count = z.numel()
    assert abs(float(z.mean())) * math.sqrt(count) < 4
    assert abs(float(z.var()) - 1) / math.sqrt(2 / count) < 4
    assert torch.equal(x_t.float(), model.q_sample(x0, model.schedule.at(torch.tensor(t)), eps))


def test_the_posterior_is_that_of_the_schedule() -> None:
    model, x0, x_t = wave_model(), images(2), images(2, seed=1)
    level, previous = model.schedule.at(torch.tensor([5, 900])), model.schedule.at(torch.tensor([2, 700]))
    found, expected = model.q_posterior(x0, x_t, level, previous), posterior(x0, x_t, level, previous)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("objective", Objective.names())
@pytest.mark.parametrize("t", [0, 300, 999])
def test_predictions_agree_with_x_t_and_are_never_clipped(objective: str, t: int) -> None:
    model = wave_model(objective).double()
    x_t = images(4).double() * 5
    level = model.schedule.at(torch.tensor(float(t)))
    found = model.predict(x_t, level)
    torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, x_t, rtol=0, atol=1e-9)
    output = torch.sin(x_t + t / 100)
    if objective in ("eps", "x0"):
        torch.testing.assert_close({"eps": found.eps, "x0": found.x0}[objective], output, rtol=0, atol=1e-6)
    if objective in ("eps", "v"):
        assert found.x0.abs().max() > 1
    single = model.predict(x_t, level.expand(4))
    torch.testing.assert_close(single.x0, found.x0, rtol=1e-12, atol=1e-12)


def test_the_variance_says_where_between_beta_tilde_and_beta() -> None:
    level = Schedule.parse("linear").at(torch.tensor(5.0))
    assert wave_model(variance="fixed-large").predict(images(1), level).variance_fraction == 1.0
    assert wave_model(variance="fixed-small").predict(images(1), level).variance_fraction == 0.0


def test_no_labels_means_no_label_for_all() -> None:
    model, level = wave_model(num_classes=3, label_drop=0.1), Schedule.parse("linear").at(torch.tensor(5.0))
    none = model.predict(images(2), level, torch.full((2,), NO_LABEL))
    assert torch.equal(model.predict(images(2), level).x0, none.x0)
    with pytest.raises(ConfigError, match=r"label-drop=0, so it needs labels\.$"):
        wave_model(num_classes=3).predict(images(2), level)


# --- build_diffusion


def test_a_config_describes_the_whole_model() -> None:
    settings = DiffusionConfig(
        schedule="cosine:timesteps=20", objective="v", variance="fixed-small", loss="huber", label_drop=0.25
    )
    model = build_diffusion(TINY.model_copy(update={"conditioning": "global"}), settings, SHAPE, 4)
    assert model.schedule == Schedule.parse("cosine:timesteps=20")
    assert model.objective == Objective.parse("v")
    assert (model.variance.spec, model.error, model.thresholding) == ("fixed-small", "huber", "clip")
    assert (model.shape, model.num_classes, model.label_drop) == (SHAPE, 4, 0.25)
    assert isinstance(model.network, UNet)
    assert model.network.num_labels == 5
    assert model.network.head.out_channels == SHAPE[0]


def test_a_learned_variance_has_channels_of_its_own() -> None:
    for variance, channels in (("learned", 4), ("learned-range", 4), ("analytic", 2), ("fixed-large", 2)):
        model = build_diffusion(TINY, DiffusionConfig(variance=variance), SHAPE, 0).eval()
        assert isinstance(model.network, UNet)
        assert model.network.head.out_channels == channels
        assert model.predict(images(2), model.schedule.at(torch.tensor(5.0))).x0.shape == (2, *SHAPE)


def test_a_variance_without_its_estimate_can_be_done_without() -> None:
    """Then every step has that of fixed-small, and what asks for Var(x0 | x_t) is given 0; an estimate stays."""
    for spec in ("linear", "zero-snr"):
        model = build_diffusion(TINY, DiffusionConfig(schedule=spec, objective="v", variance="analytic"), SHAPE, 0)
        model.eval().do_without_estimate()
        for t in (0.0, 3.5, 999.0):
            level, previous = model.schedule.at(torch.tensor(t)), model.schedule.at(torch.tensor(t - 1.5))
            found, floor = model.predict(images(2), level), torch.tensor(1e-4, dtype=torch.float64)
            assert found.x0_variance == 0
            small = found.log_variance(level, previous, fraction=0.0, floor=floor)
            assert torch.equal(found.log_variance(level, previous, floor=floor), small)
        model.eps_square.fill_(0.5)
        model.do_without_estimate()
        assert (model.eps_square == 0.5).all()


def test_the_bound_does_not_round_what_autocast_gave() -> None:
    """A variance in bfloat16 counts as it stands, as the error's output does: 1 + v has no bits for a small v."""

    class Given(torch.nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: Tensor, noise_label: Tensor, condition: object = None, stream: object = None) -> Tensor:
            return (0.003 * torch.cat([x, x], dim=1)).bfloat16().to(self.dtype)

    parts = Schedule.parse("linear"), Objective.parse("eps")
    half, full = (
        GaussianDiffusion(Given(dtype), *parts, shape=SHAPE, variance="learned-range", criterion="hybrid:weight=1")
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(half(images(8), None, stream(8)), full(images(8), None, stream(8)))


def test_training_choices_are_those_of_the_config() -> None:
    settings = DiffusionConfig(
        variance="learned", criterion="hybrid:weight=0.5", weighting="p2:k=2", times="stratified"
    )
    model = build_diffusion(TINY, settings, SHAPE, 0)
    assert (model.criterion.spec, model.weighting.spec) == ("hybrid:weight=0.5", "p2:k=2.0,gamma=1.0")
    assert (model.variance.spec, model.times.spec) == ("learned", "stratified")
    model.check_training()
    model(images(3), None, stream(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_runs_of_before_have_the_choices_that_they_had() -> None:
    """A config without the newer fields; its loss is that of the first test of this file."""
    model = build_diffusion(TINY, DiffusionConfig(), SHAPE, 0)
    found = (model.variance.spec, model.criterion.spec, model.weighting.spec, model.times.spec)
    assert found == ("fixed-large", "simple", "uniform", "uniform")
    assert all(name.startswith("network.") for name in model.state_dict())
    assert model.observe is None


@pytest.mark.parametrize(
    ("conditioning", "classes", "drop", "expected"),
    [
        ("none", 4, 0.1, (0, 0, 0.0)),
        ("global", 4, 0.1, (4, 5, 0.1)),
        ("global", 4, 0.0, (4, 4, 0.0)),
        ("block", 4, 0.1, (4, 5, 0.1)),
        ("auto", 4, 0.1, (4, 5, 0.1)),
        ("auto", 0, 0.1, (0, 0, 0.0)),
    ],
)
def test_conditioning(conditioning: str, classes: int, drop: float, expected: tuple[int, int, float]) -> None:
    settings = TINY.model_copy(update={"conditioning": conditioning})
    model = build_diffusion(settings, DiffusionConfig(label_drop=drop), SHAPE, classes).eval()
    assert isinstance(model.network, UNet)
    assert (model.num_classes, model.network.num_labels, model.label_drop) == expected
    if model.num_classes:
        x, level = images(1).expand(2, -1, -1, -1), model.schedule.at(torch.tensor(500.0))
        found = model.predict(x, level, torch.tensor([0, 1])).eps
        assert not torch.allclose(found[0], found[1], rtol=1e-3)


def test_first_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (build_diffusion(TINY, DiffusionConfig(), SHAPE, 0, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["network.stem.weight"], c["network.stem.weight"])


def test_a_network_from_outside_is_built(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_network.py").write_text(
        "import torch\n"
        "class Flat(torch.nn.Conv2d):\n"
        "    def __init__(self, config, in_channels, out_channels, num_labels):\n"
        "        super().__init__(in_channels, out_channels, 1)\n"
        "    def forward(self, x, noise_label, condition=None, stream=None):\n"
        "        return super().forward(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = ModelConfig(network="their_network:Flat")
    model = build_diffusion(settings, DiffusionConfig(), SHAPE, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * 2 + 2
    assert model(images(3), None, stream(3)).shape == (3,)


@pytest.mark.parametrize(
    ("model", "diffusion", "classes", "fragment"),
    [
        ({"conditioning": "global"}, {}, 0, r"--model.conditioning=global needs a data set with classes"),
        ({"network": "unett"}, {}, 0, r"--model.network=unett is not known \(did you mean 'unet'\?\)"),
        ({"network": "nowhere_at_all:Net"}, {}, 0, r"--model.network 'nowhere_at_all:Net' cannot be imported"),
        ({"network": "ddpm.models:Nett"}, {}, 0, r"cannot be imported: .*Nett"),
        ({}, {"schedule": "linar"}, 0, r"did you mean 'linear'"),
        ({}, {"objective": "epsilon"}, 0, r"objective 'epsilon'"),
        ({"encoder": "skip"}, {}, 0, r"--model.encoder=skip: the network unet has no such option"),
        (
            {"network": "song-unet", "initialisation": "ddpm", "norm": "batch"},
            {},
            0,
            r"--model.norm=batch: the network song-unet",
        ),
    ],
)
def test_wrong_configs_are_told_in_a_sentence(
    model: dict[str, Any], diffusion: dict[str, Any], classes: int, fragment: str
) -> None:
    with pytest.raises(ConfigError, match=fragment) as caught:
        build_diffusion(TINY.model_copy(update=model), DiffusionConfig(**diffusion), SHAPE, classes)
    assert str(caught.value).endswith(".")


def test_a_label_that_says_none_is_refused_where_the_model_never_saw_it() -> None:
    model, level = wave_model(num_classes=3), Schedule.parse("linear").at(torch.tensor([5.0, 9.0]))
    with pytest.raises(ConfigError, match=r"--diffusion\.label-drop=0, so it needs labels\.$"):
        model.predict(images(2), level, torch.tensor([1, NO_LABEL]))
    model.predict(images(2), level, torch.tensor([1, 2]))
    wave_model(num_classes=3, label_drop=0.1).predict(images(2), level, torch.tensor([1, NO_LABEL]))


# --- augmentation


@pytest.mark.parametrize("network", ["unet", "song-unet"])
def test_every_weight_learns_where_a_network_that_hears_of_augmentation_is_told_of_none(network: str) -> None:
    """Several processes would stop at a weight without a gradient; what one hears does not change."""
    settings = ModelConfig(network=network, channels=8, channel_mults=(1, 2), blocks=1, augment_labels=9)
    model = build_diffusion(settings, DiffusionConfig(), SHAPE, 0)
    model(images(2), None, stream(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Told(Wave):
    """Keeps what it was told of augmentation."""

    def forward(self, x: Tensor, *args: Any, augment: Tensor | None = None) -> Tensor:
        self.told = augment
        return super().forward(x, *args)


def test_training_images_are_augmented_and_the_network_is_told() -> None:
    """The loss is that of the changed images; predictions are not told of anything."""
    model, n = wave_model(), 6
    told, x0, augmentation = Told(), images(n), Augmentation.parse("edm:probability=0.7")
    augmented = GaussianDiffusion(told, model.schedule, model.objective, shape=SHAPE, augmentation=augmentation)
    changed, labels = augmentation.apply(x0, stream(n))
    assert torch.equal(augmented(x0, None, stream(n)), model(changed, None, stream(n)))
    assert torch.equal(told.told, labels)
    augmented.predict(x0, model.schedule.at(torch.tensor(5.0)))
    assert told.told is None


@pytest.mark.parametrize("name", ["unet", "song-unet"])
def test_an_augmentation_gives_the_network_its_labels(name: str) -> None:
    settings = TINY.model_copy(update={"network": name, "initialisation": "ddpm"})
    model = build_diffusion(settings, DiffusionConfig(), SHAPE, 0, augment="edm")
    assert model.network.config.augment_labels == 9
    model(images(3), None, stream(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    told = settings.model_copy(update={"augment_labels": 9})
    assert build_diffusion(told, DiffusionConfig(), SHAPE, 0).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ConfigError, match=r"^--model.augment-labels=4: --data.augment=edm gives 9; leave it out\.$"):
        build_diffusion(settings.model_copy(update={"augment_labels": 4}), DiffusionConfig(), SHAPE, 0, augment="edm")


def test_a_network_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--data.augment=edm: the network torch.nn:Conv2d cannot be told of it"):
        build_diffusion(ModelConfig(network="torch.nn:Conv2d"), DiffusionConfig(), SHAPE, 0, augment="edm")
    with pytest.raises(ConfigError, match=r"augmentation 'emd' is not known \(did you mean 'edm'\?\)"):
        build_diffusion(TINY, DiffusionConfig(), SHAPE, 0, augment="emd")


@pytest.mark.parametrize("name", ["math:sqrt", "builtins:int", "math:pi"])
def test_a_network_is_a_module(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--model.network={name} is no network"):
        build_diffusion(ModelConfig(network=name), DiffusionConfig(), SHAPE, 0)
