"""Resolve the future of an asynchronous save by its deadline, with an error that says why.

torch runs the save in a thread of its own and gives the trainer a future. That thread may be stuck
in a system call or a collective, and nothing can cancel it. The errors that it raises are wrapped,
or do not name a rank. So this module finds the future, and a guard sets its result or error.

Mechanism: `async_save` submits the save to Python's `ThreadPoolExecutor`, whose worker runs
`_WorkItem.run`. The `self` of that frame is the work item, which holds the future. The guard
replaces `set_result` and `set_exception` of that one future.

Looked at: torch 2.10 to 2.15, Python 3.10 to 3.14. When Python or torch changes: `find_future`
raises for an asynchronous save, because nothing could report a lost rank by the deadline.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from concurrent.futures.thread import _threads_queues, _worker, _WorkItem
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer.errors import CheckpointError, SaveAbortedError
from dcp_hf_writer.torch_seam.caller_frames import frames_from
from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

# Seconds that a save gets after its deadline to fail by itself: its own errors say more.
_GRACE_S = 1.0

# Seconds between two looks at what other ranks say; each costs a request to the store.
_LOOK_S = 2.0


def find_future(*, is_async: bool) -> Future[Any] | None:
    """Return the future of the save that the calling thread runs; `None` if it is synchronous.

    Args:
        is_async: Whether the save is known to be asynchronous. A save that runs in a thread of an
            executor is always treated as asynchronous.

    Raises:
        UnsupportedTorchError: If the save is asynchronous and its future cannot be found.
    """
    future = current_future()
    if future is None and (is_async or _is_thread_of_executor()):
        raise unsupported_torch(
            "the future of the save",
            phase="plan",
            expected="a work item of a ThreadPoolExecutor among the callers, as in dcp.async_save",
            hint="call dcp.async_save, or call dcp.save in the training thread",
        )
    return future


def _is_thread_of_executor() -> bool:
    """Whether an executor made the calling thread."""
    # An executor enters a thread in the table after it started it, which may be too late: the
    # thread's own function tells at once.
    if threading.current_thread() in _threads_queues:
        return True
    frames = frames_from(sys._getframe(1))  # noqa: SLF001 - as in `current_future`
    return any(frame.f_code is _worker.__code__ for frame in frames)


def current_future() -> Future[Any] | None:
    """Return the future of the executor task that this thread runs; `None` if it runs none."""
    for frame in frames_from(sys._getframe(1)):  # noqa: SLF001 - the future is in no other place
        if frame.f_code is _WorkItem.run.__code__:
            item = frame.f_locals.get("self")
            return item.future if isinstance(item, _WorkItem) else None
    return None


class FutureGuard:
    """Sits between the thread of a save and its future, and resolves the future by the deadline."""

    def __init__(
        self,
        future: Future[Any],
        *,
        deadline: float,
        on_deadline: Callable[[], BaseException],
        translate: Callable[[BaseException], BaseException],
        on_end: Callable[[], None],
        on_result: Callable[[], None] = lambda: None,
        look: Callable[[], BaseException | None] = lambda: None,
        is_running: Callable[[], bool] = lambda: True,
        has_raised: Callable[[BaseException], bool] = lambda _: True,
    ) -> None:
        """Guard a future.

        Args:
            future: Future of the task that runs the save.
            deadline: `time.monotonic()` by which the save must end.
            on_deadline: Makes the error for a save that missed its deadline; called on the guard's
                thread.
            translate: Turns the error that the save raised into the error that the caller gets.
            on_end: Called when the save has ended, before the future is resolved.
            on_result: Called before `on_end` if the save succeeded.
            look: Called every few seconds, on the guard's thread; an error ends the wait.
            is_running: Whether the task still runs the save; a task of the user's own executor may
                go on after it.
            has_raised: Whether an error of the task came out of the save.
        """
        self._future = future
        self._deadline = deadline
        self._on_deadline = on_deadline
        self._translate = translate
        self._on_end = on_end
        self._on_result = on_result
        self._look = look
        self._is_running = is_running
        self._has_raised = has_raised
        self._lock = threading.Lock()
        self._over = threading.Event()
        """Set when the watch has nothing more to do."""
        self._is_resolved = False
        self._set_result, self._set_exception = future.set_result, future.set_exception
        # Instance attributes hide the methods of the class from their only caller, the work item.
        future.set_result = self._result  # type: ignore[method-assign]
        future.set_exception = self._exception  # type: ignore[method-assign]
        try:
            threading.Thread(target=self._watch, name="dcp-hf-watchdog", daemon=True).start()
        except RuntimeError as error:
            # The interpreter is exiting: it waits for the save, but starts no more threads.
            _log.debug("no watchdog thread watches the deadline of the save: %s", error)

    def stop(self) -> None:
        """Stop watching: the save is over, and what the task does from now on is its own affair."""
        self._over.set()
        with self._lock:
            # A guard that came later has replaced these methods again; then it calls ours.
            if getattr(self._future.set_result, "__self__", None) is not self:
                return
            del self._future.set_result, self._future.set_exception
            if getattr(self._set_result, "__self__", None) is not self._future:
                # An earlier guard of the same task still watches.
                self._future.set_result = self._set_result
                self._future.set_exception = self._set_exception

    def _watch(self) -> None:
        error: BaseException | None = None
        while error is None:
            left_s = max(self._deadline + _GRACE_S - time.monotonic(), 0.0)
            if self._over.wait(min(left_s, _LOOK_S)):
                return
            if not self._is_running():
                # The task has caught the error of the save and gone on. The traceback of that
                # error keeps the save's frames, so that nothing has told this guard.
                self.stop()
                return
            is_late = time.monotonic() >= self._deadline + _GRACE_S
            error = _outcome_of(self._on_deadline) if is_late else self._look()
        shown = error
        self._resolve(lambda: self._set_exception(shown))

    def _result(self, result: Any) -> None:
        self._on_result()
        self._on_end()
        self._resolve(lambda: self._set_result(result))

    def _exception(self, exception: BaseException | None) -> None:
        shown = exception
        if exception is not None and not self._over.is_set() and self._has_raised(exception):
            shown = _outcome_of(lambda: self._translate(exception))
        self._on_end()
        self._resolve(lambda: self._set_exception(shown))

    def _resolve(self, act: Callable[[], None]) -> None:
        self._over.set()
        with self._lock:
            if self._is_resolved:
                return
            self._is_resolved = True
            try:
                act()
            except InvalidStateError:
                # The caller has cancelled the future, so it needs no result.
                return


def _outcome_of(explain: Callable[[], BaseException]) -> BaseException:
    """Return the error that `explain` makes, or the error that it raises: the future gets it."""
    try:
        return explain()
    except Exception as error:  # noqa: BLE001 - the caller must not wait forever
        return error


def own_error(error: BaseException) -> CheckpointError | None:
    """Return the `CheckpointError` in what a save raised; DCP wraps it in its own exception.

    If some ranks only gave the save up because another one failed, their errors do not count.
    """
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, CheckpointException):
        failures = [(rank, inner) for rank, (inner, _) in sorted(error.failures.items())]
        causes = [one for one in failures if not isinstance(one[1], SaveAbortedError)]
        for rank, inner in causes or failures:
            if isinstance(inner, CheckpointError):
                if inner.rank is None:
                    inner.rank = rank
                # Not `raise inner from error`: `error` holds `inner`, and Python would print the
                # two in turn, again and again.
                return inner
    return None
