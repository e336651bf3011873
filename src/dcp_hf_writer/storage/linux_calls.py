"""System calls of Linux that Python does not offer."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_FICLONERANGE = 0x4020940D

# Numbers of ioprio_set(2), which has no function in the C library, by `os.uname().machine`. The
# number of ioprio_get(2) is the next one on each of these machines.
_IOPRIO_SET = {
    "x86_64": 251,
    "aarch64": 30,
    "riscv64": 30,
    "loongarch64": 30,
    "ppc64le": 273,
    "s390x": 282,
}
_IOPRIO_WHO_PROCESS = 1
_LOWEST_BEST_EFFORT = 2 << 13 | 7
_IDLE_CLASS = 3

_libc = ctypes.CDLL(None, use_errno=True)


class UnsupportedCallError(OSError):
    """The kernel, the C library or the file system does not support the call."""


_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})


def reserve(fd: int, nbytes: int) -> None:
    """Reserve space for the first `nbytes` of a file; its size grows with it.

    This uses the system call. `os.posix_fallocate` uses the C library instead: on a file system
    without support, the C library writes a byte into every block, which races with other writers.

    Raises:
        UnsupportedCallError: If the file system does not support the call.
        OSError: If there is no space.
    """
    call = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
    if call is None:
        raise UnsupportedCallError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            _fail(number, None)


def clone_range(source: int, start: int, nbytes: int, fd: int, offset: int) -> None:
    """Let a file share disk blocks with a range of another file (reflink).

    The kernel first writes the range of the source to the disk.

    Args:
        source: Descriptor of the file to share with, open for reading.
        start: First byte of the range, a multiple of the block size of the file system.
        nbytes: Length of the range, a multiple of the block size.
        fd: Descriptor of the other file, open for writing.
        offset: Where the range goes in it, a multiple of the block size.

    Raises:
        OSError: If the file system cannot clone this range.

    Source:
        ioctl_ficlonerange(2).
    """
    fcntl.ioctl(fd, _FICLONERANGE, struct.pack("qQQQ", source, start, nbytes, offset))


def lower_io_priority() -> None:
    """Give the calling thread, and threads that it starts, the lowest of the usual I/O priorities.

    The block device must have a scheduler that heeds priorities, such as BFQ. A thread of the class
    for idle devices (`ionice -c 3`) keeps it. This function does not choose that class: a save
    would not end while training reads.

    Raises:
        UnsupportedCallError: If this package does not know the call on this kind of processor, or
            the kernel does not.
        OSError: If a sandbox forbids it.

    Source:
        ioprio_set(2).
    """
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is None:
        raise UnsupportedCallError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    found = _libc.syscall(ctypes.c_long(number + 1), _IOPRIO_WHO_PROCESS, 0)
    if found >> 13 == _IDLE_CLASS:
        return
    call = ctypes.c_long(number)
    if _libc.syscall(call, _IOPRIO_WHO_PROCESS, 0, _LOWEST_BEST_EFFORT) != 0:
        _fail(ctypes.get_errno(), None)


def rename_no_replace(source: str, target: str) -> None:
    """Rename a file or directory; an existing target, even an empty directory, is an error.

    Raises:
        UnsupportedCallError: If the file system does not support the call.
        FileExistsError: If the target exists.
        OSError: If the rename fails.
    """
    _renameat2(source, target, _RENAME_NOREPLACE)


def exchange(one: str, other: str) -> None:
    """Swap two names in one step; both must exist.

    Raises:
        UnsupportedCallError: If the file system does not support the call.
        OSError: If the rename fails.
    """
    _renameat2(one, other, _RENAME_EXCHANGE)


def _renameat2(source: str, target: str, flags: int) -> None:
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise UnsupportedCallError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    result = call(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)
    )
    if result != 0:
        _fail(ctypes.get_errno(), target)


def _fail(number: int, path: str | None) -> None:
    kind = UnsupportedCallError if number in _UNSUPPORTED else OSError
    # OSError itself picks a class such as FileExistsError by number; a subclass of it does not.
    raise kind(number, os.strerror(number), path)
