"""Look at bytes of a file where the page cache holds them, without a copy.

If the disk fails under a mapping, or the file is cut off, a signal ends the process. So only pages
that are in memory already are looked at, and only in file systems whose files no other host can
cut; anything else is read.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch

from dcp_hf_writer.storage._libc import cached_pages

FILE_SYSTEMS = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs"})
"""Those of this host alone, by the kernel's names."""

WINDOW_NBYTES = 16 << 20
"""What is mapped at once: other threads stop each time that a mapping ends."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a file, mapped for as long as somebody holds it or what it lends."""

    start: int
    """First byte, at the start of a page."""
    data: torch.Tensor
    """uint8, one-dimensional; not to be written to."""

    def covers(self, start: int, nbytes: int) -> bool:
        """Whether a range of the file is mapped."""
        return self.start <= start and start + nbytes <= self.start + self.data.numel()

    def lend(self, start: int, nbytes: int) -> torch.Tensor:
        """Return a range of the file that is mapped."""
        return self.data[start - self.start :][:nbytes]


def is_cached(fd: int, start: int, nbytes: int) -> bool:
    """Whether a range of a file is in memory; `False` if the system does not tell."""
    first = start - start % mmap.PAGESIZE
    span = start + nbytes - first
    return cached_pages(fd, first, span) >= -(-span // mmap.PAGESIZE)


def open_window(fd: int, start: int, nbytes: int, *, file_nbytes: int) -> Window | None:
    """Map a range of a file, and some of what follows.

    Args:
        fd: The open file.
        start: First byte.
        nbytes: How many; at least 1, and not beyond the end of the file.
        file_nbytes: Size of the file.

    Returns:
        `None` if there is no memory for the mapping, or if the file is shorter now.
    """
    first = start - start % mmap.PAGESIZE
    stop = max(start + nbytes, min(first + WINDOW_NBYTES, file_nbytes))
    # Writable pages of our own are what torch takes without a warning; none is ever made.
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        pages = mmap.mmap(fd, stop - first, mmap.MAP_PRIVATE, protection, offset=first)
    except (OSError, ValueError):
        return None
    return Window(first, torch.frombuffer(pages, dtype=torch.uint8))
