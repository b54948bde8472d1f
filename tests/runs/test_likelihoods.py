"""`ddpm evaluate --likelihood`: held-out images, the protocol on every number, the same numbers however it is run."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

import ddpm
from ddpm import runs
from ddpm.cli import main
from ddpm.config import DataConfig
from ddpm.data import load_dataset
from ddpm.evaluation import bound, flow
from ddpm.files import sha256
from ddpm.images import read_image, save_png
from ddpm.rundir import read_jsonl

FEW, FLOW = "vlb:timesteps=6", "ode:steps=1"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run that may be written to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def columns(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def test_the_record_says_how_it_was_made(run, capsys):
    assert main(["evaluate", str(run), "--likelihood", "--num-images=20", f"--estimator={FEW}", "--seed=3"]) == 0
    (record,) = read_jsonl(run / "evaluations.jsonl")
    held_out = load_dataset(DataConfig(dataset="digits", split="test"))
    assert record["reference"] == {
        "name": "digits", "split": "test", "n": len(held_out), "fingerprint": held_out.fingerprint
    }  # fmt: skip
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert record["recipe"] == {
        "weights_sha256": sha256(newest / "ema-0.9.safetensors"), "weights": "ema-0.9", "step": 6, "thresholding": "clip",
        "labels": "own", "chunk": 16, "precision": "float32", "device": "cpu",
    }  # fmt: skip
    assert (record["num_images"], record["seed"], record["quantisation"]) == (20, 3, "uint8")
    assert (record["by"], record["ddpm"]) == ("ddpm evaluate", ddpm.__version__)
    assert record["extractor"] == {"extractor": "vlb:timesteps=6,steps=none"}
    assert {"reverse_steps": 1000, "evaluations": 6, "dequantisation": "none"}.items() <= record["settings"].items()
    said = capsys.readouterr().out
    assert "20 images of digits test, by vlb:timesteps=6" in said and "likelihood by vlb: 20/20 images" in said
    assert main(["metrics", str(run), "--out", str(run / "metrics")]) == 0
    assert "20 images against digits" in (said := capsys.readouterr().out) and "bpd_vlb_decoder" in said


def test_terms_sum_to_the_total(run):
    (result,) = runs.likelihood(run, estimators=[FEW], num_images=20, quiet=True)
    total = result.values["bpd_vlb"]
    parts = [result.values[f"bpd_vlb_{part}"].value for part in ("prior", "steps", "decoder")]
    assert sum(parts) == pytest.approx(total.value, rel=1e-12) and total.low < total.value < total.high
    (folder,) = (run / "evaluations").iterdir()
    terms, decoding = columns(folder / "terms.csv"), columns(folder / "progressive.csv")
    assert terms["bits"].sum() == pytest.approx(total.value, rel=1e-8)
    assert terms["steps"].sum() == 1 + 1000 and terms["bits"][0] == pytest.approx(parts[0], rel=1e-8)
    assert np.allclose(decoding["rate"] + decoding["rest"], total.value, rtol=1e-8)
    assert (np.diff(decoding["rate"]) > 0).all() and (np.diff(decoding["reverse_step"]) > 0).all()
    assert decoding["distortion"][-1] == pytest.approx(result.record["settings"]["distortion_rmse"], rel=1e-8)
    assert {read_image(folder / f"{name}.png").shape[0] for name in ("terms", "progressive")} == {3}
    assert result.picture == folder / "terms.png"


def test_the_flow_says_what_its_own_noise_adds(run):
    (result,) = runs.likelihood(run, estimators=["ode:steps=2,repeats=3"], num_images=6, quiet=True)
    values, settings = result.values, result.record["settings"]
    assert sum(values[f"bpd_ode_{part}"].value for part in ("latent", "volume", "bin")) == pytest.approx(
        values["bpd_ode"].value
    )
    assert values["bpd_ode_bin"].value == pytest.approx(np.log2(127.5))
    assert settings["evaluations"] == 24 and settings["dequantisation"] == "uniform"
    assert 0 < settings["standard_error_of_repeats"] < 1
    assert result.record["recipe"]["thresholding"] == "none" and result.picture is None


def test_two_processes_give_the_same_numbers(run, zygote, tmp_path):
    words = [
        "evaluate",
        run,
        "--likelihood",
        "--num-images=7",
        "--chunk=4",
        f"--estimator={FEW}",
        "--estimator=ode:steps=1",
    ]
    for count in (1, 2):
        out = f"--out={tmp_path / str(count)}"
        assert zygote.run(*words, out, "--device=cpu", cwd=tmp_path, processes=count).code == 0
    one, two = (read_jsonl(tmp_path / str(count) / "evaluations.jsonl") for count in (1, 2))
    assert [line["values"] for line in one] == [line["values"] for line in two] and len(one) == 2


def test_it_goes_on_where_it_was_stopped_and_grows(run, monkeypatch):
    """Nothing is measured twice; more images leave the numbers of the first ones as they are."""
    how = {"estimators": [FLOW], "chunk": 4, "quiet": True}
    (whole,) = runs.likelihood(run, num_images=10, out=run / "elsewhere", **how)
    done, measure = [], flow.ProbabilityFlow.measure

    def counted(self, predictor, x0, condition, stream, thresholding):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(tuple(stream.ids.tolist()))
        return measure(self, predictor, x0, condition, stream, thresholding)

    monkeypatch.setattr(flow.ProbabilityFlow, "measure", counted)
    stop = 1
    with pytest.raises(KeyboardInterrupt):
        runs.likelihood(run, num_images=10, **how)
    assert not (run / "evaluations.jsonl").exists()
    stop = 3
    (again,) = runs.likelihood(run, num_images=10, **how)
    assert again.record["values"] == whole.record["values"]
    (fewer,) = runs.likelihood(run, num_images=5, **how)
    (folder,) = (run / "evaluations").iterdir()
    assert fewer.values["bpd_ode"].value == np.load(folder / "bits.npy")[:5].sum(axis=1).mean()
    stop = 4
    runs.likelihood(run, num_images=15, **how)
    assert len(set(done)) == len(done) == 4


def test_chunks_change_rounding_alone(run):
    results = [runs.likelihood(run, estimators=[FEW, FLOW], num_images=10, chunk=chunk, quiet=True) for chunk in (3, 7)]
    for few, many in zip(*results, strict=True):
        for name, value in few.values.items():
            assert value.value == pytest.approx(many.values[name].value, rel=1e-5, abs=1e-9)


def test_images_of_other_places_and_splits(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_dataset(DataConfig(dataset="digits", split="train"))
    for k in range(8):
        save_png(tmp_path / f"some/{k}.png", data.images[k])
    np.savez(tmp_path / "some.npz", arr_0=data.images[:8].transpose(0, 2, 3, 1), arr_1=data.labels[:8])
    np.savez(tmp_path / "none.npz", arr_0=data.images[:8].transpose(0, 2, 3, 1))
    found = {}
    for name in ("some", "some.npz", "none.npz"):
        (result,) = runs.likelihood(run, estimators=[FLOW], reference=name, quiet=True)
        assert result.record["num_images"] == 8
        found[name] = result.values["bpd_ode"].value
    assert found["some"] == found["none.npz"] != found["some.npz"]  # the last has classes, which the model is told
    (train,) = runs.likelihood(run, estimators=[FLOW], split="train", num_images=4, quiet=True)
    assert train.record["reference"]["split"] == "train" and train.record["reference"]["n"] == len(data)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["run", "--estimator", "vlv"], 2, "did you mean 'vlb'"),
        (["run", "--estimator", "ode:step=5"], 2, "did you mean 'steps'"),
        (["run", "--metrics", "fd"], 2, "--metrics is not used by --likelihood"),
        (["run", "--sampler", "ddim"], 2, "--sampler is not used by --likelihood"),
        (["run", "--no-quantise"], 2, "--no-quantise is not used by --likelihood"),
        (["run", "--num-images", "9999"], 3, "digits holds 355 images"),
        (["run", "--chunk", "0"], 2, "--chunk='0'"),
        (["run", "--split", "test", "--reference", "digits"], 2, "--split and --reference exclude each other"),
        (["run", "--reference", "big"], 3, "its images are 1x9x9, those of the model 1x8x8"),
        (["run", "--reference", "mu.npz"], 3, "is statistics, and likelihood needs images"),
        (["big"], 4, "holds no checkpoint"),
        (["run", "--out", "big/0.png/x"], 3, "big/0.png"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_measured(run, tmp_path, monkeypatch, capsys, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    save_png(tmp_path / "big/0.png", np.zeros((1, 9, 9), np.uint8))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(4), sigma=np.eye(4))
    monkeypatch.setattr(bound.VariationalBound, "measure", lambda *given: pytest.fail("an image was measured"))
    assert main(["evaluate", *words, "--likelihood"]) == code
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (run / "evaluations.jsonl").exists()


def test_flags_of_likelihood_need_it(run, capsys):
    for words in (["--estimator", "vlb"], ["--split", "test"]):
        assert main(["evaluate", str(run), *words]) == 2
        assert f"{words[0]} is for --likelihood" in capsys.readouterr().err


def test_a_run_on_all_images_has_none_held_out(tiny, tmp_path):
    runs.train(tiny({"data.split": "all", "train.steps": 1}), tmp_path / "all")
    with pytest.raises(ddpm.ConfigError, match="give --split train"):
        runs.likelihood(tmp_path / "all", quiet=True)
