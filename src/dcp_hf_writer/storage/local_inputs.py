"""Backend for reading: files below a directory of this host's file systems."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.storage.input_contract import (
    InputFile,
    InputFiles,
    check_name,
    ends_too_early,
    read_errors,
)
from dcp_hf_writer.storage.reader_threads import local_reader_threads

if TYPE_CHECKING:
    from collections.abc import Sequence


class LocalFiles(InputFiles):
    """Files below a directory of this host's file systems.

    `open` follows links within the directory, and links from a snapshot of a HuggingFace cache to
    the blobs of that cache. It refuses a link that leads elsewhere.
    """

    reads_ahead = True
    prefers_large_reads = False

    def __init__(self, path: str) -> None:
        """Read below `path`, which may itself be a link."""
        self.path = path
        self.readers = local_reader_threads()
        self._root = os.path.realpath(path)

    def open(self, name: str) -> InputFile:
        """Open a file; see `InputFiles.open`."""
        path = os.path.join(self.path, check_name(name, path=self.path))
        real = os.path.realpath(os.path.join(self._root, name))
        if not self._is_ours(real):
            raise CorruptCheckpointError(
                "a symbolic link leads out of the checkpoint",
                phase="read",
                path=path,
                expected=f"a file below {self._root}",
                found=real,
                hint="put the file into the checkpoint; links may lead to files within it, or to "
                "the blobs of a HuggingFace cache",
            )
        return _LocalFile(path, real)

    def _is_ours(self, real: str) -> bool:
        if real.startswith(os.path.join(self._root, "")):
            return True
        # The cache of huggingface_hub: snapshots/<revision>/<file> -> ../../blobs/<digest>.
        snapshots = os.path.dirname(self._root)
        blobs = os.path.join(os.path.dirname(snapshots), "blobs")
        return os.path.basename(snapshots) == "snapshots" and os.path.dirname(real) == blobs

    def names(self) -> list[str]:
        """Return the names in the directory; see `InputFiles.names`."""
        with read_errors(self.path), os.scandir(self._root) as entries:
            return sorted(entry.name for entry in entries if not _is_directory(entry))

    def tree(self) -> dict[str, int]:
        """Return the size of every file; see `InputFiles.tree`."""
        sizes: dict[str, int] = {}
        todo = [""]
        while todo:
            below = todo.pop()
            path = os.path.join(self.path, below) if below else self.path
            with read_errors(path), os.scandir(os.path.join(self._root, below)) as entries:
                for entry in entries:
                    name = os.path.join(below, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(name)
                    else:
                        sizes[name] = _size(entry)
        return dict(sorted(sizes.items()))

    def below(self, name: str) -> InputFiles:
        """Return the files of a directory within this one; the directory may be a link."""
        return LocalFiles(os.path.join(self.path, check_name(name, path=self.path)))

    def has(self, name: str) -> bool:
        """Whether anything has this name; see `InputFiles.has`."""
        return os.path.lexists(os.path.join(self._root, check_name(name, path=self.path)))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # The entry is a link to itself. It must not hide the other files; `open` refuses it.
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
    except OSError:
        # A broken link, or a file that was removed after the listing.
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


class _LocalFile(InputFile):
    def __init__(self, path: str, real: str) -> None:
        self.path = path
        self._fd = -1
        with read_errors(path):
            # O_NONBLOCK: opening a named pipe must not wait for its writer. It changes nothing for
            # a regular file.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._fd = os.open(real, flags)
            status = os.fstat(self._fd)
        self.nbytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CorruptCheckpointError(
                "an entry of a checkpoint is not a regular file", phase="read", path=path
            )

    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill buffers; see `InputFile.read_into`."""
        wanted = sum(buffer.nbytes for buffer in buffers)
        self.check_range(start, wanted)
        with read_errors(self.path):
            done = os.preadv(self._fd, buffers, start)
            while done < wanted:
                more = os.preadv(self._fd, _rest(buffers, done), start + done)
                if not more:
                    left = os.fstat(self._fd).st_size
                    raise ends_too_early(self.path, start + wanted, f"{left} bytes")
                done += more

    def __del__(self) -> None:
        # A load may be aborted, for example because another rank failed. Then no other code closes
        # the file.
        self.close()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return the parts of the buffers that remain to be filled after the first `done` bytes."""
    rest = []
    for buffer in buffers:
        skipped = min(done, buffer.nbytes)
        done -= skipped
        if skipped < buffer.nbytes:
            rest.append(buffer[skipped:])
    return rest
