"""Whether a save may still commit: a small state machine behind one lock."""

from __future__ import annotations

import threading
from enum import Enum


class _State(Enum):
    RUNNING = "running"
    GIVEN_UP = "given up"
    COMMITTING = "committing"
    COMMITTING_LATE = "committing, and given up too late"


class CommitState:
    """The state of one save on one rank.

    One thread runs the save; a watchdog in another thread may give it up. A save that was given up
    never begins to commit. If the commit has already begun, the watchdog can only report that the
    outcome is open. Thread-safe.
    """

    def __init__(self) -> None:
        """Begin in the running state."""
        self._lock = threading.Lock()
        self._state = _State.RUNNING
        self._is_ended = False

    @property
    def is_given_up(self) -> bool:
        """Whether the watchdog gave the save up, before the commit began or after."""
        return self._state in {_State.GIVEN_UP, _State.COMMITTING_LATE}

    @property
    def is_ended(self) -> bool:
        """Whether `end` was called."""
        return self._is_ended

    def begin_commit(self) -> bool:
        """Enter the step that publishes; returns `False` if the save may not commit."""
        with self._lock:
            if self._state is not _State.RUNNING:
                return False
            self._state = _State.COMMITTING
            return True

    def give_up(self) -> bool:
        """Keep the save from committing; returns `False` if the commit has already begun."""
        with self._lock:
            if self._state in {_State.RUNNING, _State.GIVEN_UP}:
                self._state = _State.GIVEN_UP
                return True
            self._state = _State.COMMITTING_LATE
            return False

    def end(self) -> bool:
        """Record that the save has ended; returns `True` to the first caller only."""
        with self._lock:
            is_first, self._is_ended = not self._is_ended, True
            return is_first
