"""The door: help, mistakes, exit codes; all of it quick and in one sentence."""

import importlib
import keyword
import pkgutil
import subprocess
import sys
from collections.abc import Callable

import pytest

import ddpm
from ddpm import cli, errors
from ddpm.cli import VERBS, main

Run = Callable[..., subprocess.CompletedProcess[str]]
HELPERS = {"flags"}


def module_of(verb: str) -> str:
    return f"{verb}_" if keyword.iskeyword(verb) else verb


@pytest.fixture
def verb_raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `ddpm info` raise."""

    def arrange(error: BaseException) -> None:
        def run(argv: list[str]) -> int:
            raise error

        monkeypatch.setattr(importlib.import_module("ddpm.cli.info"), "run", run)

    return arrange


def test_the_table_and_the_modules_agree():
    modules = {module.name for module in pkgutil.iter_modules(cli.__path__)} - HELPERS
    assert {module_of(verb) for verb in VERBS} == modules


def test_help_lists_every_verb(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {verb} " in out and line in out for verb, line in VERBS.items())
        assert max(map(len, out.splitlines())) <= 90


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_every_verbs_help_teaches_and_fits(capsys, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: ddpm {verb}")
    assert f"\n  ddpm {verb}" in out.split("examples:")[1]
    assert max(map(len, out.splitlines())) <= min(columns, 100)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{ddpm.__version__}\n"


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trian", "did you mean 'train'?"),
        ("--hlep", "choose from"),
        ("quux", "choose from demo, train"),
        ("", "choose from"),
    ],
)
def test_unknown_verbs_are_one_sentence(capsys, word, answer):
    assert main([word, "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ddpm: {word!r} is not a verb; ")
    assert answer in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "light"),
    [
        ("import ddpm.cli; assert ddpm.cli.main(['--help']) == 0", ("torch", "pydantic", "rich", "numpy", "argparse")),
        ("import ddpm.cli; assert ddpm.cli.main(['trian']) == 2", ("torch", "pydantic", "rich", "numpy", "argparse")),
        ("import ddpm.cli; assert ddpm.cli.main(['train', '--help']) == 0", ("torch", "rich", "numpy", "matplotlib")),
        ("import ddpm.cli; assert ddpm.cli.main(['train', 'digits', '--lr', 'x']) == 2", ("torch", "rich", "numpy")),
        ("import ddpm.cli; assert ddpm.cli.main(['sample', '--help']) == 0", ("torch", "rich", "numpy")),
    ],
)
def test_help_and_mistakes_load_nothing_heavy(code, light):
    check = f"import sys; {code}; print(sorted(set({light!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "error",
    [errors.ConfigError("a."), errors.MissingDependencyError("b."), errors.DataError("c."), errors.CheckpointError("d."), errors.DivergedError("e.")],
)  # fmt: skip
def test_errors_become_a_sentence_and_their_code(capsys, verb_raising, error):
    verb_raising(error)
    assert main(["info", "x"]) == error.exit_code
    assert capsys.readouterr() == ("", f"ddpm info: {error}\n")


def test_a_message_stays_one_line_of_bounded_length(capsys, verb_raising):
    verb_raising(errors.DataError("two\nlines " + "x" * 5000))
    assert main(["info"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("ddpm info: two lines xxx")
    assert err.count("\n") == 1
    assert len(err) < 1100


def test_a_bug_asks_for_debug(capsys, verb_raising):
    verb_raising(ZeroDivisionError("division by zero"))
    assert main(["info"]) == 1
    expected = "ddpm info: internal error ZeroDivisionError: division by zero (a bug): run again with --debug for the traceback\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [ZeroDivisionError("z"), errors.DataError("c.")])
def test_debug_shows_the_traceback_of_any_error(capsys, verb_raising, error):
    verb_raising(error)
    assert main(["info", "--debug"]) == getattr(error, "exit_code", 1)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_debug_may_come_before_the_verb(capsys, verb_raising):
    verb_raising(errors.DataError("c."))
    assert main(["--debug", "info", "x"]) == 3
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.endswith("ddpm info: c.\n")


def test_a_rank_without_a_group_is_no_process(capsys, verb_raising, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    verb_raising(errors.DataError("c."))
    main(["info"])
    assert capsys.readouterr().err == "ddpm info: c.\n"


def test_an_interrupt_is_75_and_a_short_line(capsys, verb_raising):
    verb_raising(KeyboardInterrupt())
    assert main(["info"]) == errors.EXIT_STOPPED == 75
    assert capsys.readouterr().err == "ddpm info: stopped.\n"


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (4, 4), ("text", 1)])
def test_sys_exit_is_an_exit_code(verb_raising, code, expected):
    verb_raising(SystemExit(code))
    assert main(["info"]) == expected


def test_a_broken_pipe_is_quiet(capsys, verb_raising):
    verb_raising(BrokenPipeError())
    assert main(["info"]) == 141
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_goes_away_is_quiet():
    command = [
        sys.executable,
        "-c",
        "import time, sys; from ddpm.cli import main; time.sleep(0.5); sys.exit(main(['--help']))",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_crash(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    assert main(["trian"]) == 2
    assert main(["--help"]) == 0


def test_python_m_ddpm_is_the_command(run_ddpm: Run):
    done = run_ddpm("train", "digits", "--train.lr", "abc")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ddpm train: --train.lr='abc' is wrong: ")
    assert done.stderr.count("\n") == 1
