"""The slabs of other ranks of the same host, mapped to read what they have staged.

A slab is a memory file without a name. Its owner tells its process id and descriptor; on the same
host, /proc leads from these to the file. The inode tells whether it is the file that was meant: a
container may have a process of the same number.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.errors import StagingError

if TYPE_CHECKING:
    from dcp_hf_writer.staging.slab import Slab
    from dcp_hf_writer.tensors.boxes import Shape


@dataclass(frozen=True, slots=True)
class SlabPlace:
    """Where another process of the host finds a slab. Plain values: it travels as JSON."""

    pid: int
    """Process that has the slab."""
    fd: int
    """Its descriptor of the slab."""
    inode: int
    """Inode of the slab's memory file."""
    nbytes: int
    """Size of the slab."""

    @classmethod
    def of(cls, slab: Slab) -> SlabPlace:
        """Return the place of a slab of this process."""
        return cls(os.getpid(), slab.fd, os.fstat(slab.fd).st_ino, slab.nbytes)


class NeighbourSlabs:
    """Maps slabs of other processes, and keeps the mappings from save to save."""

    def __init__(self) -> None:
        """Start without a mapping."""
        self._maps: dict[SlabPlace, mmap.mmap] = {}

    def keep_only(self, places: set[SlabPlace]) -> None:
        """Drop the mappings of all other slabs: their owners have replaced them."""
        for place in self._maps.keys() - places:
            del self._maps[place]

    def open(self, place: SlabPlace) -> None:
        """Map a slab for reading, if it is not mapped already.

        Raises:
            OSError: If this process may not read it, or it is not there.
            StagingError: If another file is in its place.
        """
        if place in self._maps:
            return
        fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if (found.st_ino, found.st_size) != (place.inode, place.nbytes):
                raise StagingError(
                    "another file is in the place of a rank's staging memory",
                    phase="write",
                    expected=f"inode {place.inode} of {place.nbytes} bytes",
                    found=f"inode {found.st_ino} of {found.st_size} bytes",
                    hint="the ranks run in different containers; set nothing: they write apart",
                )
            # torch wants writable memory. Nobody writes into it.
            self._maps[place] = mmap.mmap(fd, place.nbytes)
        finally:
            os.close(fd)

    def view(
        self, place: SlabPlace, *, offset: int, dtype: torch.dtype, extents: Shape, strides: Shape
    ) -> torch.Tensor:
        """Return a view of elements in a slab that `open` has mapped.

        Args:
            place: The slab.
            offset: Its byte at which the first element begins.
            dtype: Dtype of the elements.
            extents: Extents of the view.
            strides: Strides of the view, in elements; not negative.
        """
        last = sum((n - 1) * s for n, s in zip(extents, strides, strict=True))
        flat = torch.frombuffer(self._maps[place], dtype=dtype, count=last + 1, offset=offset)
        return flat.as_strided(extents, strides)
