"""The mark at the end of a slab: which slab it is, and how often it was given to a save.

Other processes map the slab too. The mark tells a reader whether it reads what it was told about:
the same slab, in the same turn. A save writes over the content only after the turn was counted.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap

_MARK = struct.Struct("@16sQ")


def file_nbytes(nbytes: int) -> int:
    """Return the size of the memory file of a slab of `nbytes` bytes: the mark included."""
    return nbytes + _MARK.size


def set_mark(memory: mmap.mmap, nbytes: int, slab_id: str, turn: int) -> None:
    """Write the mark.

    Args:
        memory: A mapping of the whole memory file.
        nbytes: Size of the slab.
        slab_id: Id of the slab, 32 hexadecimal digits.
        turn: How often the slab was given to a save.
    """
    _MARK.pack_into(memory, nbytes, bytes.fromhex(slab_id), turn)


def turn_in(memory: mmap.mmap, nbytes: int, slab_id: str) -> int | None:
    """Return how often a slab was given to a save; `None` if the memory is another slab.

    Args:
        memory: A mapping of the whole memory file.
        nbytes: Size of the slab.
        slab_id: Id of the slab.
    """
    found, turn = _MARK.unpack_from(memory, nbytes)
    return int(turn) if found == bytes.fromhex(slab_id) else None
