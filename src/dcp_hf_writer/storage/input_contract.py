"""The contract of a backend for reading: one directory, and the files in it.

A backend is a subclass of `InputFiles` and one of `InputFile`, in a module of its own.
`open_directory` chooses the backend. `tests/support/input_conformance.py` tests every promise that
is made here, for every backend.

File names come from the checkpoint, which may be hostile. So a backend passes each of them through
`check_name` before it touches the storage, and opens regular files only.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CorruptCheckpointError, ReadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

MAX_BUFFERS = 1024
"""Buffers of one read; Linux, UIO_MAXIOV."""


class InputFile(ABC):
    """One open file. Several threads may read from it at the same time.

    Not promised: that it can be pickled, or used in a forked child.
    """

    path: str
    """The file, for errors."""
    nbytes: int
    """Its size when it was opened."""

    @abstractmethod
    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill all buffers, one after another, with the bytes of the file from `start` on.

        Args:
            buffers: Contiguous, writable bytes; at most `MAX_BUFFERS`. There may be none, and
                they may be empty: then nothing is read.
            start: Position of the first byte in the file; not negative.

        Raises:
            ReadError: If the file ends before the last buffer is full, now or when it was opened;
                or if the storage refuses. The buffers may hold anything then.
        """

    def read(self, start: int, nbytes: int) -> bytes:
        """Return bytes of the file. The caller limits `nbytes`: they all are in memory.

        Raises:
            ReadError: As `read_into`.
        """
        data = bytearray(nbytes)
        if nbytes:
            self.read_into([memoryview(data)], start)
        return bytes(data)

    def check_range(self, start: int, nbytes: int) -> None:
        """Refuse a read that passes the end of the file; for `read_into` of a backend.

        Raises:
            ReadError: If the file had fewer than `start + nbytes` bytes when it was opened.
        """
        if nbytes and start + nbytes > self.nbytes:
            raise ends_too_early(self.path, start + nbytes, f"{self.nbytes} bytes")

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Give back what the open file holds; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InputFiles(ABC):
    """The files of one directory. Thread-safe; holds nothing open itself.

    A name is a path within the directory, with `/` between its parts. Every method that takes one
    raises `CorruptCheckpointError` if it is absolute, climbs, is empty or cannot be printed.

    Every call sees the files that another process has added or removed since the last one. A file
    that is removed while it is open can still be read, or raises `ReadError`.
    """

    path: str
    """The directory, for errors."""
    readers: int
    """Number of reads that are worth having in flight."""
    reads_ahead: bool
    """Whether the storage reads ahead of each open file. Then each thread opens its own."""
    prefers_large_reads: bool
    """Whether each read costs a request, so that few large reads beat many small ones."""

    @abstractmethod
    def open(self, name: str) -> InputFile:
        """Open a regular file.

        Raises:
            ReadError: If it is not there, or the storage refuses to open it.
            CorruptCheckpointError: If the name is not one of this directory, leads out of it by a
                link, or is the name of something else: a directory, a pipe.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of what lies in the directory itself, without directories; sorted.

        Raises:
            ReadError: If the directory is not there, is a file, or cannot be listed.
        """

    @abstractmethod
    def tree(self) -> dict[str, int]:
        """Return the size of every file in the directory and below it, by name; sorted.

        Links to files count as files; links to directories are not followed. What is not a regular
        file, or has no known size, has the size -1.

        Raises:
            ReadError: If the directory is not there, is a file, or cannot be listed. Object stores
                have no empty directories: there, an empty one is not there.
        """

    @abstractmethod
    def below(self, name: str) -> InputFiles:
        """Return the files of a directory within this one; it need not exist."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether anything has this name: a directory or a broken link too, which `open` refuses.

        Raises:
            ReadError: If the storage does not say.
        """

    def read_whole(self, name: str, *, max_nbytes: int) -> bytes:
        """Return the content of a small file.

        Raises:
            ReadError: As `open`.
            CorruptCheckpointError: As `open`; also if the file has more than `max_nbytes` bytes.
        """
        with self.open(name) as file:
            if file.nbytes > max_nbytes:
                raise CorruptCheckpointError(
                    "a file is larger than one of its kind can be",
                    phase="read",
                    path=file.path,
                    expected=f"at most {max_nbytes} bytes",
                    found=f"{file.nbytes} bytes",
                )
            return file.read(0, file.nbytes)


def check_name(name: object, *, path: str) -> str:
    """Return a name from a checkpoint if it stays within its directory.

    A backslash counts as a separator, since some stores take it for one.

    Raises:
        CorruptCheckpointError: If it is absolute, climbs, is empty or cannot be printed.
    """
    if isinstance(name, str):
        parts = name.replace("\\", "/").split("/")
        if name and not {"", ".", ".."}.intersection(parts) and name.isprintable():
            return name
    raise CorruptCheckpointError(
        "a checkpoint names a file outside its directory",
        phase="read",
        path=path,
        expected="a relative path without '.' and '..'",
        found=ascii(name)[:200],
    )


def ends_too_early(path: str, expected_nbytes: int, found: str) -> ReadError:
    """Return the error for a file that has fewer bytes than a read needs."""
    return ReadError(
        "a file ends too early",
        phase="read",
        path=path,
        expected=f"at least {expected_nbytes} bytes",
        found=found,
        hint="it was cut off, or changed while it was read",
    )


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turn the operating system's errors on `path` into `ReadError`, with number and advice.

    A backend whose client raises anything but `OSError` turns that into `OSError` first.
    """
    try:
        yield
    except (ReadError, CorruptCheckpointError):
        raise
    except OSError as error:
        number = _number_of(error)
        raise ReadError(
            "the storage refused a read",
            phase="read",
            path=path,
            found=f"{errno.errorcode.get(number or 0, type(error).__name__)}: "
            f"{error.strerror or error}",
            errno=number,
            hint=_ADVICE.get(number or 0),
        ) from error


def _number_of(error: OSError) -> int | None:
    """Return the number of an error; fsspec raises many of them without one."""
    if error.errno is not None:
        return error.errno
    return next((number for kind, number in _NUMBERS.items() if isinstance(error, kind)), None)


_NUMBERS: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
    PermissionError: errno.EACCES,
}

_ADVICE = {
    errno.ENOENT: "is this the path of a checkpoint?",
    errno.ENOTDIR: "is this the path of a checkpoint?",
    errno.EACCES: "it is not readable by this user",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the device may be failing; read another copy",
}
