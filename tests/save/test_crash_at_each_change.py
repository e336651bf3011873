"""A process is killed at the n-th change that it makes to the storage, for every n.

Dying before a change is dying after the one before it, so each state that a save goes through on
the storage is looked at; writes are also left done by half.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import pytest

from dcp_hf_writer.save import commit
from support.changes import Changes
from support.faults import (
    BadCall,
    check_outcomes,
    check_storage,
    looks_committed,
    save,
)
from support.named_bytes import save_held_by
from support.processes import in_fresh_process, status_of_fork

if TYPE_CHECKING:
    from pathlib import Path

Way = Literal["new", "exchange", "two renames"]

# More changes than any save of these tests makes.
MOST_CHANGES = 300
# Numbers of the struck saves; two that follow one another differ.
NUMBERS = (2, 3, 4, 5, 6, 7)
LAST_NUMBER = 1


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
    """Save in a child of this process that dies at a change."""
    with no_exchange().installed(0 if way == "two renames" else 1, root):
        commit._probed.clear()
        Changes(root, die_at=die_at)
        outcome = save(root, "step-2", number, overwrite=way != "new", is_sync=True)
    check_outcomes([outcome], None)


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
    return status_of_fork(save_and_die, root, number, way, n)


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
