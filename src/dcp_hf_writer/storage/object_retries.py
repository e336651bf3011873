"""When requests to an object store are sent again, and how many are in flight at once.

The stores of this package switch off the retries of their client libraries. Otherwise the waits of
several layers would multiply, and end long after the deadline of the save.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import SaveTimeoutError, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.storage.object_contract import Patience

_log = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 15.0
# Often enough to notice soon that the save was given up.
_CHECK_EVERY_S = 1.0
# A lost request is common, several in a row are worth a line in the log.
_FAILURES_TO_LOG = 4
# Connections per process. More gain nothing against one store, and each holds a part's buffers.
MOST_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class RequestFault:
    """Why a request failed. Its texts hold no credential."""

    passes: bool
    """Whether the same request may succeed later."""
    text: str
    """What to tell the user, such as `503 SlowDown`."""
    code: str = ""
    """The store's name of the error; empty if it did not answer."""
    asks_for_less: bool = False
    """Whether the store asks for fewer requests."""
    errno: int | None = None
    """The nearest error number of the operating system."""
    hint: str | None = None
    """What the user can do."""


class Retries:
    """The failed tries of one call, which wait longer and longer. For one thread."""

    def __init__(self, patience: Patience, *, path: str, what: str) -> None:
        """Count no failure yet.

        Args:
            patience: Limits all tries together.
            path: URL of the object, for errors.
            what: What is tried, such as `put`, for errors.
        """
        self.patience, self.path, self.what = patience, path, what
        self.failures = 0
        self._last_answer: RequestFault | None = None

    @property
    def last_code(self) -> str:
        """The store's name of its last error; empty if it has not answered."""
        return self._last_answer.code if self._last_answer else ""

    def wait_after(self, fault: RequestFault) -> None:
        """Wait until the request may be sent again.

        Raises:
            WriteError: If sending it again cannot help.
            SaveTimeoutError: At the deadline.
        """
        if not fault.passes:
            raise self.refused(fault)
        self.failures += 1
        # At the deadline a last request goes unanswered; what the store said before tells more.
        if fault.code or self._last_answer is None:
            self._last_answer = fault
        if self.failures == _FAILURES_TO_LOG:
            _log.warning(
                "%s of %s has failed %d times, last with: %s; it is tried again until the deadline",
                *(self.what, self.path, self.failures, fault.text),
            )
        wait = min(_FIRST_WAIT_S * 2 ** (self.failures - 1), _LONGEST_WAIT_S)
        # Jitter: the ranks of a save meet the same error at the same moment.
        until = time.monotonic() + wait * random.uniform(0.5, 1)  # noqa: S311 - no secret
        if until >= self.patience.deadline:
            raise self._timed_out(self._last_answer)
        for _ in waits(self.patience, until):
            pass

    def refused(self, fault: RequestFault) -> WriteError:
        """Return the error for a request that the store refuses."""
        return WriteError(
            f"the object store refused the request {self.what}",
            path=self.path,
            found=fault.text,
            hint=fault.hint,
            errno=fault.errno,
        )

    def _timed_out(self, fault: RequestFault) -> SaveTimeoutError:
        return SaveTimeoutError(
            f"the object store did not complete the request {self.what} in time",
            path=self.path,
            expected="success before the deadline of the save",
            found=f"{self.failures} failed tries; the last answer was: {fault.text}",
            hint="raise timeout_s if the store is only slow",
        )


def waits(patience: Patience, until: float) -> Iterator[float]:
    """Yield how long to wait, in seconds, until it is `until` or the deadline. Calls the check.

    The body may wait itself, for another event. If it returns at once, this function waits.
    """
    until = min(until, patience.deadline)
    while True:
        patience.check()
        begun = time.monotonic()
        if begun >= until:
            return
        step = min(_CHECK_EVERY_S, until - begun)
        yield step
        time.sleep(max(0.0, begun + step - time.monotonic()))


@dataclass(slots=True)
class RequestLimit:
    """How many requests of this process are in flight. Thread-safe.

    The limit halves when the store asks for less, and grows by one after as many successes as the
    limit is. So it settles near what the store takes.
    """

    most: int = MOST_REQUESTS
    """Largest limit."""
    limit: float = MOST_REQUESTS
    """The limit now."""
    in_flight: int = 0
    """Number of requests now."""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _shrunk_at: float = 0.0

    @contextmanager
    def one(self, patience: Patience) -> Iterator[bool]:
        """Take a place for one request; `False` if none is free before the deadline."""
        has_place = self._enter(patience)
        try:
            yield has_place
        finally:
            if has_place:
                with self._changed:
                    self.in_flight -= 1
                    self._changed.notify()

    def _enter(self, patience: Patience) -> bool:
        while True:
            patience.check()
            with self._changed:
                if self.in_flight < int(self.limit):
                    self.in_flight += 1
                    return True
                left = patience.deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(_CHECK_EVERY_S, left))

    def learn(self, fault: RequestFault | None, *, begun_at: float) -> None:
        """Adapt the limit to the outcome of a request.

        Args:
            fault: Why it failed; `None` if it succeeded.
            begun_at: `time.monotonic()` when it began.
        """
        with self._changed:
            if fault is None:
                self.limit = min(self.most, self.limit + 1 / self.limit)
                self._changed.notify()
            elif fault.asks_for_less and begun_at >= self._shrunk_at:
                # Requests begun before the last cut do not show whether it was enough.
                self.limit = max(1, self.limit / 2)
                self._shrunk_at = time.monotonic()
