"""One step: the large batch's gradient from any micro-batch, PyTorch's own optimizers, no update from a NaN."""

import math

import pytest
import torch
from torch import nn

from ddpm.config import DiffusionConfig, ModelConfig, TrainConfig
from ddpm.data.loader import Loader
from ddpm.distributed import World
from ddpm.errors import CheckpointError, ConfigError, DataError, DivergedError
from ddpm.models import build_diffusion
from ddpm.runtime import Runtime
from ddpm.training.trainer import StopClock, Trainer, learning_rate, load_weights

CPU = Runtime(torch.device("cpu"), "float32", channels_last=False, threads=1)
BF16 = Runtime(torch.device("cpu"), "bf16", channels_last=False, threads=1)


class Pixels(nn.Module):
    """Loss of an image: mean square of pixels minus a learnt picture; NaN or infinite where it is told to be."""

    def __init__(self, bad: dict[int, int] | None = None, gradient: bool = False) -> None:
        super().__init__()
        self.picture, self.scale = nn.Parameter(torch.zeros(1, 8, 8)), nn.Parameter(torch.ones(8))
        self.bad, self.gradient = bad or {}, gradient

    def forward(self, x, labels, stream):
        loss = (x - self.picture * self.scale).square().mean((1, 2, 3))
        row = self.bad.get(stream.step, -1) == stream.ids
        if self.gradient:
            zero = (self.scale[0] - self.scale[0].detach()).abs().sqrt()
            return loss + zero * row if row.any() else loss
        return loss.masked_fill(row, math.nan)


def make_trainer(digits, module=None, runtime=CPU, warnings=None, **changes) -> Trainer:
    """A trainer of twenty steps of eight digits at a constant rate."""
    config = TrainConfig(
        **{"steps": 20, "batch_size": 8, "warmup": 0, "lr": 0.01, "grad_clip": 0.0, "ema": (), **changes}
    )
    warn = pytest.fail if warnings is None else warnings.append
    loader = Loader(digits, config.batch_size, seed=0)
    return Trainer(module or Pixels(), loader, config, runtime, World(), seed=0, warn=warn)


def network(**changes) -> nn.Module:
    """A tiny conditional diffusion model with every source of randomness on."""
    model = ModelConfig(
        channels=8,
        channel_mults=(1, 2),
        blocks=1,
        dropout=0.2,
        conditioning="global",
        initialisation="torch",
        **changes,
    )
    return build_diffusion(model, DiffusionConfig(label_drop=0.3), (1, 8, 8), 10)


def one_step(trainer: Trainer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Per-image losses of the first step, and the gradients that the optimizer is given."""
    losses, gradients = [], []
    hook = trainer.module.register_forward_hook(lambda module, given, loss: losses.append(loss.detach()))
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in trainer.parameters)  # type: ignore[union-attr]
    )
    trainer.module.train()
    trainer.train_step(trainer.loader.batch(0))
    hook.remove()
    return torch.cat(losses), gradients


def relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The distance of two gradients, as a share of the second."""
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8])
def test_micro_batches_give_the_large_batchs_gradient(digits, micro_batch):
    whole, gradients = one_step(make_trainer(digits, network()))
    parts, accumulated = one_step(make_trainer(digits, network(), micro_batch=micro_batch))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert relative(accumulated, gradients) < 2e-6


def test_the_gradient_is_that_of_the_mean_loss(digits):
    trainer = make_trainer(digits)
    images = trainer.loader.batch(0).images.float() / 127.5 - 1
    losses, (of_picture, of_scale) = one_step(trainer)
    torch.testing.assert_close(losses, images.square().mean((1, 2, 3)))
    torch.testing.assert_close(of_picture, -2 * images.mean(0) / 64)
    torch.testing.assert_close(of_scale, torch.zeros(8))


