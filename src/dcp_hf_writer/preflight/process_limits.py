"""Look whether this process can still open what a save opens: files, and shared memory of torch."""

from __future__ import annotations

import errno
import os
import resource

from dcp_hf_writer.errors import StagingError

BASE_FILES = 32
"""Descriptors of a save beside the files of the export: memory file, record, heartbeat, slot, DCP
file, listings, pipes of a checkpointer process. A test saves with no more than these."""

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where the C library puts semaphores
SEMAPHORES_NBYTES = 1 << 20
"""Shared memory that torch's checkpointer process needs for the semaphores of its queues."""


def check_descriptors(needed: int, *, what: str, rank: int | None = None) -> None:
    """Check that this process can open some more files.

    Args:
        needed: Number of descriptors.
        what: What needs them, for the message.
        rank: This rank, for the message.

    Raises:
        StagingError: If the limit on open files is too low.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return
    used = _open_files(limit)
    if limit - used < needed:
        raise StagingError(
            "this process may open too few files",
            rank=rank,
            phase="stage",
            expected=f"{needed} free file descriptors for {what}",
            found=f"{limit - used}: {used} of {limit} are open",
            hint="raise the limit on open files (ulimit -n), or close files",
            errno=errno.EMFILE,
        )


def _open_files(limit: int) -> int:
    try:
        # One of them lists the others. The limit is on the numbers: those above it do not count.
        return sum(int(fd) < limit for fd in os.listdir("/proc/self/fd")) - 1
    except OSError as error:
        if error.errno not in {errno.EMFILE, errno.ENFILE}:
            raise StagingError(
                "the kernel does not tell the open files of this process",
                phase="stage",
                path="/proc/self/fd",
                found=error.strerror,
                errno=error.errno,
            ) from error
        return limit


def check_semaphores(directory: str = SHARED_MEMORY, *, rank: int | None = None) -> None:
    """Check that there is shared memory for the queues of torch's checkpointer process.

    The staged copy does not need it: it lies in a memory file of its own.

    Args:
        directory: Where the C library puts semaphores.
        rank: This rank, for the message.

    Raises:
        StagingError: If there is too little, or none.
    """
    try:
        stat = os.statvfs(directory)
        free, files = stat.f_bavail * stat.f_frsize, stat.f_favail
        found = f"{free} bytes and {files} files free"
    except OSError as error:
        free, files, found = 0, 0, f"{error.strerror}"
    if free < SEMAPHORES_NBYTES or files == 0:
        raise StagingError(
            "there is too little shared memory for torch's checkpointer process",
            rank=rank,
            phase="stage",
            path=directory,
            expected=f"{SEMAPHORES_NBYTES} bytes free, for the semaphores of its queues",
            found=found,
            hint='enlarge it (docker run --shm-size), or pass checkpointer="thread"',
            errno=errno.ENOSPC,
        )
