"""Files of a checkpoint, open for reading: the contract of the stores that hold them.

Names come from the checkpoint itself, so they are not believed: none leads out of the directory,
also not through a symbolic link, and only regular files are opened.
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
    """One open file; reads may run in several threads at a time."""

    path: str
    """Where it is, for errors."""
    nbytes: int
    """Its size when it was opened."""

    @abstractmethod
    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill buffers, at most `MAX_BUFFERS`, one after another from `start` on.

        Raises:
            ReadError: If the storage refuses, or the file has become shorter.
        """

    def read(self, start: int, nbytes: int) -> bytes:
        """Return bytes of the file; the caller bounds how many.

        Raises:
            ReadError: As `read_into`.
        """
        data = bytearray(nbytes)
        if nbytes:
            self.read_into([memoryview(data)], start)
        return bytes(data)

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Give back what the open file holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InputFiles(ABC):
    """The files of one directory; thread-safe."""

    path: str
    """The directory, for errors."""
    readers: int
    """Number of reads that are worth having in flight."""
    reads_ahead: bool
    """Whether an open file is read ahead of one reader, so that each thread wants its own."""

    @abstractmethod
    def open(self, name: str) -> InputFile:
        """Open a file.

        Args:
            name: Its path within the directory, as some file of the checkpoint has it.

        Raises:
            ReadError: If it is not there, or cannot be opened.
            CorruptCheckpointError: If the name leads elsewhere.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the files that lie in the directory itself, sorted.

        Raises:
            ReadError: If the directory cannot be listed.
        """

    @abstractmethod
    def below(self, name: str) -> InputFiles:
        """Return the files of a directory within this one; it need not exist."""

    def has(self, name: str) -> bool:
        """Whether a file of this name lies in the directory."""
        return name in self.names()

    def read_whole(self, name: str, *, max_nbytes: int) -> bytes:
        """Return the content of a small file.

        Raises:
            ReadError: As `open`.
            CorruptCheckpointError: If it is larger than such a file can be.
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

    Raises:
        CorruptCheckpointError: If it is absolute, or climbs.
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


def ended(path: str, expected: int, found: int) -> ReadError:
    """Return what to raise when a file has fewer bytes than it had."""
    return ReadError(
        "a file ends too early",
        phase="read",
        path=path,
        expected=f"at least {expected} bytes",
        found=f"{found} bytes",
        hint="it was cut off, or changed while it was read",
    )


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turn the storage's errors on `path` into ours, with number and advice."""
    try:
        yield
    except (ReadError, CorruptCheckpointError):
        raise
    except OSError as error:
        raise ReadError(
            "the storage refused a read",
            phase="read",
            path=path,
            found=f"{errno.errorcode.get(error.errno or 0, type(error).__name__)}: "
            f"{error.strerror or error}",
            errno=error.errno,
            hint=_ADVICE.get(error.errno or 0),
        ) from error


_ADVICE = {
    errno.ENOENT: "is this the path of a checkpoint?",
    errno.ENOTDIR: "is this the path of a checkpoint?",
    errno.EACCES: "it is not readable by this user",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the device may be failing; read another copy",
}
