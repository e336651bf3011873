"""Memory files without a name: make one, and open one of another process of the host."""

from __future__ import annotations

import os


def memory_file(name: str, data: bytes) -> int:
    """Return a descriptor of a new memory file with some content; the caller closes it.

    Raises:
        OSError: If this system does not let the process make one, or there is no memory for it.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_of_process(pid: int, fd: int, access: int) -> int:
    """Open the file behind a descriptor of another process; the caller closes the new descriptor.

    In another pid namespace, that process has another number, and anything may be there, such as a
    pipe that nobody writes to. So this never waits, and the caller checks what it got.

    Args:
        pid: The process.
        fd: Its descriptor.
        access: `os.O_RDONLY` or `os.O_RDWR`.

    Raises:
        OSError: If this process may not open it, or there is nothing.
    """
    return os.open(f"/proc/{pid}/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
