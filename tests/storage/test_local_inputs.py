"""LocalFiles: what every backend promises, and links, pipes and descriptors."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer.errors import CorruptCheckpointError, ReadError
from dcp_hf_writer.storage.local_inputs import LocalFiles
from support.input_conformance import CONTENT, InputConformance, RawDirectory, cut, read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class LocalDirectory(RawDirectory):
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory)
        directory.mkdir()

    def files(self) -> LocalFiles:
        return LocalFiles(self.path)

    def write(self, name: str, content: bytes) -> None:
        (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_bytes(content)

    def remove(self, name: str) -> None:
        (self.directory / name).unlink()


class TestLocalFiles(InputConformance):
    @pytest.fixture
    def raw(self, tmp_path: Path) -> LocalDirectory:
        return LocalDirectory(tmp_path / "raw")


class TestLocalFilesBehindALink(InputConformance):
    @pytest.fixture
    def raw(self, tmp_path: Path) -> LocalDirectory:
        raw = LocalDirectory(tmp_path / "raw")
        (tmp_path / "link").symlink_to("raw")
        raw.directory = tmp_path / "link"
        raw.path = str(raw.directory)
        return raw


def refusal(files: LocalFiles, name: str) -> CorruptCheckpointError:
    with pytest.raises(CorruptCheckpointError) as caught:
        files.open(name)
    return caught.value


# -- links -----------------------------------------------------------------------------------------


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """A directory, beside one with a file that is none of its business."""
    for name in ("inside", "inside/sub", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "inside" / "data").write_bytes(b"inside")
    (tmp_path / "outside" / "data").write_bytes(b"outside")
    return tmp_path / "inside"


@pytest.mark.parametrize("target", ["data", "{root}/data", "sub/../data", "other"])
def test_link_is_followed_when_it_stays_within_the_directory(inside: Path, target: str) -> None:
    (inside / "other").symlink_to("data")
    (inside / "link").symlink_to(target.format(root=inside))
    files = LocalFiles(str(inside))
    assert files.read_whole("link", max_nbytes=6) == b"inside"
    assert files.names() == ["data", "link", "other"]
    assert files.tree() == {"data": 6, "link": 6, "other": 6}


@pytest.mark.parametrize("target", ["../outside/data", "{root}/../outside/data", "sub/out"])
def test_link_is_refused_when_it_leads_out_of_the_directory(inside: Path, target: str) -> None:
    (inside / "sub" / "out").symlink_to("../../outside/data")
    (inside / "link").symlink_to(target.format(root=inside))
    error = refusal(LocalFiles(str(inside)), "link")
    assert error.problem == "a symbolic link leads out of the checkpoint"
    assert error.path == str(inside / "link")
    assert error.found == str(inside.parent / "outside" / "data")


def test_file_is_refused_when_a_directory_on_its_path_leads_out(inside: Path) -> None:
    (inside / "link").symlink_to("../outside")
    assert "symbolic link" in str(refusal(LocalFiles(str(inside)), "link/data"))


def test_neighbour_is_outside_although_its_path_begins_alike(inside: Path) -> None:
    (inside.parent / "inside-2").mkdir()
    (inside.parent / "inside-2" / "data").write_bytes(b"x")
    (inside / "link").symlink_to("../inside-2/data")
    assert "symbolic link" in str(refusal(LocalFiles(str(inside)), "link"))


def test_directory_below_may_itself_be_a_link(inside: Path) -> None:
    (inside / "hf").symlink_to("../outside")
    assert LocalFiles(str(inside)).below("hf").read_whole("data", max_nbytes=7) == b"outside"


def test_blob_of_a_hub_cache_is_read_from_its_snapshots_only(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    for directory in (blobs, snapshot, blobs / "deep"):
        directory.mkdir(parents=True)
    (blobs / "digest").write_bytes(b"blob")
    (blobs / "deep" / "digest").write_bytes(b"blob")
    (snapshot / "config.json").symlink_to("../../blobs/digest")
    (snapshot / "deeper").symlink_to("../../blobs/deep/digest")
    files = LocalFiles(str(snapshot))
    assert files.read_whole("config.json", max_nbytes=4) == b"blob"
    assert "symbolic link" in str(refusal(files, "deeper"))
    (tmp_path / "snapshots").rename(tmp_path / "shots")
    moved = LocalFiles(str(tmp_path / "shots" / "0123abc"))
    assert "symbolic link" in str(refusal(moved, "config.json"))


@pytest.mark.parametrize(
    ("target", "number"), [("absent", errno.ENOENT), ("link", errno.ELOOP)], ids=["broken", "loop"]
)
def test_link_that_leads_to_nothing_is_there_and_cannot_be_opened(
    inside: Path, target: str, number: int
) -> None:
    (inside / "link").symlink_to(target)
    files = LocalFiles(str(inside))
    assert files.has("link")
    assert files.names() == ["data", "link"]
    assert files.tree() == {"data": 6, "link": -1}
    with pytest.raises(ReadError) as caught:
        files.open("link")
    assert (caught.value.path, caught.value.errno) == (str(inside / "link"), number)


def test_tree_does_not_follow_a_link_to_a_directory(inside: Path) -> None:
    (inside / "sub" / "up").symlink_to("..")
    (inside / "link").symlink_to("sub")
    files = LocalFiles(str(inside))
    assert files.tree() == {"data": 6, "link": -1, "sub/up": -1}
    assert files.names() == ["data"]


# -- what is not a regular file --------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    # By a short name: the path of a socket has at most 107 bytes.
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(path.parent)
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def make_link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("sub") / "pipe")
    path.symlink_to("sub/pipe")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [make_pipe, make_link_to_pipe])
def test_pipe_is_listed_and_refused_without_waiting(
    inside: Path, make: Callable[[Path], None]
) -> None:
    make(inside / "odd")
    files = LocalFiles(str(inside))
    assert files.names() == ["data", "odd"]
    assert files.tree()["odd"] == -1
    fds = len(os.listdir("/proc/self/fd"))
    error = refusal(files, "odd")
    assert (error.path, "not a regular file" in error.problem) == (str(inside / "odd"), True)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_socket_is_listed_and_cannot_be_opened(inside: Path) -> None:
    make_socket(inside / "odd")
    files = LocalFiles(str(inside))
    assert files.tree()["odd"] == -1
    with pytest.raises(ReadError) as caught:
        files.open("odd")
    assert (caught.value.path, caught.value.errno) == (str(inside / "odd"), errno.ENXIO)


# -- system calls and descriptors ------------------------------------------------------------------


def test_read_goes_on_when_the_system_returns_less_than_asked(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inside / "data").write_bytes(CONTENT)
    preadv = os.preadv

    def stingy(fd: int, buffers: Sequence[memoryview], start: int) -> int:
        first = next(buffer for buffer in buffers if buffer.nbytes)
        return preadv(fd, [first[:7]], start)

    monkeypatch.setattr(os, "preadv", stingy)
    with LocalFiles(str(inside)).open("data") as file:
        assert read(file, 11, 5, 0, 20, 7, 1, 99) == cut(CONTENT, 11, 5, 0, 20, 7, 1, 99)


@pytest.mark.parametrize(
    ("call", "number", "hint"),
    [
        ("open", errno.EMFILE, "raise the limit on open files (ulimit -n)"),
        ("open", errno.EACCES, "this user may not read it"),
        ("preadv", errno.EIO, "the device may be failing; read another copy"),
        ("preadv", errno.ESTALE, None),
    ],
)
def test_error_of_the_system_is_raised_with_number_path_and_advice(
    inside: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, hint: str | None
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    files = LocalFiles(str(inside))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ReadError) as caught:
            files.read_whole("data", max_nbytes=6)
    error = caught.value
    assert (error.path, error.errno, error.hint) == (str(inside / "data"), number, hint)
    assert error.found == f"{errno.errorcode[number]}: {os.strerror(number)}"


def test_second_close_leaves_the_descriptor_to_its_new_owner(inside: Path) -> None:
    files = LocalFiles(str(inside))
    file = files.open("data")
    file.close()
    with files.open("data") as other:
        file.close()
        assert other.read(0, 6) == b"inside"


def test_file_that_nobody_closed_is_closed_with_its_last_reference(inside: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    file = LocalFiles(str(inside)).open("data")
    assert len(os.listdir("/proc/self/fd")) == fds + 1
    del file
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize(
    ("cores", "ranks", "readers"),
    [(1, "", 2), (2, "", 2), (3, "", 3), (64, "", 4), (64, "8", 4), (64, "32", 2), (8, "x", 4)],
)
def test_readers_are_two_to_four_as_the_rank_has_processors(
    inside: Path, monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str, readers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert LocalFiles(str(inside)).readers == readers


def test_local_storage_reads_ahead_and_takes_small_reads(inside: Path) -> None:
    files = LocalFiles(str(inside))
    assert (files.reads_ahead, files.prefers_large_reads) == (True, False)
