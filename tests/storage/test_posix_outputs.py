"""Files on a POSIX file system, compared with a file in memory, and the system's refusals."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.errors import CheckpointError, WriteError
from dcp_hf_writer.storage import linux_calls, posix_outputs
from dcp_hf_writer.storage.linux_calls import (
    UnsupportedCallError,
    exchange,
    rename_no_replace,
    reserve,
)
from dcp_hf_writer.storage.posix_outputs import (
    OutputFile,
    file_system_type,
    free_bytes,
    make_directories,
    publish_new,
    sync_directory,
    write_errors,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write in pieces of 7 bytes and 3 buffers, so that small data has many."""
    monkeypatch.setattr(posix_outputs, "PIECE_NBYTES", 7)
    monkeypatch.setattr(posix_outputs, "_MAX_BUFFERS", 3)


@pytest.fixture
def short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel take no more than 5 bytes of each call."""
    pwrite, pwritev = os.pwrite, os.pwritev

    def some_of(buffers: list[memoryview]) -> list[memoryview]:
        return [memoryview(b"".join(buffers)[:5])]

    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: pwritev(fd, some_of(data), offset))


DATA = bytes(range(200))


# Writing


@pytest.mark.usefixtures("small_pieces")
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=40)), max_size=6))
def test_ranges_lie_where_they_were_written(ranges: list[tuple[int, bytes]]) -> None:
    model = bytearray(100)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "file")
        with OutputFile(path, create=True) as file:
            file.set_size(100, fs_type=file_system_type(directory))
            for offset, data in ranges:
                file.write(memoryview(data), offset)
                model[offset : offset + len(data)] = data
            file.sync()
        assert Path(path).read_bytes() == model


@pytest.mark.usefixtures("small_pieces")
@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=12), st.integers(0, 9))
def test_buffers_follow_one_another(buffers: list[bytes], start: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "file")
        with OutputFile(path, create=True) as file:
            stop = file.write_many([memoryview(data) for data in buffers], start)
        joined = b"".join(buffers)
        assert stop == start + len(joined)
        assert Path(path).read_bytes() == (bytes(start) + joined if joined else b"")


def test_runs_are_spread_over_the_file(tmp_path: Path) -> None:
    with OutputFile(str(tmp_path / "file"), create=True) as file:
        file.write_runs(memoryview(b"aabbcc"), 2, iter([1, 5, 9]))
    assert (tmp_path / "file").read_bytes() == b"\0aa\0\0bb\0\0cc"


@pytest.mark.usefixtures("short_writes")
def test_rest_is_written_where_it_belongs_when_the_kernel_takes_less(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with OutputFile(str(path), create=True) as file:
        file.write(memoryview(DATA), 3)
        assert file.write_many([memoryview(DATA[:99]), memoryview(DATA[99:])], 203) == 403
        file.write_runs(memoryview(DATA[:40]), 20, iter([410, 440]))
    content = path.read_bytes()
    assert content[:403] == bytes(3) + DATA + DATA
    assert (content[410:430], content[440:]) == (DATA[:20], DATA[20:40])


@pytest.mark.parametrize("fs_type", ["ext4", "tmpfs"])
@pytest.mark.parametrize("nbytes", [0, 1, 100_000])
def test_file_has_its_size_at_once_and_reads_as_zeros(
    tmp_path: Path, fs_type: str, nbytes: int
) -> None:
    path = tmp_path / "file"
    with OutputFile(str(path), create=True) as file:
        file.set_size(nbytes, fs_type=fs_type)
    assert path.read_bytes() == bytes(nbytes)


def refuse(number: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        kind = UnsupportedCallError if number in linux_calls._UNSUPPORTED else OSError
        raise kind(number, os.strerror(number))

    return call


def test_file_has_its_size_where_space_cannot_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posix_outputs, "reserve", refuse(errno.EOPNOTSUPP))
    with OutputFile(str(tmp_path / "file"), create=True) as file:
        file.set_size(5000, fs_type="nfs")
    assert (tmp_path / "file").stat().st_size == 5000


def test_no_space_is_found_when_it_is_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posix_outputs, "reserve", refuse(errno.ENOSPC))
    with (
        OutputFile(str(tmp_path / "file"), create=True) as file,
        pytest.raises(WriteError, match=r"ENOSPC.*free space") as caught,
    ):
        file.set_size(5000, fs_type="ext4")
    assert (caught.value.errno, caught.value.path) == (errno.ENOSPC, str(tmp_path / "file"))


def test_reserving_more_than_there_is_fails_and_takes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file, pytest.raises(OSError, match=r"No space|too large"):
        reserve(file.fileno(), 1 << 60)
    assert path.stat().st_blocks == 0


def test_space_is_reserved_but_where_that_costs_a_pass_over_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[int] = []
    monkeypatch.setattr(posix_outputs, "reserve", lambda _, nbytes: reserved.append(nbytes))
    for number, fs_type in enumerate(("ext4", "tmpfs", "xfs", "ramfs", "")):
        with OutputFile(str(tmp_path / str(number)), create=True) as file:
            file.set_size(5000 + number, fs_type=fs_type)
    assert reserved == [5000, 5002, 5004]


# Opening and closing


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = open_files()
    for name, end in (("a", OutputFile.close), ("b", OutputFile.discard)):
        file = OutputFile(str(tmp_path / name), create=True)
        file.write(memoryview(b"data"), 0)
        assert open_files() == before + 1
        end(file)
        end(file)
        assert open_files() == before
    write_file(str(tmp_path / "c"), b"data")
    sync_directory(str(tmp_path))
    make_directories(str(tmp_path / "d" / "e"))
    assert open_files() == before


def test_file_that_exists_is_not_opened_as_new(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(WriteError, match="EEXIST"):
        OutputFile(str(tmp_path / "file"), create=True)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_file_that_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="someone removed the directory"):
        OutputFile(str(tmp_path / "file"), create=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0, 0o666)])
def test_mode_is_what_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    old = os.umask(mask)
    try:
        write_file(str(tmp_path / "file"), b"data")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_file_is_write_only_and_not_inherited(tmp_path: Path) -> None:
    with OutputFile(str(tmp_path / "file"), create=True) as file:
        assert not os.get_inheritable(file._fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pread(file._fd, 1, 0)


def test_error_of_a_write_is_told_and_a_second_close_is_harmless(tmp_path: Path) -> None:
    file = OutputFile(str(tmp_path / "file"), create=True)
    os.close(file._fd)
    for act in (lambda: file.write(memoryview(b"x"), 0), file.sync, file.close):
        with pytest.raises(WriteError, match="EBADF"):
            act()
    file.close()
    file.discard()


# Errors


@pytest.mark.parametrize("number", sorted(posix_outputs._ADVICE))
def test_advice_follows_from_the_number(number: int) -> None:
    with pytest.raises(WriteError) as caught, write_errors("/run/step-1"):
        raise OSError(number, os.strerror(number))
    error = caught.value
    assert (error.errno, error.path, error.phase) == (number, "/run/step-1", "write")
    assert errno.errorcode[number] in str(error.found)
    assert error.hint == f"{posix_outputs._ADVICE[number]}; nothing was published"
    assert isinstance(error.__cause__, OSError)


def test_number_without_advice_says_that_nothing_was_published() -> None:
    with pytest.raises(WriteError, match=r"EIO.*nothing was published"), write_errors("x"):
        raise OSError(errno.EIO, "Input/output error")


def test_errors_of_ours_pass_as_they_are() -> None:
    ours = CheckpointError("ours")
    with pytest.raises(CheckpointError) as caught, write_errors("x"):
        raise ours
    assert caught.value is ours


# Directories


def test_directories_are_made_with_their_parents_and_may_be_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    for _ in range(2):
        make_directories(str(path))
        assert path.is_dir()


def test_parents_are_synced_from_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(posix_outputs, "sync_directory", synced.append)
    make_directories(str(tmp_path / "a" / "b"))
    assert synced == [str(tmp_path), str(tmp_path / "a")]


def test_file_in_the_way_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(WriteError, match=r"EEXIST|ENOTDIR"):
        make_directories(str(tmp_path / "a" / "b"))


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_directory_that_appears_meanwhile_is_taken_and_a_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real = os.mkdir

    def late(path: str) -> None:
        real(path) if kind == "directory" else Path(path).touch()
        real(path)

    monkeypatch.setattr(os, "mkdir", late)
    if kind == "directory":
        make_directories(str(tmp_path / "a"))
        return
    with pytest.raises(WriteError, match="EEXIST"):
        make_directories(str(tmp_path / "a"))


def test_syncing_what_is_no_directory_is_an_error(tmp_path: Path) -> None:
    sync_directory(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="ENOTDIR"):
        sync_directory(str(tmp_path / "file"))


# Renaming


def directory_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.fixture(params=["renameat2", "rename"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish with the system call that takes flags, and where there is none."""
    if request.param == "rename":
        monkeypatch.setattr(posix_outputs, "rename_no_replace", refuse(errno.EINVAL))


