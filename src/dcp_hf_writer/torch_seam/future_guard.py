"""The future of an asynchronous save: resolved by the deadline, with an error that says why.

torch runs a save on a thread of its own and hands the trainer a future. That thread may be stuck in
a system call or a collective, which nothing can cancel, and what it raises is wrapped or anonymous.
So the future is found where torch keeps it, and the guard here decides what it is given.

Mechanism: `async_save` submits the save to a `ThreadPoolExecutor` of Python, whose worker runs
`_WorkItem.run`. The work item is the `self` of that frame, and holds the future. The guard replaces
`set_result` and `set_exception` of that one future.

Looked at: torch 2.9 to 2.13, Python 3.10 to 3.14. When Python or torch changes: `find_future`
raises for a save that is not synchronous, since a lost rank could not be reported by the deadline.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from concurrent.futures.thread import _threads_queues, _WorkItem
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.torch_seam.unsupported import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_log = logging.getLogger(__name__)

# A save that ends at its deadline is let end by itself: its own errors say more.
_GRACE_S = 1.0


def find_future(*, is_async: bool) -> Future[Any] | None:
    """Return the future of the save that the calling thread runs; `None` if it is synchronous.

    Args:
        is_async: Whether the save is known to be asynchronous. One in a thread of an executor is
            in any case.

    Raises:
        UnsupportedTorchError: If an asynchronous save has no future that can be found.
    """
    future = current_future()
    if future is None and (is_async or threading.current_thread() in _threads_queues):
        raise unsupported_torch(
            "the future of the save",
            phase="plan",
            expected="a work item of an executor among the callers, as dcp.async_save makes it",
            hint="call dcp.async_save, or save synchronously with dcp.save",
        )
    return future


def current_future() -> Future[Any] | None:
    """Return the future of the task that the calling thread runs for an executor, if any."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - torch keeps the future there only
    while frame is not None:
        if frame.f_code is _WorkItem.run.__code__:
            item = frame.f_locals.get("self")
            return item.future if isinstance(item, _WorkItem) else None
        frame = frame.f_back
    return None


class FutureGuard:
    """Stands between the thread of a save and its future."""

    def __init__(
        self,
        future: Future[Any],
        *,
        deadline: float,
        on_deadline: Callable[[], BaseException],
        translate: Callable[[BaseException], BaseException],
        on_end: Callable[[], None],
    ) -> None:
        """Guard a future.

        Args:
            future: Of the running task.
            deadline: `time.monotonic()` by which it must be resolved.
            on_deadline: Makes the error that it gets then; called on the guard's thread.
            translate: Turns what the save raised into what the caller shall see.
            on_end: Called when the save has ended, before the caller learns of it.
        """
        self._future = future
        self._deadline = deadline
        self._on_deadline = on_deadline
        self._translate = translate
        self._on_end = on_end
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._set_result, self._set_exception = future.set_result, future.set_exception
        # Instance attributes shadow the methods for the one caller that there is: the work item.
        future.set_result = self._result  # type: ignore[method-assign]
        future.set_exception = self._exception  # type: ignore[method-assign]
        try:
            threading.Thread(target=self._watch, name="dcp-hf-watchdog", daemon=True).start()
        except RuntimeError as error:
            # The interpreter is exiting: it waits for the save, but starts no threads any more.
            _log.debug("the save runs without a watchdog: %s", error)

    def _watch(self) -> None:
        left = self._deadline + _GRACE_S - time.monotonic()
        if self._done.wait(max(left, 0.0)):
            return
        error = _outcome_of(self._on_deadline)
        self._resolve(lambda: self._set_exception(error))

    def _result(self, result: Any) -> None:
        self._on_end()
        self._resolve(lambda: self._set_result(result))

    def _exception(self, exception: BaseException | None) -> None:
        shown = None if exception is None else _outcome_of(lambda: self._translate(exception))
        self._on_end()
        self._resolve(lambda: self._set_exception(shown))

    def _resolve(self, act: Callable[[], None]) -> None:
        with self._lock:
            if self._done.is_set():
                return
            self._done.set()
            try:
                act()
            except InvalidStateError:
                # Cancelled by the caller, who then does not look at it.
                return


def _outcome_of(explain: Callable[[], BaseException]) -> BaseException:
    """Return an explanation, or what went wrong in finding it: the future gets either."""
    try:
        return explain()
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller must not wait for ever
        return error


def own_error(error: BaseException) -> CheckpointError | None:
    """Return our error within what a save raised; DCP wraps the errors of all ranks in its own."""
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, CheckpointException):
        for rank, (inner, _) in sorted(error.failures.items()):
            if isinstance(inner, CheckpointError):
                if inner.rank is None:
                    inner.rank = rank
                inner.__cause__ = error
                return inner
    return None
