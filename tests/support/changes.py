"""Kill a process at the n-th change that it makes to the storage."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.storage import linux_calls
from support.faults import path_of_call

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_EVENTS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
_CALLS = ("pwrite", "pwritev", "fsync", "ftruncate")
_LIBC_CALLS = ("renameat2", "fallocate64")


class Changes:
    """Counts what this process changes below a directory, and dies at one of these changes.

    For a process that ends soon: the counting cannot be taken out again.
    """

    def __init__(self, root: Path, *, die_at: int) -> None:
        self._root, self._die_at = str(root), die_at
        self._count = 0
        self._lock = threading.Lock()
        self._pwrite = os.pwrite
        sys.addaudithook(self._audit)
        for name in _CALLS:
            setattr(os, name, self._counted(getattr(os, name), is_write=name.startswith("pwrite")))
        for name in _LIBC_CALLS:
            setattr(
                linux_calls._libc,
                name,
                self._counted(getattr(linux_calls._libc, name), is_write=False),
            )

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(args[0])
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        # The removal of a tree names its entries relative to a descriptor.
        if self._is_ours(path) or not os.path.isabs(path):
            self._tick()

    def _is_ours(self, path: str) -> bool:
        return path == self._root or path.startswith(f"{self._root}/")

    def _counted(self, real: Any, *, is_write: bool) -> Any:
        def counted(*args: Any) -> Any:
            if self._is_ours(path_of_call(args[:2])):
                self._tick()
                if is_write:
                    self._tick(lambda: self._write_half(*args))
            return real(*args)

        return counted

    def _tick(self, before: Callable[[], object] = lambda: None) -> None:
        with self._lock:
            self._count += 1
            if self._count == self._die_at:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

    def _write_half(self, fd: int, data: Any, offset: int) -> None:
        whole = bytes(data) if isinstance(data, memoryview) else b"".join(data)
        self._pwrite(fd, whole[: len(whole) // 2], offset)
