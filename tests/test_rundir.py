"""The files of a run: names, what may be overwritten, lines that a crash tore."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import rundir
from ddpm.config import RunConfig, TrainConfig
from ddpm.errors import ConfigError, DataError
from ddpm.rundir import RunDir, append_jsonl, read_json, read_jsonl, truncate_jsonl, valid_name, write_json


def test_making_one_touches_nothing_and_creating_it_makes_its_folders(tmp_path):
    run = RunDir(tmp_path / "runs/a")
    assert list(tmp_path.iterdir()) == []
    assert run.read_config() is None
    run.create()
    run.create()
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "samples"]


def test_the_config_comes_back(tmp_path):
    run, config = RunDir(tmp_path), RunConfig(seed=3, train=TrainConfig(ema=("0.9", "warmup:decay=0.99")))
    run.write_config(config)
    assert run.read_config() == config
    run.config.write_text("train: {lr: -1}")
    with pytest.raises(ConfigError, match=r"config\.yaml: train\.lr=-1 is wrong"):
        run.read_config()


@pytest.mark.parametrize("name", ["a.txt", "samples/photo.png", "checkpoints/step-00000001/model.safetensors"])
def test_a_folder_with_files_that_is_no_run_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match="holds files but no run"):
        RunDir(tmp_path).create()


def test_a_file_or_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file, not a folder"):
        RunDir(tmp_path / "file").create()
    for place in (tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(DataError, match="cannot be written to"):
            RunDir(place).create()
    with pytest.raises(DataError, match=r"cannot be used \(File name too long\)"):
        RunDir(tmp_path / ("x" * 300)).read_config()


def test_discard_removes_a_folder_in_which_nothing_started_and_no_other(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    with run.lock():
        run.discard()
    assert list(tmp_path.iterdir()) == []
    run.create()
    with run.lock():
        run.write_config(RunConfig())
        run.discard()
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.yaml", "lock", "samples"]


def test_discard_keeps_what_it_did_not_make(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    (run.path / "notes.txt").write_text("mine")
    with run.lock():
        run.discard()
    assert (run.path / "notes.txt").read_text() == "mine"


def test_clean_removes_temporaries_alone(tmp_path):
    run = RunDir(tmp_path)
    run.create()
    for folder in (run.path, run.checkpoints, run.samples):
        (folder / ".a.tmp-1-ab.json").write_text("half")
        (folder / ".b.tmp-1-ab").mkdir()
        (folder / "kept.json").write_text("{}")
    run.clean()
    assert {p.name for p in tmp_path.rglob("*")} == {"checkpoints", "samples", "kept.json"}


def test_the_lock_names_its_holder(tmp_path):
    run = RunDir(tmp_path)
    held = pytest.raises(DataError, match=rf"lock is held by process {os.getpid()} on .+ since 20")
    with run.lock(), held, run.lock():
        pass
    with run.lock():
        pass


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "-x", "_", "x" * 100, "a..b"])
def test_names(name):
    assert valid_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "../a", "a b", "x" * 101, "a\n", "a\0", "é", "a\\b"])
def test_names_that_are_refused(name):
    assert not valid_name(name)


RECORDS = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=3), max_size=6)


@given(RECORDS, st.integers(0, 400))
def test_whole_lines_survive_a_torn_last_one(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    data = path.read_bytes() if records else b""
    path.write_bytes(data[: max(0, len(data) - cut)])
    left = read_jsonl(path)
    assert left == records[: len(left)]
    assert len(left) >= data[: max(0, len(data) - cut)].count(b"\n")
    append_jsonl(path, {"step": 7})
    assert read_jsonl(path)[-1] == {"step": 7}
    assert read_jsonl(path)[:-1] == left


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n[1]\n5\n\xff\xfe\n\n{"b": 2}\n{"c": ')
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"b": 2}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_no_line_has_a_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_jsonl(tmp_path / "x.jsonl", {"loss": math.nan})
    assert read_jsonl(tmp_path / "x.jsonl") == []


def test_truncating_drops_later_steps_and_torn_lines_and_keeps_the_rest_as_it_was(tmp_path):
    path = tmp_path / "x.jsonl"
    for step in range(1, 6):
        append_jsonl(path, {"step": step, "loss": 0.1 * step})
    kept = path.read_text().splitlines(keepends=True)[:3]
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    truncate_jsonl(path, 3)
    assert path.read_text() == "".join(kept)
    truncate_jsonl(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_events_have_a_time_and_a_kind(tmp_path):
    run = RunDir(tmp_path)
    run.event("saved", step=3)
    (event,) = read_jsonl(run.events)
    assert (event["event"], event["step"], event["time"][:2], event["time"][-6:]) == ("saved", 3, "20", "+00:00")


def test_left_out_images_are_a_table(tmp_path):
    run = RunDir(tmp_path)
    run.write_skipped([("a,b.png", 'says "no"'), ("c.png", "torn")])
    assert run.skipped.read_text() == 'path,reason\n"a,b.png","says ""no"""\nc.png,torn\n'


def test_the_environment_tells_versions_and_nothing_of_the_variables(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-value")
    facts = rundir.environment({"device": "cpu"})
    assert facts["command"] == sys.argv
    assert facts["pid"] == os.getpid()
    assert facts["device"] == "cpu"
    assert facts["versions"]["numpy"]
    assert "s3cr3t" not in json.dumps(facts)


def test_json_files(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2]})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2]}
    (tmp_path / "x.json").write_text("{")
    assert read_json(tmp_path / "x.json") is read_json(tmp_path / "none.json") is None