def test_the_result_is_the_mean_loss_and_the_norm_before_clipping(digits):
    trainer = make_trainer(digits, grad_clip=0.05)
    _, clipped = one_step(trainer)
    fresh = make_trainer(digits)
    losses, gradients = one_step(fresh)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    result, _ = make_trainer(digits, grad_clip=0.05).train_step(fresh.loader.batch(0))
    assert result.loss == pytest.approx(losses.double().mean().item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert norm > 0.05
    for found, wanted in zip(clipped, gradients, strict=True):
        torch.testing.assert_close(found, wanted * (0.05 / (norm + 1e-6)))
    expected = [p.clone().requires_grad_() for p in gradients]
    for p, gradient in zip(expected, gradients, strict=True):
        p.grad = gradient.clone()
    nn.utils.clip_grad_norm_(expected, 0.05)
    for found, wanted in zip(clipped, expected, strict=True):
        torch.testing.assert_close(found, wanted.grad)


def test_a_gradient_below_the_clip_is_left_alone(digits):
    _, clipped = one_step(make_trainer(digits, grad_clip=1e6))
    _, plain = one_step(make_trainer(digits))
    assert all(torch.equal(a, b) for a, b in zip(clipped, plain, strict=True))


@pytest.mark.parametrize(("name", "make"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizers_are_pytorchs(digits, name, make):
    changes = {"optimizer": name, "betas": (0.8, 0.95), "weight_decay": 0.1, "adam_eps": 1e-6}
    trainer, module = make_trainer(digits, **changes), Pixels()
    plain = make(
        module.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6, fused=False, foreach=False
    )
    for step in range(12):
        batch = trainer.loader.batch(step)
        trainer.train_step(batch)
        (batch.images.float() / 127.5 - 1 - module.picture * module.scale).square().mean().backward()
        plain.step()
        plain.zero_grad()
    for found, wanted in zip(trainer.module.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert trainer.optimizer.defaults["fused"] is True


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_the_closed_forms(schedule):
    config = TrainConfig(steps=100, warmup=10, lr=0.5, lr_schedule=schedule)
    for step in range(100):
        done = (step - 10) / 90
        after = {"constant": 1, "linear": 1 - done, "cosine": math.cos(math.pi * done / 2) ** 2}[schedule]
        wanted = 0.5 * (step + 1) / 10 if step < 10 else 0.5 * after
        assert learning_rate(config, step) == pytest.approx(wanted, rel=1e-12)
    assert learning_rate(config, 9) == 0.5


def test_no_warm_up_and_nothing_but_warm_up():
    assert learning_rate(TrainConfig(steps=5, warmup=0, lr=0.5), 0) == 0.5
    long = TrainConfig(steps=5, warmup=50, lr=0.5, lr_schedule="cosine")
    assert [learning_rate(long, step) for step in (0, 4)] == pytest.approx([0.01, 0.05])


def test_the_optimizer_gets_the_rate_of_the_step(digits):
    trainer = make_trainer(digits, warmup=4)
    rates = [trainer.train_step(trainer.loader.batch(step))[0].lr for step in range(5)]
    assert rates == [0.0025, 0.005, 0.0075, 0.01, 0.01]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(digits, error):
    wanted, gradients = one_step(make_trainer(digits, network()))
    warnings: list[str] = []
    trainer = make_trainer(digits, network(), warnings=warnings)
    real, seen = trainer.module.forward, []

    def forward(x, labels, stream):
        seen.append(len(x))
        if len(x) > 3 or len(seen) == 4:
            raise error
        return real(x, labels, stream)

    trainer.module.forward = forward
    losses, found = one_step(trainer)
    assert seen == [8, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert trainer.micro_batch == 1
    assert warnings == [f"out of memory: going on with {n} images at a time, the same global batch." for n in (4, 2, 1)]
    torch.testing.assert_close(losses[-8:], wanted, rtol=1e-6, atol=0)
    assert relative(found, gradients) < 2e-6
    trainer.train_step(trainer.loader.batch(1))
    assert len(warnings) == 3


def test_memory_too_small_for_one_image_is_a_sentence(digits):
    trainer = make_trainer(digits, micro_batch=1)

    def forward(*_):
        raise torch.OutOfMemoryError("out")

    trainer.module.forward = forward
    with pytest.raises(ConfigError, match=r"^out of memory with 1 images at a time; .*\.$"):
        trainer.train_step(trainer.loader.batch(0))


def test_other_runtime_errors_pass_through(digits):
    trainer = make_trainer(digits)

    def forward(*_):
        raise RuntimeError("shapes differ")

    trainer.module.forward = forward
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.train_step(trainer.loader.batch(0))


class Watching(Pixels):
    """Pixels that are told of every image's loss."""

    def __init__(self, bad: dict[int, int] | None = None) -> None:
        super().__init__(bad)
        self.told: list[tuple[int, list[int], torch.Tensor]] = []

    def observe(self, losses, stream):
        self.told.append((stream.step, stream.ids.tolist(), losses))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_module_that_observes_is_told_the_losses_of_the_whole_batch_in_order(digits, micro_batch):
    trainer = make_trainer(digits, Watching(), micro_batch=micro_batch)
    losses, _ = one_step(trainer)
    trainer.train_step(trainer.loader.batch(1))
    (first, places, found), (second, _, _) = trainer.module.told
    assert (first, second, places) == (0, 1, list(range(8)))
    assert found.dtype == torch.float64
    assert torch.equal(found, losses.double())


def test_a_step_that_is_left_out_is_not_observed(digits):
    trainer = make_trainer(digits, Watching({1: 2}), warnings=[], nan="skip:1", steps=4)
    trainer.run([], lambda: False)
    assert [step for step, _, _ in trainer.module.told] == [0, 2, 3]


class Recorder:
    """A hook that remembers what it was told."""

    def __init__(self, fail_at: int = -1) -> None:
        self.results, self.finished, self.fail_at = [], [], fail_at

    def after(self, trainer, result):
        self.results.append(result)
        if result.step == self.fail_at:
            raise DataError("cannot write x: No space left on device; free some space.")

    def finish(self, trainer):
        self.finished.append(trainer.step)


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_nan_stops_before_the_update(digits, gradient):
    trainer, hook = make_trainer(digits, Pixels({3: 5}, gradient), ema=("0.9",)), Recorder()
    with pytest.raises(DivergedError) as caught:
        trainer.run([hook], lambda: False)
    clean = make_trainer(digits, steps=3, ema=("0.9",))
    clean.run([], lambda: False)
    found, wanted = trainer.tensors(), clean.tensors()
    for group in wanted:
        assert all(torch.equal(found[group][name], wanted[group][name]) for name in wanted[group])
    assert [result.step for result in hook.results] == [1, 2, 3]
    assert (trainer.step, trainer.skipped, hook.finished) == (3, 0, [3])
    message = str(caught.value)
    assert message.startswith("step 4: loss ")
    index = int(trainer.loader.batch(3).indices[5])
    assert ("no single image's loss" if gradient else f"(images {index})") in message


def test_allowed_nans_are_left_out_and_counted(digits):
    warnings: list[str] = []
    trainer = make_trainer(digits, Pixels({2: 0, 5: 7, 9: 1}), warnings=warnings, nan="skip:2", ema=("0.5",))
    hook = Recorder()
    with pytest.raises(DivergedError, match="step 10"):
        trainer.run([hook], lambda: False)
    assert [result.step for result in hook.results if result.skipped] == [3, 6]
    assert [warning.rpartition(": ")[2] for warning in warnings] == [
        "step left out (1 of 2 allowed).", "step left out (2 of 2 allowed).",
    ]  # fmt: skip
    assert trainer.state()["skipped"] == 2
    assert trainer.emas[0].updates == 7
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {7}
    assert all(p.isfinite().all() for p in trainer.module.parameters())


def resumed(digits, trainer: Trainer, module=None, **changes) -> Trainer:
    """A new trainer at the old one's step."""
    saved, new = trainer.tensors(), make_trainer(digits, module, warnings=[], **changes)
    new.load(trainer.step, trainer.state(), lambda name: {key: value.clone() for key, value in saved[name].items()})
    return new


def test_a_step_that_stopped_the_run_is_not_counted_twice(digits):
    bad = {2: 0, 4: 0}
    trainer = make_trainer(digits, Pixels(bad), warnings=[], nan="skip:1")
    with pytest.raises(DivergedError, match="step 5"):
        trainer.run([], lambda: False)
    again = resumed(digits, trainer, Pixels(bad), nan="skip:2")
    again.run([], lambda: False)
    assert (again.step, again.skipped) == (20, 2)


def test_stop_is_asked_once_a_step_and_heard_at_its_end(digits):
    trainer, hook = make_trainer(digits), Recorder()
    answers = iter([False, False, True])
    trainer.run([hook], lambda: next(answers))
    assert (trainer.step, trainer.stopped, hook.finished) == (3, True, [3])
    trainer.run([hook], lambda: False)
    assert (trainer.step, trainer.stopped, hook.finished) == (20, False, [3, 20])
    assert [result.step for result in hook.results] == list(range(1, 21))


def test_a_hook_that_cannot_write_is_told_of_and_training_goes_on(digits):
    warnings: list[str] = []
    trainer, second = make_trainer(digits, warnings=warnings), Recorder()
    trainer.run([Recorder(fail_at=4), second], lambda: False)
    assert warnings == ["step 4: cannot write x: No space left on device; free some space. Training goes on."]
    assert len(second.results) == 20


@pytest.mark.parametrize("runtime", [CPU, BF16], ids=["float32", "bf16"])
def test_tensors_and_state_are_all_there_is(digits, runtime):
    def make(**changes):
        return make_trainer(digits, network(), runtime, ema=("0.9", "warmup:decay=0.99"), micro_batch=3, **changes)

    straight, stopped = make(), make(steps=7)
    straight.run([], lambda: False)
    stopped.run([], lambda: False)
    saved, again = stopped.tensors(), make()
    again.load(7, stopped.state(), lambda name: {key: value.clone() for key, value in saved[name].items()})
    again.run([], lambda: False)
    found, wanted = again.tensors(), straight.tensors()
    assert set(wanted) == {"model", "ema-0.9", "ema-0.99", "optimizer"}
    for group in wanted:
        assert set(found[group]) == set(wanted[group])
        assert all(torch.equal(found[group][name], wanted[group][name]) for name in wanted[group])
    assert again.state() == straight.state()
    assert all(value.dtype == torch.float32 for value in wanted["model"].values())


def test_the_micro_batch_that_memory_allowed_is_kept_unless_it_is_given(digits):
    trainer = make_trainer(digits)
    trainer.micro_batch = 2
    assert resumed(digits, trainer).micro_batch == 2
    assert resumed(digits, trainer, micro_batch=5).micro_batch == 5


def test_what_does_not_fit_is_named(digits):
    trainer = make_trainer(digits, ema=("0.9",))
    with pytest.raises(CheckpointError, match=r"holds no moving average 0\.8 \(--train\.ema\), but 0\.9\.$"):
        resumed(digits, trainer, ema=("0.8",))
    module = Pixels()
    state = module.state_dict()
    for wrong, words in (
        ({"scale": state["scale"]}, "picture is missing"),
        ({**state, "extra": state["scale"]}, "extra is not known"),
        ({**state, "scale": torch.ones(3)}, r"scale is \(3,\), the model has \(8,\)"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_weights(module, wrong)


def test_fewer_images_than_processes(digits):
    loader = Loader(digits, 2, seed=0)
    with pytest.raises(ConfigError, match=r"--batch-size=2 is smaller than the number of processes, 3\."):
        Trainer(Pixels(), loader, TrainConfig(batch_size=2), CPU, World(0, 3), 0, pytest.fail)


def test_the_stop_clock():
    assert not StopClock(None)()
    assert not StopClock(1e6)()
    assert StopClock(0)()
