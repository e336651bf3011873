"""Let files share disk blocks (reflinks), on file systems that can: XFS, btrfs, ZFS, NFS 4.2."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from typing import TYPE_CHECKING

from dcp_hf_writer.storage.linux_calls import clone_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.storage.posix_outputs import OutputFile

_log = logging.getLogger(__name__)

# Larger disk blocks would waste too much space in the gaps before archives.
_MAX_BLOCK_NBYTES = 1 << 20

# A clone may fail with one of these although a write would succeed.
CANNOT_CLONE = frozenset(
    {
        *(errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EPERM),
        *(errno.ENOSPC, errno.EDQUOT, errno.ETXTBSY, errno.EMLINK),
    }
)

# Output files that a rank clones from keep at most so many descriptors open.
_MAX_OPEN = 8


class CloneProbe:
    """Remembers, for each file system, whether files on it can share disk blocks."""

    def __init__(self) -> None:
        """Know no file system yet."""
        self._known: dict[int, int | None] = {}

    def block_nbytes(self, directory: str) -> int | None:
        """Return the size of a disk block that files in a directory can share.

        The first call for a file system clones one block between two files without names.

        Args:
            directory: Directory that this process may write to.

        Returns:
            The size in bytes; `None` if the file system cannot clone.
        """
        device = os.stat(directory).st_dev
        if device not in self._known:
            self._known[device] = _try_clone(directory)
        return self._known[device]


PROBE = CloneProbe()
"""What this process knows; a file system does not change while it is mounted."""


def _try_clone(directory: str) -> int | None:
    nbytes = os.statvfs(directory).f_bsize
    if not 512 <= nbytes <= _MAX_BLOCK_NBYTES or nbytes & (nbytes - 1):  # noqa: PLR2004
        return None
    data = os.urandom(nbytes)
    try:
        with (
            tempfile.TemporaryFile(dir=directory, buffering=0) as source,
            tempfile.TemporaryFile(dir=directory, buffering=0) as copy,
        ):
            source.write(bytes(nbytes) + data)
            clone_range(source.fileno(), nbytes, nbytes, copy.fileno(), 2 * nbytes)
            is_equal = os.pread(copy.fileno(), nbytes, 2 * nbytes) == data
    except OSError as error:
        _log.debug("files in %s cannot share disk blocks: %s", directory, error)
        return None
    return nbytes if is_equal else None


class CloneSource:
    """Clones ranges of files of this save into other files; keeps a few of them open."""

    def __init__(self, paths: Sequence[str], *, block_nbytes: int) -> None:
        """Start with no open file.

        Args:
            paths: Path of each output file, by its number.
            block_nbytes: Size of a disk block that the files can share.
        """
        self.block_nbytes = block_nbytes
        self.shared_nbytes = 0
        """Bytes that were cloned so far."""
        self._paths = paths
        self._open: dict[int, int] = {}
        self._can_clone = True

    def clone(self, number: int, start: int, nbytes: int, into: OutputFile, offset: int) -> bool:
        """Let `into` share bytes with an output file.

        Args:
            number: Number of the output file; the bytes were written to it before.
            start: Where the bytes start in it, a multiple of the block size.
            nbytes: How many, a multiple of the block size.
            into: File to clone into.
            offset: Where they go in it, a multiple of the block size.

        Returns:
            Whether the bytes are shared. If not, the caller writes them. After one refusal this
            object does not try again.

        Raises:
            WriteError: If the file system reports an error that a write would meet too.
        """
        if not self._can_clone:
            return False
        try:
            into.clone(self._descriptor(number), start, nbytes, offset)
        except OSError as error:
            if error.errno not in CANNOT_CLONE:
                raise
            self._can_clone = False
            _log.warning(
                "%s does not share disk blocks with the export, so the rest is written twice: %s",
                into.path,
                error,
            )
            return False
        self.shared_nbytes += nbytes
        return True

    def close(self) -> None:
        """Close the files that are still open."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[number] = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[number]
