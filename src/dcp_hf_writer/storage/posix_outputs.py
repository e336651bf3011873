"""Output files and directories on a POSIX file system.

What is durable on return is said per function. An error of a write, an fsync or a close is final
for the file it befell: the kernel may report it once and then forget it, while the data is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError, WriteError
from dcp_hf_writer.storage.linux_calls import (
    UnsupportedCallError,
    rename_no_replace,
    reserve,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

# One system call copies at most this much, so that a slow device does not hold the inode lock for
# long and other writers of the file get their turn.
PIECE_NBYTES = 16 << 20

# Linux, UIO_MAXIOV: buffers of one pwritev.
_MAX_BUFFERS = 1024

# How /proc/self/mountinfo writes a space, tab, newline or backslash.
_OCTAL = re.compile(r"\\([0-7]{3})")

# Magic names of file systems on which reserving space costs a second pass over every page.
_RESERVES_SLOWLY = frozenset({"tmpfs", "ramfs"})

# File systems of one host, or that keep the page caches of several hosts coherent (faults, 3).
COHERENT = frozenset(
    {
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"),
        *("lustre", "gpfs", "ceph", "wekafs"),
    }
)


class OutputFile:
    """A file that this process writes ranges of; opened once, from the first write to the fsync.

    Write-only: a client of a network file system that may read a page also rounds writes up to it.
    """

    def __init__(self, path: str, *, create: bool) -> None:
        """Open the file; `create` makes it new and refuses an existing one.

        Raises:
            WriteError: If it cannot be opened.
        """
        self.path = path
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        with write_errors(path):
            # 0o666 less the umask: the owner of the run decides who may read it.
            self._fd = os.open(path, flags, 0o666)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            WriteError: If the file system does not take it.
        """
        while data.nbytes:
            with write_errors(self.path):
                done = os.pwrite(self._fd, data[:PIECE_NBYTES], offset)
            data, offset = data[done:], offset + done

    def write_runs(self, data: memoryview, nbytes: int, starts: Iterator[int]) -> None:
        """Write equal runs of `data` at ascending places.

        Args:
            data: The runs, one after another.
            nbytes: Length of each run, in bytes.
            starts: Offset of each run in the file.

        Raises:
            WriteError: If the file system does not take them.
        """
        fd, position = self._fd, 0
        with write_errors(self.path):
            for start in starts:
                done = os.pwrite(fd, data[position : position + nbytes], start)
                if done != nbytes:
                    self.write(data[position + done : position + nbytes], start + done)
                position += nbytes

    def write_many(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write buffers one after another from `offset`; returns the offset behind the last.

        Raises:
            WriteError: If the file system does not take them.
        """
        group: list[memoryview] = []
        nbytes = 0
        for buffer in buffers:
            for start in range(0, buffer.nbytes, PIECE_NBYTES):
                piece = buffer[start : start + PIECE_NBYTES]
                if len(group) == _MAX_BUFFERS or nbytes + piece.nbytes > PIECE_NBYTES:
                    offset = self._write_group(group, nbytes, offset)
                    group, nbytes = [], 0
                group.append(piece)
                nbytes += piece.nbytes
        return self._write_group(group, nbytes, offset)

    def _write_group(self, group: list[memoryview], nbytes: int, offset: int) -> int:
        if not group:
            return offset
        with write_errors(self.path):
            done = os.pwritev(self._fd, group, offset)
        if done != nbytes:
            self.write(memoryview(b"".join(group))[done:], offset + done)
        return offset + nbytes

    def set_size(self, nbytes: int, *, fs_type: str) -> None:
        """Give the file its final size, and reserve its space where that is cheap.

        Raises:
            WriteError: If there is no space.
        """
        with write_errors(self.path):
            if nbytes and fs_type not in _RESERVES_SLOWLY:
                try:
                    reserve(self._fd, nbytes)
                except UnsupportedCallError:
                    # Nothing is lost: a full device is then found by a write.
                    os.ftruncate(self._fd, nbytes)
            else:
                os.ftruncate(self._fd, nbytes)

    def sync(self) -> None:
        """Make all that was written through this descriptor durable.

        Raises:
            WriteError: If some of it was lost; no later call may be believed.
        """
        with write_errors(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close; network file systems report late errors here.

        Raises:
            WriteError: If an error was pending.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with write_errors(self.path):
                os.close(fd)

    def discard(self) -> None:
        """Close a file whose content is not wanted any more, whatever the system says to that."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def write_errors(path: str) -> Iterator[None]:
    """Turn the system's errors on `path` into ours, with number and advice."""
    try:
        yield
    except CheckpointError:
        # Some of ours are OSErrors too.
        raise
    except OSError as error:
        msg = "the file system refused a write"
        raise WriteError(
            msg,
            phase="write",
            path=path,
            found=f"{errno.errorcode.get(error.errno or 0, '?')}: {error.strerror or error}",
            errno=error.errno,
            hint=_ADVICE.get(error.errno or 0, "nothing was published; the save may be repeated"),
        ) from error


_ADVICE = {
    errno.ENOSPC: "free space on the device, or remove old checkpoints; nothing was published",
    errno.EDQUOT: "the quota is used up; nothing was published",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the directory is not writable by this user",
    errno.EPERM: "the directory is not writable by this user, or immutable",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "someone removed the directory while it was written",
}


def write_file(path: str, data: bytes) -> None:
    """Create a file with this content; it is durable on return.

    Raises:
        WriteError: If it exists, or cannot be written.
    """
    with OutputFile(path, create=True) as file:
        file.write(memoryview(data), 0)
        file.sync()


def sync_directory(path: str) -> None:
    """Make the names in a directory durable.

    Raises:
        WriteError: If the file system refuses.
    """
    with write_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_directories(path: str) -> None:
    """Create a directory and its missing parents; their names are durable on return.

    Raises:
        WriteError: If one cannot be made.
    """
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_directories(parent)
    with write_errors(path):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
    sync_directory(parent)


def publish_new(source: str, target: str) -> None:
    """Give a directory its final name, which must be free; not yet durable on return.

    Raises:
        OSError: If the target exists (`FileExistsError`), or the rename fails.
    """
    try:
        rename_no_replace(source, target)
    except UnsupportedCallError:
        # Without RENAME_NOREPLACE an empty directory would be replaced in silence, so look first;
        # what slips in between is another save of the same target, which the user must not start.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        os.rename(source, target)
    except OSError:
        # A network file system may have renamed and still report an error: look before judging.
        if os.path.lexists(source) or not os.path.isdir(target):
            raise


def file_system_type(path: str) -> str:
    """Return the kernel's name of the file system that holds `path`, such as `ext4`; `""` unknown.

    Source:
        proc_pid_mountinfo(5): mount point in field 5, type after the separator.
    """
    best, found = -1, ""
    where = os.path.realpath(path)
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                before, _, after = line.partition(" - ")
                # Octal stands for space, tab, newline and backslash only.
                point = _OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split(" ")[4])
                inside = where == point or where.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= best:
                    best, found = len(point), after.split()[0]
    except OSError:
        return ""
    return found


def free_bytes(path: str) -> int | None:
    """Return the bytes that an unprivileged user may still write; `None` where it is not told."""
    try:
        stats = os.statvfs(path)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize if stats.f_blocks else None
