"""`ddpm train`: words to config, options and a folder that stays under runs/."""

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm import config, distributed, presets
from ddpm.cli import main, train
from ddpm.cli.train import TrainOptions, parse_train
from ddpm.errors import ConfigError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[config.RunConfig, TrainOptions]]:
    """Nothing is trained; what would have been."""
    seen: list[tuple[config.RunConfig, TrainOptions]] = []
    monkeypatch.setattr(train, "start", lambda *given: seen.append(given) or 0)
    return seen


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_a_preset_alone_is_its_config_in_its_folder(name):
    settings, options = parse_train([name])
    assert settings == config.build(presets.preset(name))
    assert options == TrainOptions(run_dir=Path("runs") / name)


@pytest.mark.parametrize("command", [command for command, _ in train.EXAMPLES])
def test_the_examples_parse(command, in_an_empty_folder):
    (in_an_empty_folder / "runs" / "digits").mkdir(parents=True)
    (in_an_empty_folder / "runs" / "digits" / "config.yaml").write_text(config.to_yaml(config.RunConfig()))
    parse_train(shlex.split(command)[2:])


def test_flags_over_file_over_preset_over_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {lr: 0.5, warmup: 7}\nseed: 3")
    settings, options = parse_train(["digits", "--config", "mine.yaml", "--lr", "0.25"])
    assert (settings.train.lr, settings.train.warmup, settings.seed) == (0.25, 7, 3)
    assert settings.data == config.build(presets.preset("digits")).data
    assert options.run_dir == Path("runs/digits")
    assert parse_train(["--config", "mine.yaml"])[1].run_dir == Path("runs/mine")


def test_averages_leave_the_preset_its_word():
    settings, options = parse_train(["--train.ema", "0.999", "--train.ema", "warmup:decay=0.9999", "digits"])
    assert settings.train.ema == ("0.999", "warmup:decay=0.9999")
    assert options.run_dir == Path("runs/digits")


def test_options():
    words = (
        "--lr 1e-3 digits --name a.b-c_1 --resume must --stop-after 1h30m --processes 2 --restarts 3 --dry-run --debug"
    )
    assert parse_train(shlex.split(words))[1] == TrainOptions(
        run_dir=Path("runs/a.b-c_1"), resume="must", stop_after_s=5400, processes=2, restarts=3, dry_run=True
    )
    assert parse_train(["digits", "--run-dir", "/elsewhere/x y"])[1].run_dir == Path("/elsewhere/x y")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a preset or --config FILE; presets: "),
        (["digitz"], "preset 'digitz' is not known (did you mean 'digits'?)"),
        (["."], "'.' is a folder, not a preset; to train on the images in it: ddpm train folder --data.path ."),
        (["9" * 5000], "is not known"),
        (["shapes"], "'shapes' is a data set, not a preset; to train on it: ddpm train digits --data.dataset shapes."),
        (["shapes:size=16"], "ddpm train digits --data.dataset shapes:size=16."),
        (["npz"], "to train on it: ddpm train folder --data.path FILE.npz --data.dataset npz."),
        (["x.yaml"], "'x.yaml' is not a preset; to start from a file: ddpm train --config x.yaml"),
        (["digits", "--name", "x", "--run-dir", "y"], "--run-dir and --name exclude each other."),
        (["digits", "--run-dir", " "], "--run-dir: ' ' is not a folder's name."),
        (["digits", "--stop-after", "soon"], "--stop-after 'soon' is not a duration"),
        (["digits", "--processes", "0"], "--processes: '0' is wrong: write a whole number from 1 to 4096."),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read (No such file or directory)."),
        (["--config", "."], "--config .: cannot be read (Is a directory)."),
        (["digits", "more"], "'more' is not expected here; see --help."),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_train(words)
    assert message in str(caught.value)


ESCAPES = [
    "../x",
    "../../x",
    "/x",
    "a/b",
    "..",
    ".",
    ".hidden",
    "a\\b",
    "",
    " ",
    "a b",
    "x" * 101,
    "a\0b",
    "a\n",
    "naïve",
    "~",
    "$HOME",
    "-x=../y",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_leave_runs_are_refused(name):
    with pytest.raises(ConfigError, match="cannot name a run"):
        parse_train(["digits", f"--name={name}"])


@settings(deadline=None)
@given(st.text(max_size=120))
def test_every_accepted_name_is_a_folder_right_inside_runs(name):
    try:
        folder = Path("runs") / train.run_name(name)
    except ConfigError:
        return
    assert folder.resolve().parent == Path("runs").resolve()


def test_a_config_whose_file_cannot_name_a_run_asks_for_a_name(tmp_path):
    (tmp_path / "my run.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match="--name"):
        parse_train(["--config", "my run.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stepz: 5}", "--config bad.yaml: train.stepz is not known (did you mean 'steps'?)."),
        ("trian: {steps: 5}", "--config bad.yaml: trian is not known (did you mean 'train'?)."),
        ("train: {lr: .nan}", "--config bad.yaml: train.lr=nan is wrong: input should be a finite number."),
        ("train: 5", "--config bad.yaml: train=5 is wrong: "),
        ("[1, 2]", "--config bad.yaml: expected groups such as 'train:' with fields, found list."),
        ("a: !!python/object/apply:os.getcwd []", "--config bad.yaml: is not plain YAML"),
        ("a: [", "--config bad.yaml: is not plain YAML"),
    ],
)
def test_bad_files_are_blamed_by_name(capsys, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["train", "--config", "bad.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"ddpm train: {message}" in err
    assert err.count("\n") == 1


NAMES = st.sampled_from(
    ["seed", *config.RunConfig.model_fields, *(name.split(".")[-1] for name in config.fields()), "stepz"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.integers(10**300, 10**301) | st.dates() | st.binary(max_size=4)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | SCALARS, inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=VALUES | st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=3), max_size=3))
def test_any_config_file_starts_or_is_one_sentence(capsys, started, tmp_path, values):
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    code = main(["train", "--config", "any.yaml"])
    check_outcome(code, started, *capsys.readouterr())


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60))
def test_any_bytes_as_a_config_file_are_one_sentence(capsys, started, tmp_path, raw):
    (tmp_path / "any.yaml").write_bytes(raw)
    code = main(["train", "--config", "any.yaml"])
    check_outcome(code, started, *capsys.readouterr())


