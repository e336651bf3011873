"""The contract of a backend for reading: one directory, and the files in it.

A backend is a subclass of `InputFiles` and one of `InputFile`, in a module of its own.
`open_directory` chooses the backend. `tests/support/input_conformance.py` tests every promise of
this module for every backend.

File names come from the checkpoint, which may be hostile. So a backend passes each name through
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
"""Largest number of buffers in one read; the limit of Linux (UIO_MAXIOV)."""


class InputFile(ABC):
    """One open file. Several threads may read from it at the same time.

    A backend need not support pickling, or use in a forked child.
    """

    path: str
    """Path of the file, for error messages."""
    nbytes: int
    """Its size in bytes when it was opened."""

    @abstractmethod
    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill all buffers, one after another, with the bytes of the file from `start` on.

        Args:
            buffers: Contiguous, writable memory; at most `MAX_BUFFERS` buffers. With no buffers,
                or only empty ones, nothing is read.
            start: Position of the first byte in the file; not negative.

        Raises:
            ReadError: If the file is too short to fill all buffers, now or when it was opened, or
                if the storage refuses the read. The content of the buffers is then undefined.
        """

    def read(self, start: int, nbytes: int) -> bytes:
        """Return `nbytes` bytes from `start` on. The caller limits `nbytes`: all are in memory.

        Raises:
            ReadError: As `read_into`.
        """
        data = bytearray(nbytes)
        if nbytes:
            self.read_into([memoryview(data)], start)
        return bytes(data)

    def check_range(self, start: int, nbytes: int) -> None:
        """Refuse a read past the end of the file. Backends call this in `read_into`.

        Raises:
            ReadError: If the file had fewer than `start + nbytes` bytes when it was opened.
        """
        if nbytes and start + nbytes > self.nbytes:
            raise ends_too_early(self.path, start + nbytes, f"{self.nbytes} bytes")

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Release the resources of the open file; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InputFiles(ABC):
    """The files of one directory. Thread-safe; the object itself keeps no file open.

    A name is a path within the directory, with `/` between its parts. Every method that takes a
    name raises `CorruptCheckpointError` if it is absolute, has a part `.` or `..`, is empty, or has
    unprintable characters.

    Every call sees the files that another process has added or removed since the last call. If an
    open file is removed, reads from it either still work or raise `ReadError`.
    """

    path: str
    """Path of the directory, for error messages."""
    readers: int
    """Number of concurrent reads that is useful; more do not make reading faster."""
    reads_ahead: bool
    """Whether the storage reads ahead in each open file. If so, each thread opens its own."""
    prefers_large_reads: bool
    """Whether each read costs a request, so that few large reads beat many small ones."""

    @abstractmethod
    def open(self, name: str) -> InputFile:
        """Open a regular file.

        Raises:
            ReadError: If the file does not exist, or the storage refuses to open it.
            CorruptCheckpointError: If the name is invalid, if a link leads out of the directory,
                or if the entry is not a regular file but, for example, a directory or a pipe.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """Return the sorted names of all entries of the directory itself that are not directories.

        Raises:
            ReadError: If the directory does not exist, is a file, or cannot be listed.
        """

    @abstractmethod
    def tree(self) -> dict[str, int]:
        """Return the size of every file in the directory and below it, by name; sorted.

        Links to files count as files; links to directories are not followed. An entry that is not a
        regular file, or whose size is unknown, has the size -1.

        Raises:
            ReadError: If the directory does not exist, is a file, or cannot be listed. On an object
                store, an empty directory does not exist.
        """

    @abstractmethod
    def below(self, name: str) -> InputFiles:
        """Return the files of the directory `name` within this one; it need not exist."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether an entry of this name exists, even one that `open` refuses, such as a directory.

        Raises:
            ReadError: If the storage cannot tell.
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
                    "a file is larger than a file of its kind may be",
                    phase="read",
                    path=file.path,
                    expected=f"at most {max_nbytes} bytes",
                    found=f"{file.nbytes} bytes",
                )
            return file.read(0, file.nbytes)


def check_name(name: object, *, path: str) -> str:
    """Return a name from a checkpoint if it stays within its directory.

    A backslash counts as a separator, because some stores treat it as one.

    Raises:
        CorruptCheckpointError: If the name is absolute, has a part `.` or `..`, is empty, or has
            unprintable characters.
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
        hint="it was cut off, or changed during the read; read another copy",
    )


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turn the operating system's errors on `path` into `ReadError`, with error number and advice.

    If the client library of a backend raises other errors, the backend first turns them into
    `OSError`.
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
    """Return the error number, from the class if it is not set: fsspec often does not set it."""
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
    errno.EACCES: "this user may not read it",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the device may be failing; read another copy",
}
