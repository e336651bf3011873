"""A memory cgroup of a test's own, for a process that the test starts."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def _why_not() -> str | None:
    try:
        with _made():
            return None
    except OSError as error:
        return f"no memory cgroup can be made here: {error}"


@contextlib.contextmanager
def _made() -> Iterator[Path]:
    root = _V1 if _V1.is_dir() else _V2
    path = root / f"dcp-hf-test-{uuid.uuid4().hex}"
    path.mkdir()
    try:
        if not (path / _limit_name()).exists():
            msg = f"{path} has no {_limit_name()}"
            raise OSError(msg)
        yield path
    finally:
        path.rmdir()


def _limit_name() -> str:
    return "memory.limit_in_bytes" if _V1.is_dir() else "memory.max"


_REASON = _why_not()
needs_memory_cgroups = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")


@contextlib.contextmanager
def memory_cgroup(nbytes: int) -> Iterator[Path]:
    """Make a cgroup that may use `nbytes`; its processes must have ended at the end."""
    with _made() as path:
        (path / _limit_name()).write_text(str(nbytes))
        yield path


def join_cgroup(path: Path) -> None:
    """Move this process there. What it has allocated stays with the cgroup that it leaves."""
    (path / "cgroup.procs").write_text(str(os.getpid()))
