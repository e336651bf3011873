"""The page cache: what the kernel keeps in memory of files that were read or written."""

from __future__ import annotations

import os
import stat


def drop_from_page_cache(path: str) -> None:
    """Let the kernel use the memory that keeps a file's content; the file does not change.

    Pages that are not on the device yet stay, and so do pages that a process has mapped. A file
    with several names stays too: the other name may belong to a newer checkpoint.

    Args:
        path: The file. If it is gone, or is no regular file, nothing happens.

    Raises:
        OSError: If the file cannot be opened, or the kernel refuses.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
