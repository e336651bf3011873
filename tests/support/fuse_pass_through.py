"""A program that shows a directory through FUSE; its client keeps written pages back.

`python fuse_pass_through.py <directory> <mount point>` serves the mount until it is unmounted. It
needs the Python package mfusepy, and libfuse 3, which mfusepy looks for itself or takes from
`FUSE_LIBRARY_PATH`.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import mfusepy

# FUSE_CAP_WRITEBACK_CACHE: the kernel keeps written pages and sends them later, whole.
_WRITEBACK_CACHE = 1 << 16


class PassThrough(mfusepy.Operations):  # type: ignore[misc]
    """Hands each operation on to the directory."""

    use_ns = True

    def __init__(self, back: str) -> None:
        self._back = back

    def init_with_config(self, conn: Any, config: Any) -> None:  # noqa: ARG002
        if not conn.capable & _WRITEBACK_CACHE:
            os._exit(3)
        conn.want |= _WRITEBACK_CACHE

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:  # noqa: ARG002
        stat = os.lstat(self._back + path)
        plain = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
        times = {name: getattr(stat, f"{name}_ns") for name in ("st_atime", "st_mtime")}
        return {name: getattr(stat, name) for name in plain} | times

    def access(self, path: str, mode: int) -> int:  # noqa: ARG002
        return 0

    def readdir(self, path: str, fh: Any) -> list[str]:  # noqa: ARG002
        return [".", "..", *os.listdir(self._back + path)]

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._back + path, mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._back + path)

    def unlink(self, path: str) -> None:
        os.unlink(self._back + path)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        if flags:
            raise mfusepy.FuseOSError(errno.EINVAL)
        os.rename(self._back + old, self._back + new)

    def truncate(self, path: str, length: int, fh: Any = None) -> None:  # noqa: ARG002
        os.truncate(self._back + path, length)

    def create(self, path: str, mode: int, fi: Any = None) -> int:  # noqa: ARG002
        return os.open(self._back + path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def open(self, path: str, flags: int) -> int:  # noqa: ARG002
        # The kernel reads a page before it changes a part of it, whatever the file is open for.
        return os.open(self._back + path, os.O_RDWR)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:  # noqa: ARG002
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:  # noqa: ARG002
        return os.pwrite(fh, data, offset)

    def flush(self, path: str, fh: int) -> int:  # noqa: ARG002
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:  # noqa: ARG002
        return 0

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._back + path, mode)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._back + path, ns=times)

    def release(self, path: str, fh: int) -> None:  # noqa: ARG002
        os.close(fh)

    def fsync(self, path: str, datasync: int, fh: int) -> None:  # noqa: ARG002
        os.fsync(fh)

    def statfs(self, path: str) -> dict[str, Any]:
        stat = os.statvfs(self._back + path)
        names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_files", "f_frsize")
        return {name: getattr(stat, name) for name in names}


if __name__ == "__main__":
    mfusepy.FUSE(PassThrough(sys.argv[1]), sys.argv[2], foreground=True, nothreads=True)
