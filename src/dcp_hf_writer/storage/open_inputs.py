"""The files that a load has open: threads share them, and surplus idle files are closed."""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from dcp_hf_writer.storage.input_contract import InputFile, InputFiles

# By default a process may have 1024 files open, and it needs some for other purposes.
_MAX_IDLE = 128


class OpenInputs:
    """Open files by name. Thread-safe; a context manager that closes all files at its end."""

    def __init__(self, files: InputFiles) -> None:
        """Open no file yet: `use` opens a file at its first use."""
        self.files = files
        self._lock = threading.Lock()
        self._open: dict[str, InputFile] = {}
        self._users: dict[str, int] = {}

    @contextmanager
    def use(self, name: str) -> Iterator[InputFile]:
        """Lend the open file `name` for the body of the `with` statement.

        Raises:
            ReadError: If the file cannot be opened.
            CorruptCheckpointError: If the name leads out of the directory.
        """
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = self._opened(name)
            self._users[name] = self._users.get(name, 0) + 1
        try:
            yield file
        finally:
            self._give_back(name)

    def _opened(self, name: str) -> InputFile:
        try:
            return self.files.open(name)
        except ReadError as error:
            if error.errno != errno.ENOENT:
                raise
            msg = "a file of the checkpoint is missing"
            raise ReadError(
                msg,
                phase="read",
                path=error.path,
                expected="every file that the metadata or the index names",
                found="nothing of this name",
                errno=error.errno,
                hint="the checkpoint is incomplete: copy it again, or load another one; "
                "verify(path) lists all that is missing",
            ) from error

    def _give_back(self, name: str) -> None:
        with self._lock:
            self._users[name] -= 1
            if len(self._open) <= _MAX_IDLE:
                return
            # Close the file that was opened first: a load reads files one after another, so it is
            # the least likely to be read again.
            idle = next((one for one in self._open if not self._users[one]), None)
            file = None if idle is None else self._open.pop(idle)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close all files. The caller makes sure that none is in use."""
        with self._lock:
            files, self._open = list(self._open.values()), {}
        for file in files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
