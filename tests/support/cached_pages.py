"""How much of a file the page cache holds."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.storage.posix_outputs import file_system_type

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_WAIT_S = 30.0


def cached_nbytes(path: Path) -> int:
    """Return the bytes of a file that are in the page cache, in whole pages (mincore(2))."""
    nbytes = path.stat().st_size
    if not nbytes:
        return 0
    pages = -(-nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), nbytes) as memory:
        start = ctypes.c_char.from_buffer(memory)
        where = ctypes.c_void_p(ctypes.addressof(start))
        result = _libc.mincore(where, ctypes.c_size_t(nbytes), found)
        number = ctypes.get_errno()
        del start
    assert result == 0, os.strerror(number)
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def require_page_cache(path: Path) -> None:
    """Skip a test whose files have no device that their pages could be read from again."""
    kind = file_system_type(str(path))
    if kind in ("tmpfs", "ramfs"):
        pytest.skip(f"{path} is on {kind}, which keeps its files in memory")


def wait_until_dropped(paths: Iterable[Path]) -> None:
    """Wait until the page cache holds nothing of some files; a save drops them in the background.

    Raises:
        AssertionError: If it still holds some after half a minute.
    """
    until = time.monotonic() + _WAIT_S
    for path in paths:
        while cached_nbytes(path):
            assert time.monotonic() < until, f"{path} is still in the page cache"
            time.sleep(0.01)
