"""Stop, kill, damage, go on: the run ends bit for bit where it would have ended."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm import checkpoint
from ddpm.errors import CheckpointError

BUSY = {
    "data.flip": "true",
    "data.augment": "edm:probability=0.5",
    "model.attention": (1,),
    "model.dropout": 0.2,
    "diffusion.label_drop": 0.3,
    "train.batch_size": 12,
    "train.micro_batch": 5,
    "train.grad_clip": 0.5,
    "train.ema": ("0.9", "warmup:decay=0.99", "constant:decay=0.95,start=10,every=3", "half-life:images=100"),
    "train.log_every": 7,
    "train.steps": 40,
    "train.checkpoint_every": 1000,
}
"""Everything random or stateful at once; the log steps and the stop do not meet."""

STATEFUL = {
    **BUSY,
    "diffusion.schedule": "cosine:timesteps=6",
    "diffusion.times": "loss-second-moment:history=3",
    "diffusion.variance": "analytic:images=20",
    "diffusion.weighting": "min-snr",
    "train.steps": 24,
    "train.preview_every": 12,
    "train.preview_images": 4,
    "sample.sampler": "ddpm:steps=3",
}
"""Times that follow past losses (every history is full before step 8) and a variance that is estimated after the last
step; previews draw with it, and before with another."""


def final(run: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint, but for the config (which fields may differ in) and its hash."""
    newest = checkpoint.listing(run / "checkpoints")[0]
    return {p.name: p.read_bytes() for p in newest.iterdir() if p.name not in ("MANIFEST.json", "config.yaml")}


def weights_hash(run: Path) -> str:
    return hashlib.sha256(final(run)["model.safetensors"]).hexdigest()


def events(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        (BUSY, {}),
        (BUSY, {"data.workers": 2}),
        ({**BUSY, "runtime.precision": "bf16", "data.workers": 2}, {}),
        (
            {"train.steps": 40, "train.log_every": 5, "train.checkpoint_every": 1000, "train.ema": (), "train.lr_schedule": "cosine",
             "train.optimizer": "adamw", "train.weight_decay": 0.1, "model.conditioning": "none"},
            {},
        ),
    ],
    ids=["busy", "other-workers", "bf16-workers", "cosine-unconditional"],
)  # fmt: skip
def test_forty_steps_are_thirteen_and_twenty_seven(zygote, words, lines, tmp_path, changes, after):
    straight = zygote.run("train", "digits", *words(changes), "--run-dir=straight", cwd=tmp_path)
    stopped = zygote.run("train", "digits", *words(changes), "--run-dir=parts", cwd=tmp_path, stop_at=13)
    assert (straight.wait(), stopped.wait()) == (0, 0)
    assert checkpoint.listing(tmp_path / "parts/checkpoints")[0].name == "step-00000013"
    assert zygote.run("train", "digits", *words({**changes, **after}), "--run-dir=parts", cwd=tmp_path).wait() == 0
    assert final(tmp_path / "parts") == final(tmp_path / "straight")
    assert lines(tmp_path / "parts") == lines(tmp_path / "straight")
    assert events(tmp_path / "parts") == ["started", "saved", "stopped", "resumed", "saved", "finished"]


def test_what_is_learnt_beside_the_weights_survives_a_kill_and_a_stop(zygote, words, wait_for, lines, tmp_path):
    given = ("train", "digits", *words({**STATEFUL, "train.checkpoint_every": 4, "train.log_every": 1}))
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert zygote.run(*given, f"--run-dir={straight}", cwd=tmp_path).wait() == 0
    killed = zygote.start(*given, f"--run-dir={parts}", cwd=tmp_path, step_s=0.1)
    wait_for(lambda: last_step(parts) >= 8)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert zygote.run(*given, f"--run-dir={parts}", cwd=tmp_path, stop_at=3).wait() == 0
    stood = load_file(checkpoint.listing(parts / "checkpoints")[0] / "model.safetensors")
    assert bool((stood["history.counts"] >= 3).all()) and bool(stood["eps_square"].isnan().all())
    assert zygote.run(*given, f"--run-dir={parts}", cwd=tmp_path).wait() == 0
    assert final(parts) == final(straight)
    assert lines(parts) == lines(straight)
    assert {p.name for p in (parts / "samples").iterdir()} == {p.name for p in (straight / "samples").iterdir()}
    assert bool(
        (load_file(checkpoint.listing(parts / "checkpoints")[0] / "ema-0.9.safetensors")["eps_square"] > 0).all()
    )


