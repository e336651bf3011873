"""A file that may already hold bytes which a save is about to write: compare them, clone them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

    from dcp_hf_writer.storage.posix_outputs import OutputFile

# One comparison reads at most this many bytes. They fit into the cache of a processor, so the
# comparison itself costs little more than the read.
_PIECE_NBYTES = 256 << 10


class StoredCopy:
    """One file, open for reading. Not thread-safe."""

    def __init__(self, path: str) -> None:
        """Open a file.

        Raises:
            OSError: If it cannot be opened; a symbolic link cannot.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._piece = bytearray(_PIECE_NBYTES)

    def holds(self, data: memoryview, offset: int) -> bool:
        """Whether the file holds some bytes at an offset; reads up to the first difference.

        Args:
            data: The bytes.
            offset: Where the first one is expected in the file.

        Raises:
            OSError: If the file cannot be read.
        """
        for start in range(0, data.nbytes, _PIECE_NBYTES):
            part = data[start : start + _PIECE_NBYTES]
            if self._read(part.nbytes, offset + start) != part:
                return False
        return True

    def _read(self, nbytes: int, offset: int) -> bytearray:
        """Return bytes of the file, fewer at its end; valid until the next call."""
        done, into = 0, memoryview(self._piece)[:nbytes]
        while done < nbytes:
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if not count:
                break
            done += count
        # A bytearray compares itself with other memory at the speed of memory; a memoryview is far
        # slower. The piece itself is compared without a copy.
        return self._piece if done == _PIECE_NBYTES else self._piece[:done]

    def clone(self, start: int, nbytes: int, into: OutputFile) -> None:
        """Let another file share disk blocks with this one, at the same offset.

        Args:
            start: First byte, a multiple of the block size of the file system.
            nbytes: How many bytes, a multiple of the block size.
            into: The other file.

        Raises:
            WriteError: If the file system cannot clone; see `block_clones.CANNOT_CLONE`.
        """
        into.clone(self._fd, start, nbytes, start)

    def copy(self, start: int, nbytes: int, into: OutputFile) -> None:
        """Write bytes of this file to the same offset of another file.

        Args:
            start: First byte.
            nbytes: How many bytes; this file has them.
            into: The other file.

        Raises:
            OSError: If this file cannot be read.
            WriteError: If the file system refuses the write.
        """
        for at in range(start, start + nbytes, _PIECE_NBYTES):
            part = self._read(min(_PIECE_NBYTES, start + nbytes - at), at)
            into.write(memoryview(part), at)

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
