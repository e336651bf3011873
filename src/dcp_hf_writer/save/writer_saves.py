"""The saves of one writer: each thread has a path and an attempt of its own, so saves never mix."""

from __future__ import annotations

import functools
import threading
import uuid
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.save.attempt import Attempt


_T = TypeVar("_T")


class _HasSaves(Protocol):
    _saves: WriterSaves


class WriterSaves:
    """What a writer remembers of its saves.

    torch makes all calls of one save in one thread. Two saves of one writer may overlap for a
    moment, in two threads: a save that cannot be staged takes no part of the staging memory, so
    nothing holds the next one back. Thread-safe.
    """

    def __init__(self, save_id: str | None = None) -> None:
        """Start without a save.

        Args:
            save_id: The id that the writer tells; `None` makes a new one.
        """
        self._thread = threading.local()
        self._latest: Attempt | None = None
        self.save_id = save_id or str(uuid.uuid4())
        """Id that the writer tells, as torch's writer does; the coordinator's is in `.metadata`."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A checkpointer process has saves of its own.
        return WriterSaves, (self.save_id,)

    def renew_save_id(self) -> None:
        """Make a new `save_id`, for the next save."""
        self.save_id = str(uuid.uuid4())

    def wait_for_earlier(self) -> None:
        """Wait for the latest save if it runs in another thread.

        Raises:
            StagingBusyError: If it is still running at its deadline.
        """
        earlier = self._latest
        if earlier is not None and earlier.context.thread is not threading.current_thread():
            earlier.wait_until_over()

    def set_target(self, path: str) -> None:
        """Set the path of the next save of the calling thread."""
        self._thread.target = path

    def take_target(self, default: str) -> str:
        """Return the path that `set_target` set in this thread, once; otherwise `default`."""
        target: str | None = getattr(self._thread, "target", None)
        self._thread.target = None
        return default if target is None else target

    def begin(self, attempt: Attempt) -> None:
        """Note the save that the calling thread runs from now on."""
        self._thread.attempt = self._latest = attempt

    def current(self) -> Attempt | None:
        """Return the save that the calling thread runs; `None` if it began none."""
        found: Attempt | None = getattr(self._thread, "attempt", None)
        return found


def tells(method: Callable[..., _T]) -> Callable[..., _T]:
    """Make a method of a writer log the error that it raises, if no guard watches the save."""

    @functools.wraps(method)
    def telling(self: _HasSaves, *args: Any, **kwargs: Any) -> _T:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            attempt = self._saves.current()
            if attempt is not None:
                attempt.tell(error)
            raise

    return telling