def test_what_two_processes_learn_from_losses_and_data_is_what_one_does(zygote, words, lines, tmp_path):
    changes = {**STATEFUL, "train.steps": 14, "train.adam_eps": 1e-4, "train.micro_batch": 4}
    given = ("train", "digits", *words(changes))
    assert zygote.run(*given, "--run-dir=one", cwd=tmp_path).wait() == 0
    assert zygote.run(*given, "--run-dir=two", cwd=tmp_path, processes=2).wait() == 0
    for how in ({"stop_at": 9}, {}):
        assert zygote.run(*given, "--run-dir=parts", cwd=tmp_path, processes=2, **how).wait() == 0
    assert final(tmp_path / "parts") == final(tmp_path / "two")
    one, two = (
        load_file(checkpoint.listing(tmp_path / name / "checkpoints")[0] / "ema-0.9.safetensors")
        for name in ("one", "two")
    )
    assert bool((one["history.counts"] >= 3).all()) and int(one["history.counts"].sum()) == 14 * 12
    assert bool((one["eps_square"] > 0).all())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_two_processes_resume_exactly_and_give_one_processs_run(zygote, words, lines, tmp_path):
    changes = {**BUSY, "train.steps": 10, "train.batch_size": 7, "train.micro_batch": 3, "train.log_every": 3}
    changes["train.adam_eps"] = 1e-4  # Adam makes whole steps of the rounding noise of gradients that are zero
    given = ("train", "digits", *words(changes))
    assert zygote.run(*given, "--run-dir=two", cwd=tmp_path, processes=2).wait() == 0
    for how in ({"stop_at": 4}, {}):
        assert zygote.run(*given, "--run-dir=parts", cwd=tmp_path, processes=2, **how).wait() == 0
    assert final(tmp_path / "parts") == final(tmp_path / "two")
    assert lines(tmp_path / "parts") == lines(tmp_path / "two")

    assert zygote.run(*given, "--run-dir=one", cwd=tmp_path).wait() == 0
    assert zygote.run(*given, "--run-dir=mixed", cwd=tmp_path, processes=2, stop_at=4).wait() == 0
    assert zygote.run(*given, "--run-dir=mixed", cwd=tmp_path).wait() == 0
    one = load_file(checkpoint.listing(tmp_path / "one/checkpoints")[0] / "model.safetensors")
    for other in ("two", "mixed"):
        found = load_file(checkpoint.listing(tmp_path / other / "checkpoints")[0] / "model.safetensors")
        for name, tensor in one.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        for mine, theirs in zip(lines(tmp_path / other), lines(tmp_path / "one"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


def test_fewer_images_than_processes_is_refused(zygote, words, tmp_path):
    done = zygote.run("train", "digits", *words({"train.batch_size": 1}), "--run-dir=run", cwd=tmp_path, processes=2)
    assert done.wait() == 2
    assert done.errors == ["ddpm train: --batch-size=1 is smaller than the number of processes, 2."]
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def eternal() -> dict[str, object]:
    """A checkpoint every step, and time enough to be interrupted."""
    return {"train.steps": 40, "train.checkpoint_every": 1, "train.log_every": 1}


@pytest.fixture(scope="module")
def undisturbed(_zygote, words, eternal, tmp_path_factory) -> Path:
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert _zygote.run("train", "digits", *words(eternal), "--run-dir=run", cwd=folder).wait() == 0
    return folder / "run"


def survive_kills(zygote, words, wait_for, eternal, undisturbed, lines, folder, kills):
    """Kill a run so many times at random moments, starting again where it is done; the checks of every start."""
    chance = random.Random(kills)
    run, seen = folder / "run", 0
    given = ("train", "digits", *words(eternal), f"--run-dir={run}")
    for _ in range(kills):
        before = last_step(run)
        if before > 30:
            seen += 1
            assert zygote.run(*given, cwd=folder).wait() == 0
            assert weights_hash(run) == weights_hash(undisturbed)
            shutil.rmtree(run)
        started = zygote.start(*given, cwd=folder)
        if chance.random() < 0.8:
            wait_for(lambda before=before, started=started: last_step(run) != before or dead(started))
        time.sleep(chance.uniform(0, 0.06))
        started.kill()
        assert started.wait() in (-signal.SIGKILL, 0)
        newest = checkpoint.latest(run / "checkpoints", pytest.fail)
        assert newest is not None or last_step(run) <= 1
    ended = zygote.run(*given, cwd=folder)
    assert ended.wait() == 0, ended.errors
    assert ended.errors == []
    assert weights_hash(run) == weights_hash(undisturbed)
    assert lines(run) == lines(undisturbed)
    assert [p for p in run.rglob("*") if ".tmp-" in p.name] == []


def dead(command) -> set[int]:
    """The process itself, once it has ended."""
    state = Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return {command.pid} if state == "Z" else set()


def test_kills_at_random_moments(zygote, words, wait_for, eternal, undisturbed, lines, tmp_path):
    survive_kills(zygote, words, wait_for, eternal, undisturbed, lines, tmp_path, kills=6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills_at_random_moments(zygote, words, wait_for, eternal, undisturbed, lines, tmp_path):
    survive_kills(zygote, words, wait_for, eternal, undisturbed, lines, tmp_path, kills=50)


def test_a_start_removes_what_a_killed_save_left(zygote, words, tmp_path):
    given = ("train", "digits", *words(), "--run-dir=run")
    assert zygote.run(*given, cwd=tmp_path, stop_at=3).wait() == 0
    left = tmp_path / "run/checkpoints/.step-00000004.tmp-1-abcdef01"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run/.config.tmp-1-abcdef01.yaml").write_bytes(b"half")
    assert zygote.run(*given, cwd=tmp_path).wait() == 0
    assert [p for p in (tmp_path / "run").rglob("*") if ".tmp-" in p.name] == []


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_the_same_command_goes_on(
    zygote, words, wait_for, eternal, undisturbed, lines, tmp_path, number, processes
):
    changes = {**eternal, "train.checkpoint_every": 1000}
    given = ("train", "digits", *words(changes), "--run-dir=run")
    how = {"cwd": tmp_path, "step_s": 0.03}
    group = zygote.group(processes, *given, **how) if processes > 1 else [zygote.start(*given, **how)]
    wait_for(lambda: last_step(tmp_path / "run") >= 3)
    group[-1].kill(number)
    assert [command.wait() for command in group] == [75] * processes
    assert [command.errors for command in group] == [[]] * processes
    stood = checkpoint.latest(tmp_path / "run/checkpoints", pytest.fail)
    assert 3 <= stood.step < 40
    assert f"stopped and saved at step {stood.step} of 40; the same command goes on" in group[0].output
    assert zygote.run(*given, cwd=tmp_path, processes=processes).wait() == 0
    assert events(tmp_path / "run") == ["started", "saved", "stopped", "resumed", "saved", "finished"]
    if processes == 1:
        assert weights_hash(tmp_path / "run") == weights_hash(undisturbed)
        assert lines(tmp_path / "run") == lines(undisturbed)


def test_a_second_signal_ends_at_once(zygote, words, wait_for, tmp_path):
    command = zygote.start("train", "digits", *words(), "--run-dir=run", cwd=tmp_path, hang_at=5)
    wait_for(lambda: last_step(tmp_path / "run") == 4)
    for _ in range(3):  # as a Ctrl-C that comes from the terminal and from a launcher: one signal
        command.kill(signal.SIGINT)
        time.sleep(0.05)
    time.sleep(1)
    assert dead(command) == set()
    command.kill(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM


def launcher(words: list[str], folder: Path, module: tuple[str, ...] = ("-m", "ddpm")) -> subprocess.Popen[str]:
    """A launcher in a process group of its own, as a terminal has it."""
    return subprocess.Popen(
        [sys.executable, *module, *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_reaches_launcher_and_processes_and_saves(words, wait_for, tmp_path):
    changes = {"train.steps": 100_000, "train.log_every": 1, "train.checkpoint_every": 50_000}
    started = launcher(["train", "digits", *words(changes), "--run-dir=run", "--processes=2"], tmp_path)
    with started:
        wait_for(lambda: last_step(tmp_path / "run") >= 3)
        os.killpg(started.pid, signal.SIGINT)
        assert started.wait() == 75, started.stderr.read()
    assert events(tmp_path / "run") == ["started", "saved", "stopped"]
    found = checkpoint.latest(tmp_path / "run/checkpoints", pytest.fail)
    assert found.step >= 3
    assert found.state["processes"] == 2


def test_a_killed_process_ends_the_other_and_the_checkpoint_stands(words, wait_for, tmp_path):
    changes = {"train.steps": 100_000, "train.log_every": 1, "train.checkpoint_every": 2}
    started = launcher(["train", "digits", *words(changes), "--run-dir=run", "--processes=2"], tmp_path)
    with started:
        wait_for(lambda: last_step(tmp_path / "run") >= 3)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert started.wait(timeout=30) == 128 + signal.SIGKILL
        errors = started.stderr.read()
    assert "process 1 of 2 was ended by signal 9" in errors
    assert "Traceback" not in errors
    assert checkpoint.latest(tmp_path / "run/checkpoints", pytest.fail).step >= 2


def test_under_torchrun_a_signal_saves(words, wait_for, tmp_path):
    changes = {"train.steps": 100_000, "train.log_every": 1, "train.checkpoint_every": 50_000}
    module = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ddpm")
    started = launcher(["train", "digits", *words(changes), "--run-dir=run"], tmp_path, module)
    with started:
        wait_for(lambda: last_step(tmp_path / "run") >= 3)
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=60) == 1
        started.stderr.read()
    assert events(tmp_path / "run") == ["started", "saved", "stopped"]
    assert checkpoint.latest(tmp_path / "run/checkpoints", pytest.fail).state["processes"] == 2


FILES = ["model", "ema-0.9", "ema-0.5", "optimizer", "state"]


@pytest.mark.parametrize(
    "name", [*(f"{name}.safetensors" for name in FILES), "state.json", "config.yaml", "MANIFEST.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(trained, tmp_path, name, damage):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000006" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-1])
    if damage == "missing":
        path.unlink()
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path / "run/checkpoints", warnings.append).step == 3
    assert len(warnings) == 1
    assert name in warnings[0]
    assert warnings[0].endswith("The checkpoint before it is used.")


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(zygote, words, tiny, trained, lines, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    damaged = run / "checkpoints/step-00000006/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    given = ("train", "digits", *words({"train.ema": ("0.9", "warmup:decay=0.5")}), "--run-dir=run")
    done = zygote.run(*given, cwd=tmp_path)
    assert done.wait() == 0, done.errors
    assert len(done.errors) == 1
    assert done.errors[0].startswith("warning: ") and "optimizer.safetensors" in done.errors[0]
    assert "going on from step 3" in done.output
    assert events(run)[-4:] == ["warned", "resumed", "saved", "finished"]
    assert final(run) == final(trained)
    assert lines(run) == lines(trained)


def test_when_all_are_damaged_or_none_is_there_it_is_exit_4(zygote, words, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    given = ("train", "digits", *words({"train.ema": ("0.9", "warmup:decay=0.5")}))
    for path in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    done = zygote.run(*given, "--run-dir=run", cwd=tmp_path)
    assert done.wait() == 4
    assert [line.startswith("warning: ") for line in done.errors] == [True, True, False]
    assert "none of its 2 checkpoints is whole" in done.errors[-1]
    missing = zygote.run(*given, "--run-dir=fresh", "--resume=must", cwd=tmp_path)
    assert missing.wait() == 4
    assert missing.errors == ["ddpm train: --resume must: fresh holds no checkpoint."]
    assert not (tmp_path / "fresh").exists()
    with pytest.raises(CheckpointError):
        checkpoint.load(checkpoint.listing(tmp_path / "run/checkpoints")[0])


def test_a_checkpoint_of_other_processes_and_threads_goes_on_with_a_warning(zygote, words, tmp_path):
    assert zygote.run("train", "digits", *words(), "--run-dir=run", cwd=tmp_path, stop_at=5).wait() == 0
    done = zygote.run("train", "digits", *words({"runtime.threads": 2}), "--run-dir=run", cwd=tmp_path)
    assert done.wait() == 0
    assert done.errors == ["warning: threads 1 before, 2 now: the run goes on, but not bit for bit."]


def test_a_mistake_in_a_group_is_told_by_the_first_and_ends_all(zygote, words, tmp_path):
    for more, code, said in (
        (["--resume=must"], 4, "ddpm train: --resume must: run holds no checkpoint."),
        (["--train.ema=1.5"], 2, "ddpm train: ema 'constant': decay=1.5 is wrong: input should be less than 1."),
    ):
        group = zygote.group(2, "train", "digits", *words(), "--run-dir=run", *more, cwd=tmp_path)
        assert group[0].wait() == code
        assert group[0].errors == [said]
        assert group[1].wait() in (1, code)
        (other,) = group[1].errors
        assert other.startswith("warning: process 1: ") and "a bug" not in other
        assert not (tmp_path / "run").exists()
