"""A folder of image files: scanned here, labelled by subfolders or by a label file, decoded once by `prepare`."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ddpm.config import DataConfig
from ddpm.data.base import Dataset, ImageSet, Skipped
from ddpm.data.decode import SUFFIXES
from ddpm.data.labels import read_labels
from ddpm.data.prepare import Source, prepare_images
from ddpm.errors import ConfigError, DataError
from ddpm.files import Progress
from ddpm.registry import register

_SPLITS = ("train", "test")


@register("folder")
class Folder(Dataset):
    """Any tree of images. Hidden files, and files that are no images by their name, are not looked at.

    Where all images lie in subfolders, the first level of subfolders names their classes; --data.labels overrides that.
    Where the folder holds train/ and nothing beside it but test/, these are the splits; otherwise everything is the
    split 'train'.
    """

    def load(self, config: DataConfig) -> ImageSet:
        return self.prepare(config)

    def prepare(self, config: DataConfig, progress: Progress | None = None) -> ImageSet:
        if config.path is None:
            raise ConfigError("the data set 'folder' needs --data.path DIR.")
        root = config.path.expanduser()
        if not root.is_dir():
            raise DataError(f"--data.path {root}: is not a folder; give the folder that holds the images.")
        source = _labelled(root, config) if config.labels is not None else _by_subfolder(root, config.split)
        return prepare_images(source, config, progress)


def _by_subfolder(root: Path, split: str) -> Source:
    """Labels from the first level of subfolders, if no image lies outside them."""
    bases = _bases(root, split)
    found = [(path, path.relative_to(base).parts) for base in bases for path in _images(base)]
    _demand_images(root, len(found))
    in_root = sum(len(parts) == 1 for _, parts in found)
    paths = tuple(path.relative_to(root).as_posix() for path, _ in found)
    if in_root:
        note = "Images lie in the folder itself as well as in subfolders, so they have no classes."
        return Source(root, paths, notes=(note,) if in_root < len(found) else ())
    per_folder = Counter((path.relative_to(root).parts[: -len(parts)], parts[0]) for path, parts in found)
    for base in bases:
        for name in _subfolders(base):
            if not per_folder[base.relative_to(root).parts, name]:
                raise DataError(
                    f"--data.path {root}: the class folder {base / name} holds no image; remove it, or put its images there."
                )
    classes = tuple(sorted({name for base in _bases(root, "all") for name in _subfolders(base)}))
    return Source(root, paths, tuple(classes.index(parts[0]) for _, parts in found), classes)


def _labelled(root: Path, config: DataConfig) -> Source:
    """Labels from a label file; images that it does not name are left out."""
    assert config.labels is not None
    found = [path.relative_to(root).as_posix() for base in _bases(root, config.split) for path in _images(base)]
    _demand_images(root, len(found))
    labels, classes = read_labels(config.labels.expanduser())
    paths = tuple(path for path in found if path in labels)
    if not paths:
        example = f"{next(iter(labels))!r} in the label file, {found[0]!r} in the folder"
        raise DataError(
            f"--data.labels {config.labels}: names no image of {root} ({example}); paths are relative to --data.path."
        )
    skipped = tuple(Skipped.of(path, "has no label in the label file") for path in found if path not in labels)
    missing = [path for path in labels if not (root / path).is_file()]
    notes = (f"The label file names {len(missing)} images that do not exist, such as {missing[0]}.",) if missing else ()
    return Source(root, paths, tuple(labels[path] for path in paths), classes, skipped, notes)


def _demand_images(root: Path, count: int) -> None:
    if not count:
        raise DataError(
            f"--data.path {root}: holds no image; files that end in {', '.join(sorted(SUFFIXES))} are read."
        )


def _bases(root: Path, split: str) -> list[Path]:
    """The folders that make up a split."""
    inside = set(_subfolders(root))
    if "train" in inside and inside <= set(_SPLITS):
        bases = [root / name for name in _SPLITS if name in inside and split in (name, "all")]
    else:
        bases = [] if split == "test" else [root]
    if not bases:
        raise DataError(f"--data.split {split}: {root} holds no folders train/ and test/; use --data.split all.")
    return bases


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))


def _images(base: Path) -> Iterator[Path]:
    """Image files under a folder, sorted; links to folders are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    for folder, inside, names in os.walk(base, onerror=_unreadable, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = sorted(name for name in inside if not _hidden(name))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not _hidden(name):
                yield Path(folder, name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}.")
