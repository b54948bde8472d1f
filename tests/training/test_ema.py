"""Moving averages against PyTorch's own and against sums written out."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm.errors import CheckpointError, ConfigError
from ddpm.training.ema import EMA, Constant, HalfLife, Warmup, parse_decay, parse_decays


class Net(nn.Module):
    """Weights that are set from outside, and a buffer."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)
        self.register_buffer("seen", torch.zeros(()))

    def move(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            self.seen += 1


def values(decay, steps, net=None):
    """The average of the weight (0, 0) after each step, and that weight at the start and after each step."""
    net = net or Net()
    ema, weights, averages = EMA(net, decay), [net.layer.weight[0, 0].item()], []
    for step in range(steps):
        net.move(step)
        ema.update()
        weights.append(net.layer.weight[0, 0].item())
        averages.append(ema.state()["layer.weight"][0, 0].item())
    return averages, weights


def test_constant_is_pytorchs_averaged_model():
    net = Net()
    ema, theirs = EMA(net, Constant(decay=0.9)), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)
    for step in range(20):
        net.move(step)
        ema.update()
        theirs.update_parameters(net)
    for name, p in theirs.module.named_parameters():
        torch.testing.assert_close(ema.state()[name], p.detach(), rtol=1e-6, atol=1e-7)


def test_constant_written_out():
    averages, weights = values(Constant(decay=0.8), 6)
    wanted = 0.8**6 * weights[0] + sum(0.2 * 0.8 ** (6 - k) * weights[k] for k in range(1, 7))
    assert averages[-1] == pytest.approx(wanted, rel=1e-5)


def test_warm_up_is_tensorflows_rule():
    averages, weights = values(Warmup(decay=0.5), 30)
    shadow = weights[0]
    for n in range(30):
        decay = min(0.5, (1 + n) / (10 + n))
        shadow = decay * shadow + (1 - decay) * weights[n + 1]
        assert averages[n] == pytest.approx(shadow, rel=1e-4, abs=1e-6)
    assert [Warmup(decay=0.9999).at(n, 128) for n in (0, 90)] == [0.1, 0.91]
    assert Warmup(decay=0.5).at(10**9, 128) == 0.5


def test_before_its_start_the_average_is_the_weights():
    averages, weights = values(Constant(decay=0.9, start=4), 6)
    assert averages[:4] == weights[1:5]
    assert averages[4] == pytest.approx(0.9 * weights[4] + 0.1 * weights[5], rel=1e-5)


def test_every_nth_step_counts():
    averages, weights = values(Constant(decay=0.9, every=3), 7)
    assert averages[0] == averages[1] == weights[0]
    assert averages[2] == averages[3] == averages[4] == pytest.approx(0.9 * weights[0] + 0.1 * weights[3], rel=1e-5)
    assert averages[5] == averages[6] != averages[4]
    late, weights = values(Constant(decay=0.9, start=5, every=2), 6)
    assert late == [
        weights[0],
        weights[2],
        weights[2],
        weights[4],
        weights[4],
        pytest.approx(0.9 * weights[4] + 0.1 * weights[6], rel=1e-5),
    ]


def test_a_half_life_in_images_holds_for_any_batch():
    """After the half-life the first weights count one half, in whatever steps; on the ramp it is a share of what was seen."""
    for batch in (1, 50, 1000):
        rule = HalfLife(images=1000, rampup=None)
        assert rule.at(7, batch) ** (1000 / batch) == pytest.approx(0.5, rel=1e-12)
    ramped = HalfLife(images=500_000, rampup=0.05)
    assert ramped.at(0, 512) == 0.0
    assert ramped.at(100, 512) == pytest.approx(0.5 ** (512 / (0.05 * 100 * 512)))
    assert ramped.at(19_531, 512) == pytest.approx(0.5 ** (1 / (0.05 * 19_531)))
    assert ramped.at(19_532, 512) == ramped.at(10**6, 512) == 0.5 ** (512 / 500_000)
    net = Net()
    ema = EMA(net, HalfLife(images=100, rampup=None), batch_size=50)
    first = net.layer.weight[0, 0].item()
    for _ in range(2):
        with torch.no_grad():
            net.layer.weight.zero_()
        ema.update()
    assert ema.state()["layer.weight"][0, 0].item() == pytest.approx(first / 2, rel=1e-6)


def test_decay_nought_is_the_weights():
    averages, weights = values(Constant(decay=0.0), 3)
    assert averages == weights[1:]


def test_averages_are_float32_buffers_are_copied_and_the_module_is_left_alone():
    net = Net(torch.bfloat16)
    ema = EMA(net, Constant(decay=0.999))
    net.move(0)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    ema.update()
    state = ema.state()
    assert list(state) == list(net.state_dict())
    assert state["layer.weight"].dtype == torch.float32
    assert state["seen"] == 1
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    assert not state["layer.weight"].requires_grad


def test_state_and_load_go_on_exactly():
    net = Net()
    first = EMA(net, Warmup(decay=0.99))
    for step in range(5):
        net.move(step)
        first.update()
    second = EMA(net, Warmup(decay=0.99))
    second.load({name: p.clone() for name, p in first.state().items()}, first.updates)
    for step in range(5, 9):
        net.move(step)
        first.update()
        second.update()
    assert second.updates == 9
    assert all(torch.equal(p, second.state()[name]) for name, p in first.state().items())


def test_what_does_not_fit_is_named():
    ema = EMA(Net(), Constant(decay=0.9))
    state = ema.state()
    for wrong in ({}, {**state, "layer.bias": torch.zeros(5)}):
        with pytest.raises(CheckpointError, match=r"the moving average 0\.9 does not fit the model at layer\."):
            ema.load(wrong, 1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.9999", Constant(decay=0.9999)),
        ("0", Constant(decay=0.0)),
        ("1e-1", Constant(decay=0.1)),
        ("warmup", Warmup()),
        ("warmup:decay=0.5", Warmup(decay=0.5)),
        ("constant:decay=0.9,start=2000,every=1", Constant(decay=0.9, start=2000)),
        ("half-life", HalfLife(images=500_000, rampup=0.05)),
        ("half-life:images=1000000,rampup=none", HalfLife(images=10**6, rampup=None)),
    ],
)
def test_written_forms(text, wanted):
    assert parse_decay(text) == wanted
    assert EMA(Net(), wanted).name == (f"{wanted.decay:g}" if hasattr(wanted, "decay") else f"{wanted.images}-images")


@pytest.mark.parametrize(
    "text", ["1", "1.5", "-0.1", "nan", "inf", "warmpu", "constant:every=0", "constant:start=-1", ""]
)
def test_wrong_ones_are_refused(text):
    with pytest.raises(ConfigError):
        parse_decay(text)


def test_two_of_one_name_are_refused():
    assert [decay.decay for decay in parse_decays(("0.9", "warmup:decay=0.99"))] == [0.9, 0.99]
    with pytest.raises(ConfigError, match=r"--train\.ema=0\.9 warmup:decay=0\.9: two averages have the same decay"):
        parse_decays(("0.9", "warmup:decay=0.9"))