@pytest.mark.usefixtures("renaming")
def test_directory_gets_its_name(tmp_path: Path) -> None:
    source = directory_with(tmp_path / "source", "new")
    publish_new(str(source), str(tmp_path / "target"))
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert not source.exists()


@pytest.mark.usefixtures("renaming")
@pytest.mark.parametrize("kind", ["empty directory", "directory", "file", "dangling link"])
def test_name_that_is_taken_is_refused(tmp_path: Path, kind: str) -> None:
    source, target = directory_with(tmp_path / "source", "new"), tmp_path / "target"
    if kind == "file":
        target.touch()
    elif kind == "dangling link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if kind == "directory":
            (target / "kept").touch()
    before = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    with pytest.raises(FileExistsError):
        publish_new(str(source), str(target))
    assert (source / "file").read_text() == "new"
    assert (sorted(path.name for path in target.iterdir()) if target.is_dir() else []) == before


def test_rename_that_was_done_and_still_failed_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = directory_with(tmp_path / "source", "new")

    def done_but(one: str, other: str) -> None:
        rename_no_replace(one, other)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), one)

    monkeypatch.setattr(posix_outputs, "rename_no_replace", done_but)
    publish_new(str(source), str(tmp_path / "target"))
    assert (tmp_path / "target" / "file").read_text() == "new"


