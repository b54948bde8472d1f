"""What images are compared with, and where it is read from: a data set, a folder, an npz file of images or of statistics."""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.config import DataConfig
from ddpm.data import Dataset, ImageSet, load_dataset
from ddpm.data.decode import SUFFIXES, UnreadableImageError, inspect, quiet
from ddpm.data.prepare import Source, prepare_images
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.statistics import ReferenceStatistics, load_npz
from ddpm.files import reason, sha256

_NUMBERED = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True, eq=False)
class Reference:
    """Images to compare with, or statistics alone.

    Attributes:
        name: of the data set, or the path.
        dataset: the data set's name, for the choice of an extractor; "" for files.
        split: of the data set.
        images: None where there are only statistics.
        held_out: images like them that the model was not trained on, where the data set has some.
        statistics: of an npz file.
        facts: what a record says of it.
    """

    name: str
    dataset: str
    split: str | None
    images: ImageSet | None
    held_out: ImageSet | None
    statistics: ReferenceStatistics | None
    facts: dict[str, Any]


def find_reference(given: str) -> Reference:
    """The reference that --reference names; raises ConfigError or DataError."""
    path = Path(given).expanduser()
    if given.partition(":")[0] in Dataset.names():
        return of_dataset(DataConfig(dataset=given))
    if path.suffix == ".npz" and path.is_file() and holds_statistics(path):
        return _of_statistics(path)
    if path.suffix == ".npz" or path.is_dir():
        images = read_images(path)
        held_out = _split(DataConfig(dataset="folder", path=path, split="test"), images) if path.is_dir() else None
        return _of_images(images, given, "", None, held_out)
    if "/" in given or path.exists():
        raise DataError(
            f"--reference {given}: is no folder and no .npz file; give a data set, a folder or an .npz file."
        )
    return of_dataset(DataConfig(dataset=given))


def of_dataset(config: DataConfig) -> Reference:
    """A part of a data set, with its other part as what was held out; raises ConfigError or DataError."""
    images = load_dataset(config)
    other = {"train": "test", "test": "train"}.get(config.split)
    held_out = _split(config.model_copy(update={"split": other}), images) if other else None
    return _of_images(images, images.name, config.dataset.partition(":")[0], config.split, held_out)


def read_images(path: Path) -> ImageSet:
    """The images of a folder (what `ddpm sample` wrote is read without its grid) or of an npz file; raises DataError.

    Images of a folder must be of one size, which is kept.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist; give a folder of images, or an .npz file.")
    if path.is_file():
        with _named():
            return replace(load_dataset(DataConfig(dataset="npz", path=path)), name=str(path))
    if (path / "recipe.json").exists() and (
        drawn := sorted(p.name for p in path.iterdir() if _NUMBERED.fullmatch(p.name))
    ):
        found = _drawn(path, drawn)
    else:
        files = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        with _named():
            found = load_dataset(DataConfig(dataset="folder", path=path, size=_one_size(path, files)))
    if found.skipped:
        first = found.skipped[0]
        raise DataError(
            f"{path}: {len(found.skipped)} images cannot be read, such as {first.path} ({first.reason}); mend or remove them."
        )
    return replace(found, name=str(path), notes=())


def holds_statistics(path: Path) -> bool:
    """Whether an npz file is of statistics, not of images; raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return not {"arr_0", "images"} & set(archive.files)
    except Exception as error:  # a damaged archive raises what it likes
        raise DataError(f"{path}: cannot be read as an .npz file of plain arrays ({reason(error)}).") from None


def subset(images: ImageSet, rows: Any) -> ImageSet:
    """Some of the images."""
    labels = None if images.labels is None else images.labels[rows]
    return ImageSet(images.name, images.images[rows], labels, images.classes)


def _of_images(images: ImageSet, name: str, dataset: str, split: str | None, held_out: ImageSet | None) -> Reference:
    facts = {"name": name, "split": split, "n": len(images), "fingerprint": images.fingerprint}
    return Reference(name, dataset, split, images, held_out, None, facts)


def _of_statistics(path: Path) -> Reference:
    statistics = load_npz(path)
    facts = {"name": str(path), "n": statistics.n, "sha256": sha256(path)}
    return Reference(str(path), "", None, None, None, statistics, facts)


def _split(config: DataConfig, like: ImageSet) -> ImageSet | None:
    """Another part of a data set, if it has one of images of the same shape."""
    with suppress(DataError, ConfigError):
        found = load_dataset(config)
        return found if found.shape == like.shape else None
    return None


def _drawn(path: Path, names: list[str]) -> ImageSet:
    """The numbered images of `ddpm sample`, with the classes of images.csv."""
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    with suppress(OSError, KeyError, ValueError):
        rows = {
            row["file"]: row for row in csv.DictReader((path / "images.csv").read_text(encoding="utf-8").splitlines())
        }
        found = {int(row["label"]): row["class"] for row in rows.values()}
        if min(found) >= 0:
            classes = tuple(found.get(label, str(label)) for label in range(max(found) + 1))
            labels = tuple(int(rows[name]["label"]) for name in names)
    source = Source(path, tuple(names), labels, classes if labels is not None else ())
    return prepare_images(source, DataConfig(dataset="folder", size=_one_size(path, [path / name for name in names])))


def _one_size(path: Path, files: list[Path]) -> tuple[int, int] | None:
    """Height and width of all the images; raises DataError for several sizes."""
    seen: dict[tuple[int, int], Path] = {}
    with quiet():
        for file in sorted(files):
            with suppress(UnreadableImageError):
                header = inspect(file)
                seen.setdefault((header.height, header.width), file)
    if len(seen) > 1:
        (first, one), (second, other) = list(seen.items())[:2]
        raise DataError(
            f"{path}: holds images of several sizes ({one.name} is {first[0]}x{first[1]}, {other.name} {second[0]}x{second[1]}); "
            "bring them to one size."
        )
    return next(iter(seen), None)


@contextmanager
def _named() -> Iterator[None]:
    """A data set's own sentence, without the flag that was not typed here."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).removeprefix("--data.path ")) from None
