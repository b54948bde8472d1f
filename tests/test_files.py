"""Files are whole or absent, locks end with their process, nothing untrusted is unpacked, every failure is a sentence."""

import gzip
import hashlib
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.errors import DataError
from ddpm.files import (
    Lock,
    append_line,
    atomic_folder,
    atomic_path,
    download,
    free_bytes,
    read_members,
    remove_leftovers,
    sha256,
    write_bytes,
    write_text,
)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writes beyond so many bytes fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_sentence(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_atomic_path_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    write_text(target, "old")
    write_text(target, "new é")
    assert target.read_text(encoding="utf-8") == "new é"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_keeps_the_old_file_when_the_body_raises(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_keeps_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.npz") as temporary:
        temporary.write_bytes(b"")
        assert temporary.suffix == ".npz"
        assert temporary.name.startswith(".a.tmp-")


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    with pytest.raises(DataError) as error, file_size_limit(1000):
        write_bytes(target, bytes(5000))
    assert str(target) in one_sentence(error)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("place", ["file/under", "/proc/ddpm-test/a"])
def test_unwritable_places_are_told_in_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (lambda path: write_bytes(path, b"x"), lambda path: append_line(path, "x"), lambda path: enter(path)):
        with pytest.raises(DataError) as error:
            write(tmp_path / place)
        assert place in one_sentence(error)


def enter(path: Path) -> None:
    with Lock(path):
        pass


def test_atomic_folder_appears_whole_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for text in ("old", "new"):
        with atomic_folder(target) as temporary:
            (temporary / "inside").mkdir()
            (temporary / "inside" / "a.txt").write_text(text)
    assert (target / "inside" / "a.txt").read_text() == "new"
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as temporary:
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    killed = "import os, sys; from ddpm.files import *\n"
    killed += "with atomic_path(sys.argv[1] + '/a.txt') as t, atomic_folder(sys.argv[1] + '/b'):\n"
    killed += "    t.write_text('x'); os.kill(os.getpid(), 9)"
    run = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "kept.txt").write_text("")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_append_line_ends_a_torn_line_first(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "metrics.jsonl"
    append_line(log, "one")
    with log.open("a") as file:
        file.write('{"torn": ')
    append_line(log, "two")
    assert log.read_text() == 'one\n{"torn": \ntwo\n'


def test_append_line_writes_all_or_nothing_on_a_full_disk(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    append_line(log, "x" * 900)
    with pytest.raises(DataError), file_size_limit(1000):
        append_line(log, "y" * 900)
    assert log.read_text() == "x" * 900 + "\n"
    with pytest.raises(DataError) as error:
        append_line("/dev/full", "x")
    assert "No space left on device" in one_sentence(error)


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    writers = [
        threading.Thread(target=lambda n=n: [append_line(log, str(n) * 200) for _ in range(50)]) for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = log.read_text().splitlines()
    assert sorted(lines) == sorted(str(n) * 200 for n in range(4) for _ in range(50))


def test_sha256_of_the_empty_file_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(DataError):
        sha256(tmp_path / "absent")


def test_free_bytes_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(status.f_bavail * status.f_frsize, rel=0.1)


HOLD = (
    "import sys, time; from ddpm.files import Lock\nwith Lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
)


def test_a_lock_names_its_holder_and_ends_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError) as error:
            enter(path)
        message = one_sentence(error)
        assert str(path) in message
        assert f"process {holder.pid} on {socket.gethostname()}" in message
        holder.kill()
    with Lock(path):
        written = json.loads(path.read_text())
        assert written["pid"] == os.getpid()
        assert set(written) == {"pid", "host", "command", "since"}
    assert path.read_text() == ""


def test_a_waiting_lock_gets_in_after_the_holder(tmp_path: Path) -> None:
    order: list[str] = []

    def wait() -> None:
        with Lock(tmp_path / "lock", wait=True):
            order.append("second")

    with Lock(tmp_path / "lock"):
        thread = threading.Thread(target=wait)
        thread.start()
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "second"]


def test_a_lock_ends_with_its_block_even_if_a_forked_child_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = "import os, sys, time; from ddpm.files import Lock\n"
    script += "with Lock(sys.argv[1]):\n    child = os.fork()\n    if child == 0: time.sleep(60); os._exit(0)\n"
    script += "with Lock(sys.argv[1]): pass\nos.kill(child, 9); os.wait()"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)


CONTENT = bytes(range(256)) * 16384  # 4 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT, with Range; can be told to break off, to ignore Range, to send something else."""

    daemon_threads = True
    content = CONTENT
    break_after: int | None = None
    ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        if "absent" in self.path:
            self.send_error(404)
            return
        content = self.server.content
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) if self.server.break_after is None else start + self.server.break_after
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_verifies_and_tells_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "deep" / "file.bin"
    download(server.url, path, DIGEST, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(seen) == seen
    download(server.url, path, DIGEST)
    assert len(server.requested) == 1, "a file that is there is not fetched again"


def test_an_interrupted_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    server.break_after = 1_000_000
    with pytest.raises(DataError) as error:
        download(server.url, path, DIGEST)
    message = one_sentence(error)
    assert "1,000,000 of 4,194,304 bytes" in message
    assert f"put it at {path}" in message
    assert not path.exists()
    server.break_after = None
    download(server.url, path, DIGEST, size=len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert server.requested == [None, "bytes=1000000-"]
    assert not path.with_name("file.bin.part").exists()


def test_a_server_without_ranges_sends_everything_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.ranges = False
    download(server.url, tmp_path / "file.bin", DIGEST)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("kept", [b"bytes of another file", CONTENT + b"and more"])
def test_wrong_bytes_kept_from_before_are_thrown_away(server: Server, tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "file.bin.part").write_bytes(kept)
    download(server.url, tmp_path / "file.bin", DIGEST)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requested == [f"bytes={len(kept)}-", None]


def test_a_whole_part_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "file.bin", DIGEST)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = b"something else"
    with pytest.raises(DataError) as error:
        download(server.url, tmp_path / "file.bin", DIGEST)
    assert hashlib.sha256(b"something else").hexdigest() in one_sentence(error)
    assert {path.name for path in tmp_path.iterdir()} == {".file.bin.lock"}


def test_failing_downloads_say_where_to_put_the_file(server: Server, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        for url in (server.url + "?absent", nobody, "file:///etc/hostname", "http://[broken"):
            with pytest.raises(DataError) as error:
                download(url, tmp_path / "file.bin", DIGEST)
            message = one_sentence(error)
            assert f"put it at {tmp_path / 'file.bin'}" in message
            assert url in message


def test_a_full_disk_ends_a_download_and_keeps_what_came(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error, file_size_limit(2 << 20):
        download(server.url, tmp_path / "file.bin", DIGEST)
    assert "file.bin.part" in one_sentence(error)
    download(server.url, tmp_path / "file.bin", DIGEST)
    assert server.requested[1] == f"bytes={2 << 20}-"
    with pytest.raises(DataError, match="no room"):
        download(server.url, tmp_path / "huge.bin", DIGEST, size=1 << 60)


def tar_with(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def symlink_in_zip(name: str, target: str) -> tuple[zipfile.ZipInfo, str]:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info, target


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_members_are_read_and_nothing_is_unpacked(tmp_path: Path, name: str) -> None:
    files = {"./data/a.bin": b"A" * 5000, "../evil.txt": b"no", "/abs/evil.txt": b"no", "data/b.bin": b"B"}
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            for inside, data in files.items():
                archive.writestr(inside.removeprefix("./"), data)
    else:
        tar_with(path, *files.items(), link("data/link", "../../evil"))
    wanted = ["data/b.bin", "data/a.bin"]
    assert dict(read_members(path, wanted)) == {"data/a.bin": b"A" * 5000, "data/b.bin": b"B"}
    assert [each.name for each in tmp_path.rglob("*")] == ["in", name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_wanted_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tar_with(tmp_path / "a.tar", ("secret", b"x"), link("wanted", "secret", kind))
    with pytest.raises(DataError) as error:
        list(read_members(path, ["wanted"]))
    assert "not an ordinary file" in one_sentence(error)


def test_links_in_zip_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(*symlink_in_zip("wanted", "/etc/hostname"))
    with pytest.raises(DataError, match="not an ordinary file"):
        list(read_members(tmp_path / "a.zip", ["wanted"]))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_bombs_are_refused_before_they_fill_the_memory(tmp_path: Path, name: str) -> None:
    bomb = bytes(50 << 20)
    path = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("wanted", bomb)
    else:
        tar_with(path, ("wanted", bomb))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="unpacks to more than 1,000,000 bytes"):
        list(read_members(path, ["wanted"], max_bytes=1_000_000))


def test_archives_with_very_many_members_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x").tobuf()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header * 100_001 + bytes(1024)))
    with pytest.raises(DataError, match="more than 100,000 files"):
        list(read_members(tmp_path / "a.tar.gz", ["wanted"]))


def test_missing_members_and_missing_archives_are_named(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "a.tar", ("a", b"x"))
    with pytest.raises(DataError, match="holds no 'b'"):
        list(read_members(path, ["a", "b"]))
    with pytest.raises(DataError, match="is not there"):
        list(read_members(tmp_path / "absent.tar", ["a"]))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["tar", "gz", "zip"]))
def test_damaged_archives_are_read_rightly_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    path = tmp_path_factory.mktemp("damaged") / f"a.{name}"
    content = bytes(range(256)) * 20
    if name == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("wanted", content)
    else:
        tar_with(path, ("wanted", content))
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del whole[place:]
    path.write_bytes(whole)
    try:
        found = dict(read_members(path, ["wanted"], max_bytes=1 << 20))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert found.keys() == {"wanted"}
        if name == "zip":
            assert found == {"wanted": content}, "zip archives carry a checksum of each member"
