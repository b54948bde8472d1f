"""Files that are whole or absent: atomic writes, locks, checksums, downloads, archives read without unpacking.

Every failure of the file system or the network is a DataError of one sentence.
"""

import errno
import fcntl
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import socket
import stat
import sys
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Self, cast

from ddpm.errors import DataError

Progress = Callable[[int, int], None]
"""Told (done, total) now and then by work that takes long."""

_BLOCK = 1 << 20
_HINTS = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some of your quota or choose another place",
    errno.EFBIG: "files may not grow so large here; raise the limit (ulimit -f) or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may write to, or change its permissions",
    errno.EPERM: "choose a place that you may write to, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile.

    Yields a temporary path beside `path` for the body to write; at the end it is synced and renamed over `path`.
    If the body raises, the temporary is removed and `path` stays as it was. Raises DataError for every OSError.
    """
    path = Path(path)
    temporary = _temporary(path)
    with _disk_errors("write", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Like `atomic_path`, for a folder: yields an empty folder to fill; an existing folder at `path` is replaced."""
    path = Path(path)
    temporary = _temporary(path)
    with _disk_errors("write", path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for inside in [*temporary.rglob("*"), temporary]:
                _sync(inside)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path | str) -> None:
    """Remove the temporaries that killed processes left in a folder; only for who holds the folder's lock."""
    with _disk_errors("clean", folder):
        for left in Path(folder).glob(".*.tmp-*"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file atomically; raises DataError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 file atomically; raises DataError."""
    write_bytes(path, text.encode())


def append_line(path: Path | str, text: str) -> None:
    """Append one line to a file that several processes may append to; the line is there whole or not at all.

    A last line that a crash tore is ended first, so that it spoils no other line. Raises DataError.
    """
    assert "\n" not in text, "a line has no line break inside"
    with _disk_errors("write", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
            try:
                _write_all(file, b"\n" * torn + text.encode() + b"\n")
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise


def sync(path: Path | str) -> None:
    """Have the system put what was written to a file on disk, if there is such a file; raises DataError."""
    with _disk_errors("sync", path):
        if Path(path).exists():
            _sync(Path(path))


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes; raises DataError."""
    with _disk_errors("read", path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """What an exception of somebody else's says, as a short part of one line."""
    said = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
    return " ".join(str(said).split())[:160] or type(error).__name__


def free_bytes(path: Path | str) -> int:
    """Bytes that may still be written where `path` is or will be; raises DataError."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with _disk_errors("look at", path):
        return shutil.disk_usage(place).free


class Lock:
    """One process at a time: `with Lock(path): ...`.

    The lock is the kernel's (flock), so it ends with its process, however that ends; the file only says who holds it, as
    JSON {pid, host, command, since}. It stays behind, empty, when the lock is released. Children that a process forks
    hold its lock too.

    Args:
        path: the lock file; its folder is made.
        wait: wait for another holder to finish, instead of raising DataError that names it.
    """

    def __init__(self, path: Path | str, wait: bool = False) -> None:
        self.path = Path(path)
        self.wait = wait
        self._descriptor = -1

    def __enter__(self) -> Self:
        with _disk_errors("lock", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
            except BlockingIOError:
                os.close(descriptor)
                raise DataError(
                    f"{self.path} is held by {self._holder()}; wait for it or use another folder."
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        os.ftruncate(self._descriptor, 0)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing would leave it with forked children
        os.close(self._descriptor)

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def download(
    url: str, path: Path | str, digest: str, size: int | None = None, progress: Progress | None = None
) -> None:
    """Fetch a file over HTTP, unless it is there already with the right checksum.

    An interrupted download is kept beside it as `.part` and gone on with by the next call; the file appears only when
    its checksum is right. Several processes may ask for the same file.

    Args:
        digest: SHA-256 of the whole file, hexadecimal.
        size: bytes of the whole file, where known.

    Raises DataError: no connection, an HTTP error, a full disk, a wrong checksum; it says where to put the file by hand.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    by_hand = f"or fetch it by hand and put it at {path} (sha256 {digest})"
    with Lock(path.with_name(f".{path.name}.lock"), wait=True):
        if path.is_file() and sha256(path) == digest:
            return
        if size is not None and free_bytes(path) < size:
            raise DataError(
                f"cannot download {url}: {path.parent} has no room for its {size:,} bytes; free some space."
            )
        try:
            if _fetch(url, part, size, progress) and sha256(part) != digest:
                part.unlink()  # the bytes kept from last time were of another file
                _fetch(url, part, size, progress)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DataError(
                f"cannot download {url} ({reason(error)}); run the command again to go on, {by_hand}."
            ) from None
        found = sha256(part)
        if found != digest:
            part.unlink()
            raise DataError(f"{url} sent a file whose sha256 is {found} instead of {digest}; try again, {by_hand}.")
        with _disk_errors("write", path):
            part.replace(path)


def read_members(archive: Path | str, wanted: Collection[str], max_bytes: int = 1 << 30) -> Iterator[tuple[str, bytes]]:
    """Read files out of a tar, tar.gz or zip archive without unpacking anything to disk.

    Args:
        wanted: full names inside the archive, such as "folder/file.bin".
        max_bytes: most bytes that are unpacked, everything together.

    Yields (name, contents) in the archive's order. Raises DataError: a damaged archive, a wanted name that is missing
    or is a link or a device, more than `max_bytes` or 100,000 members.
    """
    archive, missing = Path(archive), set(wanted)
    if not archive.is_file():
        raise DataError(f"{archive} is not there, or is no file.")
    damaged = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
    try:
        with archive.open("rb") as file:
            read = _zip_members if file.read(4) == b"PK\x03\x04" else _tar_members
            file.seek(0)
            for name, data in read(archive, file, frozenset(wanted), max_bytes):
                if name in missing:
                    missing.remove(name)
                    yield name, data
                if not missing:
                    return
    except damaged as error:
        raise DataError(f"{archive} is damaged ({reason(error)}); delete it and fetch it again.") from None
    raise DataError(f"{archive} holds no {sorted(missing)[0]!r}; is it the right archive?")


def _tar_members(archive: Path, file: IO[bytes], wanted: frozenset[str], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream = _Limited(archive, cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file, max_bytes)
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
        for count, member in enumerate(tar):
            _check_count(archive, count)
            name = member.name.removeprefix("./")
            if name in wanted:
                if not member.isreg():
                    raise DataError(f"{archive}: {name!r} is not an ordinary file; the archive is not to be trusted.")
                yield name, cast(IO[bytes], tar.extractfile(member)).read()


def _zip_members(archive: Path, file: IO[bytes], wanted: frozenset[str], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as packed:
        for count, member in enumerate(packed.infolist()):
            _check_count(archive, count)
            if member.filename in wanted:
                if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16):
                    raise DataError(
                        f"{archive}: {member.filename!r} is not an ordinary file; the archive is not to be trusted."
                    )
                with packed.open(member) as opened:
                    stream = _Limited(archive, opened, max_bytes)
                    data = stream.read()
                max_bytes -= len(data)
                yield member.filename, data


def _check_count(archive: Path, count: int) -> None:
    if count >= 100_000:
        raise DataError(f"{archive} holds more than 100,000 files; it is not an archive that is read here.")


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than so many bytes, before memory is taken for them."""

    def __init__(self, archive: Path, stream: IO[bytes], limit: int) -> None:
        super().__init__()
        self.archive, self.stream, self.limit, self.left = archive, stream, limit, limit

    def read(self, size: int | None = -1) -> bytes:
        want = self.left + 1 if size is None or size < 0 else size
        data = self.stream.read(min(want, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise DataError(f"{self.archive} unpacks to more than {self.limit:,} bytes; it is not read.")
        return data


def _fetch(url: str, part: Path, size: int | None, progress: Progress | None) -> bool:
    """Bring `part` to its full length; True if bytes of an earlier call were kept."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    if not url.startswith(("http://", "https://")):
        raise ValueError("only http and https are fetched")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "ddpm", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with urlopen(Request(url, headers=headers), timeout=30) as response:
            start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            have = have if response.status == 206 and start and int(start[1]) == have else 0
            length = response.headers.get("Content-Length")
            total = size or (have + int(length) if length else 0)
            done = _receive(response, part, have, total, progress)
    except HTTPError as error:
        if error.code == 416:  # nothing follows what is here: the checksum decides
            return True
        raise
    if done < total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
    return have > 0


def _receive(response: IO[bytes], part: Path, have: int, total: int, progress: Progress | None) -> int:
    with _disk_errors("write", part), part.open("ab" if have else "wb") as file:
        done = have
        while block := _read_block(response):
            file.write(block)
            done += len(block)
            if progress is not None:
                progress(done, max(done, total))
            if total and done > total:
                break
        return done


def _read_block(response: IO[bytes]) -> bytes:
    try:
        return response.read(_BLOCK)
    except OSError as error:
        raise http.client.HTTPException(str(error)) from None  # the network's, not the disk's


def _temporary(path: Path) -> Path:
    """A hidden name beside `path` with its suffix, which some writers go by."""
    return path.with_name(f".{path.stem}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}{path.suffix}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _write_all(file: io.FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _this_process() -> dict[str, str | int]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv), "since": since}


@contextmanager
def _disk_errors(verb: str, path: Path | str) -> Iterator[None]:
    """OSError -> DataError of one sentence."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the path")
        raise DataError(f"cannot {verb} {path}: {error.strerror or error}; {hint}.") from error