FLAGS = st.sampled_from(
    [f"--{name}" for name in config.fields()]
    + ["--name", "--run-dir", "--config", "--resume", "--stop-after", "--processes", "--restarts", "--dry-run", "--steps", "--lr", "--no-data.flip", "--bogus"]
)  # fmt: skip
WORDS = st.text(max_size=10) | st.sampled_from(
    ["1", "0", "-1", "1e999", "nan", "true", "none", "1,2", "32x32", "9" * 5000, "\0", "..", "digits"]
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(FLAGS | WORDS | st.tuples(FLAGS, WORDS).map("=".join), max_size=5), preset=st.booleans())
def test_any_command_line_starts_or_is_one_sentence(capsys, monkeypatch, started, words, preset):
    monkeypatch.setattr(train, "_launch", lambda *given: started.append(given) or 0)
    if {"-h", "--help", "--debug"} & set(words):
        return
    code = main(["train", *["digits"] * preset, *words])
    check_outcome(code, started, *capsys.readouterr())


def check_outcome(code: int, started: list[object], out: str, err: str) -> None:
    """Started in silence, or exit 2 with one line on standard error."""
    assert out == ""
    if code == 0:
        assert started.pop() and err == ""
    else:
        assert code == 2, err
        assert err.startswith("ddpm train: ")
        assert err.count("\n") == 1
        assert "internal error" not in err
    assert not started


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[list[str], int]], list[int]]:
    """What would have been launched, and the exit codes to give (0 when there are no more)."""
    calls: list[tuple[list[str], int]] = []
    codes: list[int] = []

    def launch(words: list[str], processes: int) -> int:
        calls.append((list(words), processes))
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(distributed, "launch_processes", launch)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    return calls, codes


def test_processes_run_the_same_words_without_the_flag(launched):
    assert main(["train", "digits", "--processes", "2", "--lr", "1", "--debug"]) == 0
    assert launched[0] == [(["train", "digits", "--lr", "1", "--debug"], 2)]


def test_mistakes_are_told_before_anything_is_launched(launched, capsys):
    assert main(["train", "digits", "--processes", "2", "--lr", "x"]) == 2
    assert launched[0] == []
    assert capsys.readouterr().err.count("\n") == 1


def test_a_process_of_a_group_launches_nothing(launched, started, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "DDPM_RENDEZVOUS": "file:///x"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "digits", "--restarts", "2"]) == 0
    assert launched[0] == []
    assert len(started) == 1


def test_a_rank_without_a_group_is_nothing(launched, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "digits", "--processes", "2"]) == 0
    assert launched[0] == [(["train", "digits"], 2)]


@pytest.mark.parametrize("flag", ["--processes=2", "--restarts=1"])
def test_torchrun_starts_processes_itself(launched, started, monkeypatch, capsys, flag):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "digits", flag]) == 2
    assert f"{flag} cannot be had in a group that is there already (WORLD_SIZE=2)" in capsys.readouterr().err
    assert launched[0] == started == []


@pytest.mark.parametrize(
    ("codes", "starts", "end"),
    [
        ([137, 1, 0], 3, 0),
        ([137, 139, 1, 1], 3, 1),
        ([75], 1, 75),
        ([5], 1, 5),
        ([2], 1, 2),
        ([143], 1, 143),
        ([130], 1, 130),
    ],
)
def test_restarts_are_for_deaths_and_bugs_alone(launched, codes, starts, end):
    launched[1].extend(codes)
    assert main(["train", "digits", "--restarts", "2"]) == end
    assert [processes for _, processes in launched[0]] == [1] * starts


def test_a_restart_goes_on_from_the_checkpoint(launched, tmp_path):
    launched[1].extend([137, 0])
    (tmp_path / "runs/digits/checkpoints/step-00000010").mkdir(parents=True)
    assert main(["train", "digits", "--restarts=1", "--resume", "never"]) == 0
    assert [words for words, _ in launched[0]] == [
        ["train", "digits", "--resume", "never"],
        ["train", "digits", "--resume=auto"],
    ]
    assert '"restarted"' in (tmp_path / "runs/digits/events.jsonl").read_text()


@pytest.mark.parametrize(("stopped", "code"), [(False, 0), (True, 75)])
def test_start_hands_over_and_tells_whether_it_was_stopped(monkeypatch, stopped, code):
    import types

    import ddpm

    calls = []
    result = types.SimpleNamespace(stopped=stopped)
    fake = types.SimpleNamespace(train=lambda *given, **options: calls.append((given, options)) or result)
    monkeypatch.setitem(sys.modules, "ddpm.runs", fake)
    monkeypatch.setattr(ddpm, "runs", fake, raising=False)
    assert main(["train", "digits", "--resume", "must", "--stop-after", "90", "--dry-run"]) == code
    settings = config.build(presets.preset("digits"))
    assert calls == [
        ((settings, Path("runs/digits")), {"resume": "must", "init": None, "stop_after_s": 90.0, "dry_run": True})
    ]
