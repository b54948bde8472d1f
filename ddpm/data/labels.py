"""Label files: which image has which label."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ddpm.errors import DataError
from ddpm.files import reason

_HEADINGS = frozenset({"path", "file", "filename", "file_name", "image", "name"})


def read_labels(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Read CSV lines 'path,label', with or without a header line, or JSON: {path: label} or {"labels": [[path, label]]}.

    Returns {path: index of its class} and the names of the classes: the labels in use, in numerical order if all are
    whole numbers, else alphabetical. Raises DataError: unreadable, a line that is no pair, a path with two labels.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = list(_json_pairs(json.loads(text), path) if path.suffix.lower() == ".json" else _csv_pairs(text, path))
    except OSError as error:
        raise DataError(f"--data.labels {path}: cannot be read ({reason(error)}).") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"--data.labels {path}: is no CSV or JSON text in UTF-8 ({reason(error)}).") from None
    if not pairs:
        raise DataError(f"--data.labels {path}: holds no label; write lines 'path,label'.")
    labels: dict[str, str] = {}
    for image, label in pairs:
        image = str(PurePosixPath(image))
        if labels.setdefault(image, label) != label:
            raise DataError(
                f"--data.labels {path}: {image!r} has two labels, {labels[image]!r} and {label!r}; keep one."
            )
    classes = _ordered(set(labels.values()))
    index = {name: i for i, name in enumerate(classes)}
    return {image: index[label] for image, label in labels.items()}, classes


def _csv_pairs(text: str, path: Path) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and cells[0].lower() in _HEADINGS):
            continue
        if len(cells) != 2 or not all(cells):
            raise DataError(f"--data.labels {path}: line {number} is {','.join(row)!r}; write 'path,label'.")
        yield cells[0], cells[1]


def _json_pairs(values: Any, path: Path) -> Iterator[tuple[str, str]]:
    if isinstance(values, dict) and isinstance(values.get("labels"), list):
        values = values["labels"]
    pairs: Iterable[Any] = (
        values.items() if isinstance(values, dict) else values if isinstance(values, list) else [values]
    )
    for pair in pairs:
        whole = (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], str | int)
        )
        if not whole:
            raise DataError(
                f"--data.labels {path}: found {str(pair)[:80]!r} where a path and its label should be; write {{path: label}}."
            )
        yield pair[0], str(pair[1])


def _ordered(names: set[str]) -> tuple[str, ...]:
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
