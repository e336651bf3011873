"""Run a part of a save in a thread of its own that has a lower priority than training."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, TypeVar

from dcp_hf_writer.storage.linux_calls import lower_io_priority

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


def run_at_low_priority(
    act: Callable[[], Result], *, nice: int, stop: Callable[[], object]
) -> Result:
    """Run `act` in a thread whose nice value is higher by `nice`; wait for it.

    The calling thread keeps its priority: it belongs to torch or to the user, and Linux does not
    let an ordinary user raise a priority again. Threads that `act` starts inherit the lower one.

    Args:
        act: What to run.
        nice: Difference of nice values, 0 to 19; 0 runs `act` in the calling thread.
        stop: Called if a signal interrupts the wait; must make `act` end soon.

    Returns:
        What `act` returns; what it raises is raised here.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    begun = threading.Lock()
    # Not `join`: an interrupted `join` takes the thread for ended (Python 3.10 to 3.12).
    is_over = threading.Event()

    def body() -> None:
        if not begun.acquire(blocking=False):
            return
        try:
            lower_priority(nice)
            results.append(act())
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            errors.append(error)
        finally:
            is_over.set()

    thread = threading.Thread(target=body, name="dcp-hf-write")
    try:
        is_started = nice > 0 and _starts(thread)
        if is_started:
            is_over.wait()
    except BaseException:
        stop()
        # A signal may come before the thread begins; with the lock taken, it never will.
        if not begun.acquire(blocking=False):
            is_over.wait()
        errors.clear()
        raise
    if not is_started:
        return act()
    thread.join()
    if errors:
        # Popped: the error's traceback refers to the list, and would keep the save's objects alive.
        raise errors.pop()
    return results.pop()


def _starts(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:
        # The interpreter is exiting. It waits for saves in flight but starts no new threads.
        return False
    return True


def lower_priority(nice: int) -> None:
    """Add `nice` to the nice value of the calling thread, and lower its I/O priority.

    The thread may not be able to undo that.
    """
    thread = threading.get_native_id()
    try:
        # Linux sets the value of one thread: setpriority(2), "C library/kernel differences".
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
    except OSError as error:
        _log.warning("a save runs at the priority of training: %s", error)
    try:
        lower_io_priority()
    except OSError as error:
        _log.warning("a save reads and writes at the I/O priority of training: %s", error)
