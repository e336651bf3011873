"""Look at bytes of a file where the page cache holds them, without a copy.

If the disk fails under a mapping, or the file is cut off, a signal ends the process. So only pages
that are in memory already are looked at, and only in file systems whose files no other host can
cut; anything else is read.
"""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.storage._libc import cached_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_SYSTEMS = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs"})
"""Those of this host alone, by the kernel's names."""


@contextmanager
def cached_bytes(fd: int, start: int, nbytes: int) -> Iterator[torch.Tensor | None]:
    """Lend bytes of a file in place; `None` if not all of them are in memory.

    Args:
        fd: The open file.
        start: First byte.
        nbytes: How many; at least 1, and not beyond the end of the file.

    Yields:
        uint8 of shape `(nbytes,)`, not to be kept, nor written to.
    """
    first = start - start % mmap.PAGESIZE
    span = start + nbytes - first
    if cached_pages(fd, first, span) < -(-span // mmap.PAGESIZE):
        yield None
        return
    # Writable pages of our own are what torch takes without a warning; none is ever made.
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        pages = mmap.mmap(fd, span, mmap.MAP_PRIVATE, protection, offset=first)
    except (OSError, ValueError):
        # There is no memory for the mapping, or the file is shorter now: a read will tell.
        yield None
        return
    with pages:
        found = torch.frombuffer(pages, dtype=torch.uint8)
        yield found[start - first :]
        # What looks at a mapping keeps it from being closed.
        del found
