"""The slabs of other ranks of the same host, mapped for one save to read what they have staged.

A slab is a memory file without a name. Its owner tells its process id and descriptor; on the same
host, /proc leads from these to the file. A container may have another process of that number: the
mark at the end of the slab tells whether it is the slab that was meant.
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.errors import SaveAbortedError
from dcp_hf_writer.staging.memory_files import open_of_process
from dcp_hf_writer.staging.slab_mark import file_nbytes, turn_in

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

    from dcp_hf_writer.staging.slab import Slab
    from dcp_hf_writer.tensors.boxes import Shape


@dataclass(frozen=True, slots=True)
class SlabPlace:
    """Where other processes of the host find a slab. Plain values: it travels as JSON."""

    pid: int
    """Process that has the slab."""
    fd: int
    """Its descriptor of the slab."""
    nbytes: int
    """Size of the slab, in bytes."""
    slab_id: str
    """Id of the slab."""
    turn: int
    """How often the slab was given to a save, this one included."""

    @classmethod
    def of(cls, slab: Slab) -> SlabPlace:
        """Return the place of a slab of this process."""
        return cls(os.getpid(), slab.fd, slab.nbytes, slab.slab_id, slab.turn)


class NeighbourSlabs:
    """Slabs that this process maps during one save; a context manager that unmaps them."""

    def __init__(self) -> None:
        """Start without a mapping."""
        self._maps: dict[SlabPlace, mmap.mmap] = {}

    def open(self, places: Iterable[SlabPlace]) -> None:
        """Map slabs for reading.

        Raises:
            OSError: If this process may not read one, or something else is in its place.
        """
        for place in places:
            if place not in self._maps:
                self._maps[place] = _mapped(place)

    def view(
        self, place: SlabPlace, *, offset: int, dtype: torch.dtype, extents: Shape, strides: Shape
    ) -> torch.Tensor:
        """Return a view of elements in a mapped slab; it must be dropped before `close`.

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

    def check_turns(self) -> None:
        """Check that no slab was given to another save since its owner told where it is.

        A rank may leave a save before the others: at its deadline, or when its process group
        broke. Its next save then writes over what this save reads.

        Raises:
            SaveAbortedError: If a slab was given to another save.
        """
        for place, memory in self._maps.items():
            turn = turn_in(memory, place.nbytes, place.slab_id)
            if turn != place.turn:
                raise SaveAbortedError(
                    "the staging memory of another rank no longer holds what this save reads",
                    phase="write",
                    expected=f"slab {place.slab_id[:8]} of process {place.pid}, "
                    f"as filled for save {place.turn} of that process",
                    found="another file" if turn is None else f"filled for save {turn}",
                    hint="that rank left this save; its error says why",
                )

    def close(self) -> None:
        """Unmap everything. Safe to call twice.

        A view that is left, in the frames of an error, keeps its slab mapped until it is freed.
        """
        # Not `mmap.close`: torch's views hold the object, but do not keep it from being closed.
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped(place: SlabPlace) -> mmap.mmap:
    fd = open_of_process(place.pid, place.fd, os.O_RDWR)
    try:
        expected = file_nbytes(place.nbytes)
        if os.fstat(fd).st_size != expected:
            raise _stale(place)
        # torch warns about memory that it may not write to. Nobody writes into this.
        memory = mmap.mmap(fd, expected)
    finally:
        os.close(fd)
    if turn_in(memory, place.nbytes, place.slab_id) != place.turn:
        memory.close()
        raise _stale(place)
    return memory


def _stale(place: SlabPlace) -> OSError:
    msg = f"process {place.pid} here is not the rank that told its staging memory"
    return OSError(errno.ESTALE, msg)
