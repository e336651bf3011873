"""Mounts that only the process sees that makes them, so that a failed test leaves none behind."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_CLONE_NEWNS = 0x00020000

needs_mounts = pytest.mark.skipif(
    shutil.which("mount") is None
    or shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="`unshare -m true` fails here: a private mount namespace takes CAP_SYS_ADMIN",
)


def mount_tmpfs(path: Path, *options: str) -> None:
    """Mount a tmpfs for the calling thread and for those that it starts from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare(CLONE_NEWNS)")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    given = ",".join(("mode=755", *options))
    subprocess.run(["mount", "-t", "tmpfs", "-o", given, "tmpfs", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    """Change the options of a mount."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)
