"""Let the interpreter end only when no daemon thread is within a call of torch.

A daemon thread may be inside C++ code of torch, such as a request to the store, when the
interpreter ends. When the thread then asks for the GIL, CPython ends it in the middle of C++
functions that do not allow this. So the whole process ends with SIGABRT ("terminate called without
an active exception"), and the launcher reports a finished run as failed.

Mechanism: `atexit`. All other threads, including those of executors, have ended by then.

Looked at: torch 2.13 with Python 3.11. When torch changes: nothing, as the mechanism is CPython's.
"""

from __future__ import annotations

import atexit
import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

# Seconds. A store that does not answer must not keep a process for long.
_MOST_S = 5.0


class CallsUntilExit:
    """Counts calls of daemon threads, and ends them before the interpreter ends. Thread-safe."""

    def __init__(self) -> None:
        """Start with no call, and with the interpreter running."""
        self._changed = threading.Condition()
        self._count = 0
        self._is_over = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Make calls of torch within this, in a daemon thread.

        Raises:
            SystemExit: If the interpreter is ending: it ends the thread, and nothing else.
        """
        with self._changed:
            if self._is_over:
                raise SystemExit
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self, most_s: float = _MOST_S) -> None:
        """Admit no more calls, and wait for those that run.

        Args:
            most_s: How long to wait, in seconds.
        """
        with self._changed:
            self._is_over = True
            if not self._changed.wait_for(lambda: not self._count, most_s):
                _log.warning("%d threads wait for the store while the process ends", self._count)


CALLS_UNTIL_EXIT = CallsUntilExit()
"""The one object of this process."""

atexit.register(CALLS_UNTIL_EXIT.end)
