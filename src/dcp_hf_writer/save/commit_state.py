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
    """The states of one save on one rank.

    The thread of the save works; a watchdog may give the save up from another thread. A save that
    was given up never begins to commit, and of one that has begun to commit the watchdog can only
    say that its outcome is open. Thread-safe.
    """

    def __init__(self) -> None:
        """Begin as a save that runs."""
        self._lock = threading.Lock()
        self._state = _State.RUNNING
        self._is_ended = False

    @property
    def is_given_up(self) -> bool:
        """Whether the work of the save is in vain, or may be."""
        return self._state in {_State.GIVEN_UP, _State.COMMITTING_LATE}

    @property
    def is_ended(self) -> bool:
        """Whether what the save held was given back."""
        return self._is_ended

    def begin_commit(self) -> bool:
        """Enter the step that publishes; `False` if the save was given up."""
        with self._lock:
            if self._state is not _State.RUNNING:
                return False
            self._state = _State.COMMITTING
            return True

    def give_up(self) -> bool:
        """Keep the save from committing; `False` if it is doing so already."""
        with self._lock:
            if self._state in {_State.RUNNING, _State.GIVEN_UP}:
                self._state = _State.GIVEN_UP
                return True
            self._state = _State.COMMITTING_LATE
            return False

    def end(self) -> bool:
        """Note that the save has ended; `True` for the first caller alone."""
        with self._lock:
            is_first, self._is_ended = not self._is_ended, True
            return is_first