def test_rename_that_failed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = directory_with(tmp_path / "source", "new")
    monkeypatch.setattr(posix_outputs, "rename_no_replace", refuse(errno.EXDEV))
    with pytest.raises(OSError, match="cross-device"):
        publish_new(str(source), str(tmp_path / "target"))
    assert source.exists()


def test_exchange_swaps_two_directories(tmp_path: Path) -> None:
    one = directory_with(tmp_path / "one", "1")
    other = directory_with(tmp_path / "other", "2")
    exchange(str(one), str(other))
    assert ((one / "file").read_text(), (other / "file").read_text()) == ("2", "1")
    with pytest.raises(FileNotFoundError):
        exchange(str(one), str(tmp_path / "missing"))


def test_calls_that_the_kernel_lacks_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_calls, "_libc", object())
    with pytest.raises(UnsupportedCallError):
        reserve(0, 1)
    with pytest.raises(UnsupportedCallError):
        rename_no_replace("a", "b")


# File systems


@pytest.mark.parametrize("path", ["/", "/proc", "/dev/shm", "."])
def test_type_of_a_file_system_is_what_df_says(path: str) -> None:
    done = subprocess.run(
        ["df", "--output=fstype", path], capture_output=True, text=True, check=True, timeout=20
    )
    assert file_system_type(path) == done.stdout.split()[-1]


def test_mount_points_with_spaces_and_the_innermost_mount_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = tmp_path / "with space"
    inner = outer / "b\\s"
    inner.mkdir(parents=True)
    quoted = [str(path).replace("\\", "\\134").replace(" ", "\\040") for path in (outer, inner)]
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        f"2 1 0:5 / {quoted[0]} rw shared:1 master:2 - nfs4 server:/a rw\n"
        f"3 2 0:6 / {quoted[1]} rw - lustre x rw\n"
        f"4 1 0:7 / {quoted[0]}x rw - xfs y rw\n"
    )
    real = open

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        return real(table if path == "/proc/self/mountinfo" else path, *args, **kwargs)

    monkeypatch.setattr(posix_outputs, "open", opened, raising=False)
    assert file_system_type(str(outer / "step-1")) == "nfs4"
    assert file_system_type(str(inner)) == "lustre"
    assert file_system_type(str(tmp_path)) == "ext4"
    monkeypatch.setattr(posix_outputs, "open", refuse(errno.ENOENT), raising=False)
    assert file_system_type(str(tmp_path)) == ""


def test_free_space_is_what_the_system_says_or_unknown(tmp_path: Path) -> None:
    free = free_bytes(str(tmp_path))
    assert free is not None
    assert free > 0
    # /proc has no blocks, so it tells nothing.
    assert free_bytes("/proc") is None
    assert free_bytes(str(tmp_path / "missing")) is None
