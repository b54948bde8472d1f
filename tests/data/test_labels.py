"""Label files in all their forms."""

import json
from pathlib import Path

import pytest

from ddpm.data.labels import read_labels
from ddpm.errors import DataError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "a.png,dog\nsub/b.png,cat\n"),
        ("a.csv", "path,label\r\na.png,dog\r\n\r\n./sub/b.png , cat\r\n"),
        ("a.txt", '\ufeffFilename,class\n"a.png",dog\nsub/b.png,"cat"'),
        ("a.json", json.dumps({"a.png": "dog", "sub/b.png": "cat"})),
        ("a.json", json.dumps({"labels": [["a.png", "dog"], ["sub/b.png", "cat"]]})),
        ("a.json", json.dumps([["a.png", "dog"], ["sub/b.png", "cat"]])),
    ],
)
def test_forms(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / name) == ({"a.png": 1, "sub/b.png": 0}, ("cat", "dog"))


def test_whole_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,10\nb,9\nc,2\n")
    assert read_labels(tmp_path / "a.csv") == ({"a": 2, "b": 1, "c": 0}, ("2", "9", "10"))
    (tmp_path / "a.json").write_text('{"a": 10, "b": 9, "c": 2}')
    assert read_labels(tmp_path / "a.json")[1] == ("2", "9", "10")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"a.png,dog\nb.png\n", "line 2"),
        ("a.csv", b"a.png,dog,brown\n", "line 1"),
        ("a.csv", b"a.png,\n", "line 1"),
        ("a.csv", b"path,label\n", "holds no label"),
        ("a.csv", b"", "holds no label"),
        ("a.csv", b"\xff\xfe\x00a", "UTF-8"),
        ("a.csv", b"a.png,dog\na.png,cat\n", "two labels"),
        ("a.json", b"{", "JSON"),
        ("a.json", b'"text"', "'text'"),
        ("a.json", b'{"a.png": null}', "None"),
        ("a.json", b'{"a.png": {"label": 1}}', "a.png"),
        ("a.json", b"[[1, 2]]", "[1, 2]"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_labels(tmp_path / name)
    message = str(error.value)
    assert words in message
    assert f"--data.labels {tmp_path / name}" in message
    assert message.endswith(".")
    assert "\n" not in message


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_labels(tmp_path / "absent.csv")
