"""Mounts that only the process sees that makes them, so that a failed test leaves none behind."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_CLONE_NEWNS = 0x00020000
_CLONE_FS = 0x00000200

# The command that makes a file system whose files can share disk blocks.
CLONING = {
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}

needs_mounts = pytest.mark.skipif(
    shutil.which("mount") is None
    or shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="`unshare -m true` fails here: a private mount namespace takes CAP_SYS_ADMIN",
)


@functools.cache
def why_not_image(fs_type: str) -> str | None:
    """Return why no image of a file system can be mounted here; `None` if one can."""
    if shutil.which(CLONING[fs_type][0]) is None:
        return f"{CLONING[fs_type][0]} is not installed"
    with tempfile.TemporaryDirectory() as directory:
        image = make_image(Path(directory) / "image", fs_type)
        tried = subprocess.run(
            ["unshare", "-m", "mount", "-o", "loop", str(image), directory],
            check=False,
            capture_output=True,
            text=True,
        )
    if tried.returncode == 0:
        return None
    return f"`unshare -m mount -o loop` of {fs_type} fails here: {tried.stderr.strip()}"


def make_image(path: Path, fs_type: str, *, mib: int = 512) -> Path:
    """Make a sparse file with an empty file system in it.

    Args:
        path: Path of the file.
        fs_type: A key of `CLONING`.
        mib: Its size; `mkfs.xfs` refuses less than 300 MiB.
    """
    with path.open("wb") as file:
        file.truncate(mib << 20)
    subprocess.run([*CLONING[fs_type], str(path)], check=True, capture_output=True)
    return path


def mount_image(image: Path, path: Path) -> None:
    """Mount a file with a file system for the calling thread and those that it starts."""
    leave_mounts()
    subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)


def join_mounts(pid: int) -> None:
    """See the mounts of another process, in the calling thread and those that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A thread that shares its working directory with others cannot join.
        if libc.unshare(_CLONE_FS) != 0 or libc.setns(fd, _CLONE_NEWNS) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "setns(CLONE_NEWNS)")
    finally:
        os.close(fd)


def leave_mounts() -> None:
    """Keep later mounts to the calling thread and those that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare(CLONE_NEWNS)")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount_tmpfs(path: Path, *options: str) -> None:
    """Mount a tmpfs for the calling thread and for those that it starts from now on."""
    leave_mounts()
    given = ",".join(("mode=755", *options))
    subprocess.run(["mount", "-t", "tmpfs", "-o", given, "tmpfs", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    """Change the options of a mount."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)
