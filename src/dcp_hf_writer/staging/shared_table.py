"""Bytes that a process shows to other processes of its host, in a memory file without a name.

Through the store of the process group, they would travel to its host and back for every rank.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from dcp_hf_writer.staging.memory_files import memory_file, open_of_process

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TablePlace:
    """Where other processes of the host find the bytes. Plain values: it travels as JSON."""

    pid: int
    """Process that shows them."""
    fd: int
    """Its descriptor of the memory file."""
    nbytes: int
    """How many bytes there are."""
    digest: str
    """Their xxh3_64, in hex: a container may have another process of that number."""


@contextmanager
def shared_table(data: bytes) -> Iterator[TablePlace | None]:
    """Show bytes to other processes for as long as the `with` block lasts.

    Yields:
        Where they are; `None` if this system does not let the process make a memory file.
    """
    try:
        fd = memory_file("dcp-hf-columns", data)
    except OSError as error:
        _log.info("could not make a memory file of %d bytes: %s", len(data), error)
        yield None
        return
    try:
        yield TablePlace(os.getpid(), fd, len(data), xxhash.xxh3_64_hexdigest(data))
    finally:
        os.close(fd)


def read_table(place: TablePlace) -> bytes:
    """Return the bytes that another process of this host shows.

    Raises:
        OSError: If this process may not read them, or something else is in their place.
    """
    fd = open_of_process(place.pid, place.fd, os.O_RDONLY)
    with open(fd, "rb", buffering=0) as file:
        data = file.read(place.nbytes) if os.fstat(file.fileno()).st_size == place.nbytes else b""
    if xxhash.xxh3_64_hexdigest(data) != place.digest:
        msg = f"process {place.pid} here is not the rank that told its columns"
        raise OSError(errno.ESTALE, msg)
    return data
