"""Directories mounted through FUSE: two mounts of one directory are two page caches over it.

It needs `/dev/fuse`, the right to mount, and what `fuse_pass_through` needs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_DAEMON = Path(__file__).with_name("fuse_pass_through.py")
_MOUNT_S = 20.0


@functools.cache
def why_no_fuse() -> str | None:
    """Return why no directory can be mounted through FUSE here; `None` if one can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing, or this user may not use it"
    with tempfile.TemporaryDirectory() as directory:
        back, point = Path(directory) / "back", Path(directory) / "point"
        back.mkdir()
        point.mkdir()
        try:
            with mounted(back, point):
                return None
        except OSError as error:
            return f"FUSE does not work here: {error}"


@contextlib.contextmanager
def mounted(back: Path, point: Path) -> Iterator[None]:
    """Show a directory at a mount point in the body of the `with` statement.

    Raises:
        OSError: If it cannot be mounted.
    """
    daemon = subprocess.Popen(
        [sys.executable, str(_DAEMON), str(back), str(point)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + _MOUNT_S
        while not os.path.ismount(point):
            if daemon.poll() is not None or time.monotonic() > until:
                daemon.kill()
                raise OSError(daemon.communicate()[1].strip().rpartition("\n")[2] or "no answer")
            time.sleep(0.02)
        yield
    finally:
        subprocess.run(["umount", str(point)], check=False, capture_output=True)
        daemon.kill()
        with daemon:  # waits, and closes the pipe
            pass
