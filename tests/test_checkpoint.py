"""A checkpoint is there whole or not at all; any damage is noticed and named."""

import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import checkpoint, files
from ddpm.config import DiffusionConfig, ModelConfig, RunConfig, TrainConfig
from ddpm.errors import CheckpointError, DataError
from ddpm.models import build_diffusion

CONFIG = RunConfig(seed=9, train=TrainConfig(steps=77))
STATE = {
    "emas": ["0.9"],
    "images": 24,
    "shape": [1, 8, 8],
    "classes": [],
    "data": {"name": "digits", "images": 5, "fingerprint": "f"},
    "text": "a — b",
}
NAMES = [
    "MANIFEST.json", "config.yaml", "ema-0.9.safetensors", "model.safetensors", "optimizer.safetensors", "state.json",
    "state.safetensors",
]  # fmt: skip


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"a.weight": torch.full((3, 4), value), "b": torch.arange(5, dtype=torch.float64) * value}
    return {
        "model": weights,
        "ema-0.9": {name: tensor * 2 for name, tensor in weights.items()},
        "optimizer": {"a.weight.step": torch.tensor(3.0), "a.weight.exp_avg": torch.zeros(3, 4).t()},
        "state": {"n": torch.tensor([2**40])},
    }


def save(folder: Path, step: int, value: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    return checkpoint.save(folder, step, tensors(value), STATE, CONFIG)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writes beyond so many bytes fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_folder_is_as_documented(tmp_path):
    path = save(tmp_path, 5000)
    assert path == tmp_path / "step-00005000"
    assert sorted(p.name for p in path.iterdir()) == NAMES
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest == {
        "format": 1,
        "files": {
            name: {"bytes": (path / name).stat().st_size, "sha256": files.sha256(path / name)} for name in NAMES[1:]
        },
    }
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_saved_comes_back(tmp_path):
    found = checkpoint.load(save(tmp_path, 3))
    assert (found.step, found.emas, found.config()) == (3, ["0.9"], CONFIG)
    assert found.state == {"format": 1, "step": 3, **STATE}
    for name, group in tensors().items():
        loaded = found.tensors(name)
        assert set(loaded) == set(group)
        assert all(
            torch.equal(loaded[key], tensor) and loaded[key].dtype == tensor.dtype for key, tensor in group.items()
        )


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in save(tmp_path, 1).iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(NAMES, 0o644)


def test_the_same_step_gives_the_same_bytes(tmp_path):
    assert tree(save(tmp_path / "a", 4)) == tree(save(tmp_path / "b", 4))


def test_a_whole_checkpoint_of_the_step_is_kept_and_a_damaged_one_replaced(tmp_path):
    path = save(tmp_path, 4, 1.0)
    before = tree(path)
    save(tmp_path, 4, 2.0)
    assert tree(path) == before
    (path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 4, 2.0)
    assert checkpoint.load(path).tensors("model")["a.weight"][0, 0] == 2.0


def test_steps_beyond_eight_digits_sort_by_number(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert [checkpoint.load(path).step for path in checkpoint.listing(tmp_path)] == [100_000_000, 99_999_999, 5]
    assert checkpoint.listing(tmp_path / "nowhere") == []
    assert checkpoint.latest(tmp_path / "nowhere", pytest.fail) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint to be read."""
    return save(tmp_path_factory.mktemp("whole"), 8)


@contextmanager
def damaged(whole: Path, name: str, data: bytes | None) -> Iterator[Path]:
    """The checkpoint with other bytes in a file (None: without it), for a while."""
    path = whole / name
    before = path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)
    try:
        yield path
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_flipped_byte_of_any_file_is_noticed_and_named(whole, name, data):
    content = bytearray((whole / name).read_bytes())
    offset = data.draw(st.integers(0, len(content) - 1))
    content[offset] ^= data.draw(st.integers(1, 255))
    with damaged(whole, name, bytes(content)), pytest.raises(CheckpointError) as caught:
        checkpoint.load(whole)
    assert str(whole) in str(caught.value)
    assert name == "MANIFEST.json" or str(whole / name) in str(caught.value)


def test_every_byte_of_the_manifest_counts(whole):
    content = (whole / "MANIFEST.json").read_bytes()
    number = content.index(b": 1") + 2
    flips = [(offset, 1 << offset % 8) for offset in range(len(content))]
    for offset, flip in flips + [(number, flip) for flip in range(1, 256)]:
        changed = bytearray(content)
        changed[offset] ^= flip
        with damaged(whole, "MANIFEST.json", bytes(changed)), pytest.raises(CheckpointError):
            checkpoint.load(whole)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_cut_of_any_file_is_noticed_and_named(whole, name, data):
    content = (whole / name).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    with damaged(whole, name, content[:length]), pytest.raises(CheckpointError, match=name):
        checkpoint.load(whole)
    with damaged(whole, name, content + b"\0"), pytest.raises(CheckpointError, match=name):
        checkpoint.load(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(whole, name):
    with damaged(whole, name, None), pytest.raises(CheckpointError, match=name):
        checkpoint.load(whole)
    assert checkpoint.load(whole).step == 8


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "5", '{"format": 1, "files": {}}', '{"format": "x", "files": {}}']
)
def test_a_manifest_of_another_form(whole, text):
    with damaged(whole, "MANIFEST.json", text.encode()), pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(whole)


def test_a_newer_format_asks_for_an_upgrade(whole):
    manifest = {**json.loads((whole / "MANIFEST.json").read_text()), "format": 2}
    text = json.dumps(manifest, indent=1).encode()
    with damaged(whole, "MANIFEST.json", text), pytest.raises(CheckpointError, match=r"newer ddpm .*; upgrade ddpm"):
        checkpoint.load(whole)


def test_the_newest_whole_one_is_found_and_each_damaged_one_told_of(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (paths[3] / "MANIFEST.json").unlink()
    (paths[2] / "optimizer.safetensors").write_bytes(b"x")
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path, warnings.append).step == 2
    assert [str(path) in warning for path, warning in zip((paths[3], paths[2]), warnings, strict=True)] == [True, True]
    assert "optimizer.safetensors: is damaged (it has 1 bytes, its manifest says" in warnings[1]
    for path in paths[:2]:
        (path / "state.json").unlink()
    assert checkpoint.latest(tmp_path, warnings.append) is None
    assert len(warnings) == 6


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "wanted"),
    [(1, 0, [60]), (2, 0, [50, 60]), (9, 0, [10, 20, 30, 40, 50, 60]), (1, 20, [20, 40, 60]), (2, 30, [30, 50, 60])],
)
def test_pruning(tmp_path, keep_last, keep_every, wanted):
    paths = [save(tmp_path, step) for step in range(10, 70, 10)]
    checkpoint.prune(tmp_path, keep_last, keep_every, keep=[paths[-1]])
    assert [checkpoint.load(path).step for path in reversed(checkpoint.listing(tmp_path))] == wanted


def test_the_one_just_saved_is_never_pruned(tmp_path):
    first, *_ = [save(tmp_path, step) for step in (1, 2, 3)]
    checkpoint.prune(tmp_path, 1, 0, keep=[first])
    assert [path.name for path in checkpoint.listing(tmp_path)] == ["step-00000003", "step-00000001"]


@pytest.mark.parametrize("stage", ["_save_tensors", "to_yaml", "_manifest_text"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_in_the_middle_leaves_nothing(tmp_path, monkeypatch, stage, error):
    save(tmp_path, 1)
    before = tree(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, stage, fail)
    monkeypatch.setattr(checkpoint, "_is_whole", lambda path: False)
    with pytest.raises(DataError if isinstance(error, OSError) else KeyboardInterrupt):
        save(tmp_path, 2)
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
    monkeypatch.undo()
    assert checkpoint.load(save(tmp_path, 2)).step == 2


def test_too_little_room_is_seen_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 999_999)
    with pytest.raises(DataError, match=r"step-00000002: needs 1\.1 MB but only 0\.9 MB are free; free some space\.$"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(files, "free_bytes", lambda path: 1_100_000)
    save(tmp_path, 2)


@pytest.mark.parametrize("key", ["images", "shape", "classes", "emas", "data"])
def test_a_state_that_lacks_a_key_is_told_by_it(tmp_path, key):
    state = {name: value for name, value in STATE.items() if name != key}
    path = checkpoint.save(tmp_path, 2, tensors(), state, CONFIG)
    with pytest.raises(CheckpointError, match=rf"state\.json: has no '{key}'"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shape": [1, 8]}, "'shape' is not three"), ({"classes": 3}, "'classes'"), ({"data": {"name": "a"}}, "'images'")],
)
def test_a_state_of_another_form_is_told(tmp_path, change, message):
    path = checkpoint.save(tmp_path, 2, tensors(), {**STATE, **change}, CONFIG)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


def test_parameters_are_counted_by_the_header_without_running_statistics(tmp_path):
    norm = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = checkpoint.save(tmp_path, 2, {"model": norm.state_dict()}, STATE, CONFIG)
    assert checkpoint.load(path).parameters() == sum(p.numel() for p in norm.parameters()) == 120


def test_what_a_model_has_learnt_beside_its_weights_is_not_counted(tmp_path):
    parts = DiffusionConfig(variance="analytic", times="loss-second-moment")
    model = build_diffusion(
        ModelConfig(channels=8, channel_mults=(1,), attention=(), norm_groups=2), parts, (1, 4, 4), 0
    )
    assert {"eps_square", "history.losses", "history.counts"} <= set(model.state_dict())
    path = checkpoint.save(tmp_path, 2, {"model": model.state_dict()}, STATE, CONFIG)
    assert checkpoint.load(path).parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("limit", [10, 200, 500])
def test_a_full_disk_leaves_no_partial_folder(tmp_path, limit):
    with file_size_limit(limit), pytest.raises(DataError):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.load(save(tmp_path, 2)).step == 2


def test_a_file_that_is_not_safetensors_and_a_config_that_cannot_be_used(tmp_path):
    path = save(tmp_path, 2)
    found = checkpoint.load(path)
    with pytest.raises(CheckpointError, match=r"ema-0\.5\.safetensors: cannot be read"):
        found.tensors("ema-0.5")
    (path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        found.tensors("model")
    (path / "config.yaml").write_text("train: {stepz: 4}")
    with pytest.raises(CheckpointError, match=r"its config cannot be used: .*stepz is not known"):
        found.config()
