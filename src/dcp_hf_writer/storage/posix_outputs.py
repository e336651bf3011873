"""Output files and directories on a POSIX file system.

Each function states what is durable when it returns. After a failed write, fsync or close, give up
the file: its data may be lost, and the kernel may report the error only once.
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
    clone_range,
    rename_no_replace,
    reserve,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

# One system call writes at most this many bytes. On a slow device it then holds the inode lock only
# briefly, and other writers of the file get their turn.
PIECE_NBYTES = 16 << 20

# Linux, UIO_MAXIOV: buffers of one pwritev.
_MAX_BUFFERS = 1024

# How /proc/self/mountinfo encodes a space, tab, newline or backslash.
_OCTAL = re.compile(r"\\([0-7]{3})")

# File systems on which reserving space costs a second pass over every page.
_RESERVES_SLOWLY = frozenset({"tmpfs", "ramfs"})

# File systems that only one host uses, or that keep the page caches of several hosts coherent.
COHERENT = frozenset(
    {
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"),
        *("lustre", "gpfs", "ceph", "wekafs"),
    }
)


def _count_nothing(_: int) -> None:
    """Count no bytes."""


class OutputFile:
    """A file into which this process writes ranges; open from the first write to the fsync.

    It is opened write-only: if a client of a network file system may also read, it rounds writes up
    to whole pages.
    """

    def __init__(self, path: str, *, create: bool) -> None:
        """Open the file; with `create`, make a new one and refuse an existing one.

        Raises:
            WriteError: If it cannot be opened, or if an existing one is a link to a file of an
                earlier checkpoint, which never changes.
        """
        self.path = path
        self.count: Callable[[int], object] = _count_nothing
        """Called with the number of bytes whenever some have been written."""
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        with write_errors(path):
            # The mode is 0o666 minus the umask: the user's umask decides who may read the file.
            self._fd = os.open(path, flags, 0o666)
        if not create and os.fstat(self._fd).st_nlink > 1:
            self.discard()
            msg = "an output file is a link to a file of an earlier checkpoint"
            raise WriteError(
                msg,
                phase="write",
                path=path,
                expected="a file with one name",
                found="a file with several names",
                hint="nothing was published; this is a bug in dcp-hf-writer, please report it",
            )

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            WriteError: If the file system refuses the write.
        """
        while data.nbytes:
            with write_errors(self.path):
                done = os.pwrite(self._fd, data[:PIECE_NBYTES], offset)
            self.count(done)
            data, offset = data[done:], offset + done

    def write_runs(self, data: memoryview, nbytes: int, starts: Iterator[int]) -> None:
        """Write runs of `data` of equal length at ascending offsets.

        Args:
            data: The runs, one after another.
            nbytes: Length of each run, in bytes.
            starts: Offset of each run in the file.

        Raises:
            WriteError: If the file system refuses a write.
        """
        fd, position, late = self._fd, 0, 0
        with write_errors(self.path):
            for start in starts:
                done = os.pwrite(fd, data[position : position + nbytes], start)
                if done != nbytes:
                    self.write(data[position + done : position + nbytes], start + done)
                    late += nbytes - done
                position += nbytes
        self.count(position - late)

    def write_many(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write buffers one after another from `offset` on; return the offset after the last byte.

        Raises:
            WriteError: If the file system refuses a write.
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
        self.count(done)
        if done != nbytes:
            self.write(memoryview(b"".join(group))[done:], offset + done)
        return offset + nbytes

    def clone(self, source: int, start: int, nbytes: int, offset: int) -> None:
        """Share disk blocks with another file instead of writing the same bytes again.

        Args:
            source: Descriptor of the other file, open for reading.
            start: First byte in it, a multiple of the block size.
            nbytes: How many bytes, a multiple of the block size.
            offset: Where they go in this file, a multiple of the block size.

        Raises:
            WriteError: If the file system cannot clone; see `block_clones.CANNOT_CLONE`.
        """
        with write_errors(self.path):
            clone_range(source, start, nbytes, self._fd, offset)
        self.count(nbytes)

    def set_size(self, nbytes: int, *, fs_type: str) -> None:
        """Give the file its final size, and reserve its space if that is cheap.

        Raises:
            WriteError: If there is no space.
        """
        with write_errors(self.path):
            if nbytes and fs_type not in _RESERVES_SLOWLY:
                try:
                    reserve(self._fd, nbytes)
                except UnsupportedCallError:
                    # Reserving is optional: without it, a write fails if the device is full.
                    os.ftruncate(self._fd, nbytes)
            else:
                os.ftruncate(self._fd, nbytes)

    def cut(self, nbytes: int) -> None:
        """Remove what lies behind the first bytes.

        Raises:
            WriteError: If the file system refuses.
        """
        with write_errors(self.path):
            os.ftruncate(self._fd, nbytes)

    def sync(self) -> None:
        """Make all that was written through this descriptor durable.

        Raises:
            WriteError: If some data was lost. A later call may succeed although the data is lost.
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
        """Close a file whose content is not needed, and ignore errors."""
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
    """Turn the operating system's errors on `path` into `WriteError`, with number and advice."""
    try:
        yield
    except CheckpointError:
        # Some of our own errors are OSErrors too.
        raise
    except OSError as error:
        msg = "the file system refused a write"
        raise WriteError(
            msg,
            phase="write",
            path=path,
            found=number_and_text(error),
            errno=error.errno,
            hint=f"{advice}; nothing was published"
            if (advice := advice_for(error.errno))
            else "nothing was published; you may repeat the save",
        ) from error


def number_and_text(error: OSError) -> str:
    """Return the name of an error's number and its text: `ENOSPC: No space left on device`."""
    return f"{errno.errorcode.get(error.errno or 0, '?')}: {error.strerror or error}"


_ADVICE = {
    errno.ENOSPC: "free space on the device, or remove old checkpoints",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the directory is not writable by this user",
    errno.EPERM: "the directory is not writable by this user, or immutable",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "someone removed the directory while it was written",
}


def advice_for(number: int | None) -> str | None:
    """Return what a user can do about an error of the file system; `None` if nothing special."""
    return _ADVICE.get(number or 0)


def write_file(path: str, data: bytes) -> None:
    """Create a file; its content is durable on return, its name only after `sync_directory`.

    Raises:
        WriteError: If the file exists, or cannot be written.
    """
    with OutputFile(path, create=True) as file:
        file.write(memoryview(data), 0)
        file.sync()


def replace_durably(path: str, data: bytes, *, draft: str) -> None:
    """Create a file, or give it new content, in one step; durable on return.

    Args:
        path: The file. A crash leaves the old content or the new.
        data: The new content.
        draft: Another path on the same file system, which no other process uses. The content is
            written there first; what an earlier process left there is removed.

    Raises:
        WriteError: If the file system refuses.
    """
    with write_errors(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        write_file(draft, data)
        os.replace(draft, path)
    sync_directory(os.path.dirname(path))


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
        WriteError: If a directory cannot be created.
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
    """Rename a directory to its final name, which must be free; not yet durable on return.

    Raises:
        OSError: If the target exists (`FileExistsError`), or the rename fails.
    """
    try:
        rename_no_replace(source, target)
    except UnsupportedCallError:
        # Without RENAME_NOREPLACE a rename silently replaces an empty directory, so look first.
        # Only another save of the same target could come in between; the user must not start one.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        os.rename(source, target)
    except OSError:
        # A network file system may rename and still report an error, so look at the result.
        if os.path.lexists(source) or not os.path.isdir(target):
            raise


def file_system_type(path: str) -> str:
    """Return the kernel's name of the file system that holds `path`, such as `ext4`; else `""`."""
    best, found = -1, ""
    where = os.path.realpath(path)
    for point, kind in mount_points().items():
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, found = len(point), kind
    return found


def mount_points() -> dict[str, str]:
    """Return the type of the file system at each mount point; empty if the kernel does not tell.

    Source:
        proc_pid_mountinfo(5): mount point in field 5, type after the separator.
    """
    found = {}
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                before, _, after = line.partition(" - ")
                # Only space, tab, newline and backslash are written as octal numbers.
                point = _OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split(" ")[4])
                # Of several mounts at one point, the last one is visible.
                found[point] = after.split()[0]
    except OSError:
        return {}
    return found


def free_bytes(path: str) -> int | None:
    """Return the bytes that an unprivileged user may still write; `None` if that is unknown."""
    try:
        stats = os.statvfs(path)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize if stats.f_blocks else None
