"""The files that a load has open: each is opened once, and few at a time."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from dcp_hf_writer.storage.input_contract import InputFile, InputFiles

# A process may have 1024 open by default, and has others.
_MAX_IDLE = 128


class OpenInputs:
    """Open files by name; thread-safe. A context manager that closes what is left."""

    def __init__(self, files: InputFiles) -> None:
        """Open files of a directory when they are first used."""
        self.files = files
        self._lock = threading.Lock()
        self._open: dict[str, InputFile] = {}
        self._users: dict[str, int] = {}

    @contextmanager
    def use(self, name: str) -> Iterator[InputFile]:
        """Lend an open file.

        Raises:
            ReadError: If it cannot be opened.
            CorruptCheckpointError: If the name leads out of the directory.
        """
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = self.files.open(name)
            self._users[name] = self._users.get(name, 0) + 1
        try:
            yield file
        finally:
            self._give_back(name)

    def _give_back(self, name: str) -> None:
        with self._lock:
            self._users[name] -= 1
            if len(self._open) <= _MAX_IDLE:
                return
            # The one that has been open for longest: files are read one after another.
            idle = next((one for one in self._open if not self._users[one]), None)
            file = None if idle is None else self._open.pop(idle)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close all files; nobody may use one."""
        with self._lock:
            files, self._open = list(self._open.values()), {}
        for file in files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
