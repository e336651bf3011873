"""A process is killed at the n-th change that it makes to the storage, for every n.

Dying before a change is dying after the one before it, so each state that a save goes through on
the storage is looked at; writes are also left done by half.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pytest

from dcp_hf_writer.save import commit
from dcp_hf_writer.storage import linux_calls
from support.faults import (
    BadCall,
    check_outcomes,
    check_storage,
    looks_committed,
    path_of_call,
    save,
)
from support.named_bytes import save_held_by
from support.processes import in_fresh_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Way = Literal["new", "exchange", "two renames"]

# More changes than any save of these tests makes.
MOST_CHANGES = 300
# Numbers of the struck saves; two that follow one another differ.
NUMBERS = (2, 3, 4, 5, 6, 7)
LAST_NUMBER = 1

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_CALLS = ("pwrite", "pwritev", "fsync", "ftruncate")
_LIBC_CALLS = ("renameat2", "fallocate64")


class Changes:
    """Counts what this process changes below a directory, and dies at one of these changes.

    For a process that ends soon: the counting cannot be taken out again.
    """

    def __init__(self, root: Path, *, die_at: int) -> None:
        self._root, self._die_at = str(root), die_at
        self._count = 0
        self._lock = threading.Lock()
        self._pwrite = os.pwrite
        sys.addaudithook(self._audit)
        for name in _CALLS:
            setattr(os, name, self._counted(getattr(os, name), is_write=name.startswith("pwrite")))
        for name in _LIBC_CALLS:
            setattr(
                linux_calls._libc,
                name,
                self._counted(getattr(linux_calls._libc, name), is_write=False),
            )

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(args[0])
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        # The removal of a tree names its entries relative to a descriptor.
        if self._is_ours(path) or not os.path.isabs(path):
            self._tick()

    def _is_ours(self, path: str) -> bool:
        return path == self._root or path.startswith(f"{self._root}/")

    def _counted(self, real: Any, *, is_write: bool) -> Any:
        def counted(*args: Any) -> Any:
            if self._is_ours(path_of_call(args[:2])):
                self._tick()
                if is_write:
                    self._tick(lambda: self._write_half(*args))
            return real(*args)

        return counted

    def _tick(self, before: Callable[[], object] = lambda: None) -> None:
        with self._lock:
            self._count += 1
            if self._count == self._die_at:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

    def _write_half(self, fd: int, data: Any, offset: int) -> None:
        whole = bytes(data) if isinstance(data, memoryview) else b"".join(data)
        self._pwrite(fd, whole[: len(whole) // 2], offset)


@dataclass
class Tried:
    """What came of killing a save at each of its changes."""

    deaths: int = 0
    """How many saves died, one at each change; the one after them survived."""
    problems: list[str] = field(default_factory=list)
    committed_early: int = 0
    """Saves that died and whose checkpoint was there all the same."""


def no_exchange() -> BadCall:
    """Take `renameat2` away, as some file systems do."""
    return BadCall(rank=0, name="renameat2", errno=errno.EINVAL, times=10**6)


def save_and_die(root: Path, number: int, way: Way, die_at: int) -> None:
    """Save in a child of this process that dies at a change; returns its end, never raises."""
    with no_exchange().installed(0 if way == "two renames" else 1, root):
        commit._probed.clear()
        Changes(root, die_at=die_at)
        outcome = save(root, "step-2", number, overwrite=way != "new", is_sync=True)
    os._exit(0 if outcome.raised is None else 1)


def try_every_change(root: Path, way: Way) -> Tried:
    """Let children save `step-2` and die at their first, second, third change; until one lives."""
    found = Tried()
    check_outcomes([save(root, "step-1", 1)], None)
    if way != "new":
        check_outcomes([save(root, "step-2", NUMBERS[-1])], None)
    held: int | None = None if way == "new" else NUMBERS[-1]
    for n in range(1, MOST_CHANGES):
        number = NUMBERS[n % len(NUMBERS)]
        status = end_of_child(root, number, way, n)
        try:
            held, is_over = look_after_death(root, number, way, held, status)
        except BaseException as error:  # noqa: BLE001 the next n is as telling
            found.problems.append(f"n={n}: {type(error).__name__}: {error}")
            is_over = not os.WIFSIGNALED(status)
        if is_over:
            return found
        found.deaths += 1
        if way == "new" and held is not None:
            # Retention may take it away; what the dead save left beside it stays.
            found.committed_early += 1
            os.rename(root / "step-2", root.parent / f"kept-{n}")
            held = None
    found.problems.append(f"no save survived {MOST_CHANGES} changes")
    return found


def end_of_child(root: Path, number: int, way: Way, n: int) -> int:
    settle()
    pid = os.fork()
    if pid == 0:
        save_and_die(root, number, way, n)
    return os.waitpid(pid, 0)[1]


def settle() -> None:
    """Wait until this process has one thread: others would hold locks that no fork releases."""
    until = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.001)
    assert threading.active_count() == 1, threading.enumerate()


def look_after_death(
    root: Path, number: int, way: Way, held: int | None, status: int
) -> tuple[int | None, bool]:
    """Check what a child left; returns which save `step-2` holds, and whether the child lived."""
    is_over = not os.WIFSIGNALED(status)
    assert is_over or os.WTERMSIG(status) == signal.SIGKILL
    assert not is_over or os.WEXITSTATUS(status) == 0, "the save failed"
    if way == "two renames" and "step-2" not in looks_committed(root):
        # Between the two renames: one of them is there whole, and the next save puts it right.
        check_storage(root, {"step-1": 1}, may_leave=True)
        aside = [path for path in root.iterdir() if path.name.startswith(".replaced-")]
        assert len(aside) == 1
        assert save_held_by(aside[0]) == held
        return held, is_over
    if "step-2" not in looks_committed(root):
        assert held is None
        check_storage(root, {"step-1": 1}, may_leave=True)
        return None, is_over
    now = save_held_by(root / "step-2")
    assert now in {held, number} or way == "two renames", f"{now} is neither {held} nor {number}"
    # What a crash between two renames left is put right by the next save, and it collects the rest.
    check_storage(root, {"step-1": 1, "step-2": now}, may_leave=not is_over)
    return now, is_over


@pytest.mark.parametrize(
    "way", ["new", "exchange", pytest.param("two renames", marks=pytest.mark.slow)]
)
def test_one_whole_checkpoint_is_there_when_a_save_dies_at_any_change(
    way: Way, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    found = in_fresh_process(try_every_change, root, way, timeout_s=100)
    print(f"{way}: died at each of {found.deaths} changes")  # noqa: T201 seen with -rP
    assert found.problems == []
    # Files, headers, ranges, metadata, manifest, fsyncs, renames: fewer would mean blindness.
    assert found.deaths > 40
    assert (found.committed_early > 0) == (way == "new")
    check_outcomes([save(root, "step-2", LAST_NUMBER, overwrite=True)], None)
    check_storage(root, {"step-1": 1, "step-2": LAST_NUMBER})
