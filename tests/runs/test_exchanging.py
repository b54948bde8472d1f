"""Foreign files in every verb: drawn from, looked at, started from; what they are not, in one line."""

import json
from pathlib import Path

import pytest
import torch

from ddpm import checkpoint, cli, files, runs
from ddpm.errors import CheckpointError
from tests.formats.filled import stored
from tests.formats.test_pytorch_ddpm import checkpoint as pytorch_ddpm

DATA = ["--data.dataset", "shapes:num_images=16", "--data.size", "8", "--data.channels", "3"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "ckpt.pt"
    torch.save(pytorch_ddpm(stored("pytorch_ddpm")), path)
    return path


def test_sample_draws_from_a_file_as_from_the_run_made_of_it(foreign, tmp_path, tree):
    runs.import_checkpoint(foreign, tmp_path / "run")
    for source, out in ((foreign, "a"), (tmp_path / "run", "b")):
        words = ["sample", str(source), "--num-images", "2", "--chunk", "2", "--no-gif", "--out", str(tmp_path / out)]
        assert cli.main([*words, "--device", "cpu"]) == 0
    one, two = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name.endswith(".png"))
    assert json.loads(one["recipe.json"])["weights_sha256"] == files.sha256(foreign)


def test_the_raw_weights_and_the_average_are_told_apart(foreign):
    average, raw = runs.load(foreign), runs.load(foreign, ema="none")
    assert (average.weights, raw.weights, average.step) == ("ema-0.9999", "model", 42)
    for (name, one), two in zip(average.diffusion.state_dict().items(), raw.diffusion.parameters(), strict=True):
        assert torch.equal(one, two * 0.5), name


def test_info_of_a_file_and_of_an_imported_run(foreign, tmp_path, capsys):
    assert cli.main(["info", str(foreign)]) == 0
    said = capsys.readouterr().out
    for part in ("pytorch-ddpm", files.sha256(foreign), "3 x 8 x 8", "with its state", "linear:timesteps=3"):
        assert part in said
    runs.import_checkpoint(foreign, tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["info", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    weights = tmp_path / "run/checkpoints/step-00000042/ema-0.9999.safetensors"
    for part in ("imported from", files.sha256(foreign), files.sha256(weights), "42 of 800,000"):
        assert part in said


def test_a_new_run_starts_from_its_weights_alone(foreign, tmp_path):
    words = [
        "train",
        "--config",
        str(tmp_path / "a.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
        "--init",
        str(foreign),
        *DATA,
    ]
    (tmp_path / "a.yaml").write_text(
        "{train: {steps: 1, batch_size: 2, preview_every: 0, warmup: 1000000}, sample: {sampler: ddpm}}"
    )
    assert cli.main([*words, "--device", "cpu"]) == 0
    found = runs.find_checkpoint(tmp_path / "run", pytest.fail)
    assert found.step == 1
    assert found.config().model.time_embedding == "interleaved"
    assert found.config().diffusion.schedule.startswith("linear:timesteps=3")
    started = runs.load(foreign).diffusion.state_dict()
    assert all(torch.allclose(found.tensors("model")[name], value, atol=1e-8) for name, value in started.items())
    assert {float(value) for name, value in found.tensors("optimizer").items() if name.endswith(".step")} == {1.0}
    assert cli.main([*words, "--device", "cpu"]) == 0  # the same command: it is done already


def test_flags_that_the_file_decides_are_refused(foreign, tmp_path, capsys):
    assert cli.main(["train", "cifar10", "--init", str(foreign), "--model.channels", "64"]) == 2
    assert "--model.channels cannot go with --init" in capsys.readouterr().err


def test_other_images_are_refused_with_init(foreign, tmp_path, capsys):
    words = ["train", "digits", "--init", str(foreign), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*words, "--dry-run"]) == 4
    assert "network.stem.weight is (32, 3, 3, 3)" in capsys.readouterr().err


def test_an_import_never_goes_over_a_run(foreign, tmp_path, capsys):
    words = ["import", str(foreign), "--run-dir", str(tmp_path / "run")]
    assert cli.main(words) == 0
    before = checkpoint.listing(tmp_path / "run/checkpoints")
    assert cli.main(words) == 3
    assert "holds a run already" in capsys.readouterr().err
    assert checkpoint.listing(tmp_path / "run/checkpoints") == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pt", b""),
        ("text.pth", b"no tensors here"),
        ("short.pt", None),
        ("zip.npz", b"PK\x03\x04 cut"),
        ("t.safetensors", b"x"),
    ],
)
@pytest.mark.parametrize("verb", ["info", "sample", "import", "evaluate"])
def test_what_is_no_checkpoint_is_one_line(foreign, tmp_path, monkeypatch, capsys, name, content, verb):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(foreign.read_bytes()[:5000] if content is None else content)
    code = cli.main([verb, name])
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert code == (3 if (verb, name) == ("evaluate", "zip.npz") else 4)
    assert len(line) < 400
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unknown_file_of_tensors_names_the_programs(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of a known program \(.*pytorch-ddpm.*\)"):
        runs.load(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"is no ckpt.pt of pytorch-ddpm"):
        runs.import_checkpoint(tmp_path / "a.pt", tmp_path / "run", spec="pytorch-ddpm")
    with pytest.raises(CheckpointError, match="does not exist"):
        runs.import_checkpoint(tmp_path / "b.pt", tmp_path / "run")
