"""Single processes for tests, forked from the server that the ranks of `ranks` come from."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from typing import TYPE_CHECKING, Any

import torch

from support.rank_process import RankFailedError, RankTracebackError
from support.ranks import _context

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from types import TracebackType

    from typing_extensions import Self


class FreshProcess:
    """A process of its own that runs `fn(*args)`; a context manager that leaves none behind."""

    def __init__(self, fn: Callable[..., Any], *args: object, timeout_s: float = 60) -> None:
        """Start it.

        Args:
            fn: Function at the top level of an importable module.
            *args: Pickled.
            timeout_s: Limit for all waits together.
        """
        self._until = time.monotonic() + timeout_s
        context = _context()
        self._ours, theirs = context.Pipe()
        # Not a daemon: a daemon does not wait for its threads when it ends.
        self._process = context.Process(target=_run, args=(theirs, fn, args))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid or 0

    def result(self) -> Any:
        """Return what `fn` returned.

        Raises:
            BaseException: What it raised.
            RankFailedError: If the process died, or took too long.
        """
        if not self._ours.poll(max(0.0, self._until - time.monotonic())):
            msg = "the process gave no result in time"
            raise RankFailedError(msg)
        try:
            value, error, text = pickle.loads(self._ours.recv_bytes())
        except EOFError as closed:
            msg = f"the process ended without a result, exit code {self.exitcode()}"
            raise RankFailedError(msg) from closed
        if error is not None:
            raise error from RankTracebackError(text)
        return value

    def exitcode(self) -> int | None:
        """Wait for the end of the process; `None` if it does not come."""
        self._process.join(max(0.0, self._until - time.monotonic()))
        return self._process.exitcode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._ours.close()


def in_fresh_process(fn: Callable[..., Any], *args: object, timeout_s: float = 60) -> Any:
    """Run `fn(*args)` in a process of its own and return what it returns; raise what it raises."""
    with FreshProcess(fn, *args, timeout_s=timeout_s) as process:
        return process.result()


def status_of_fork(fn: Callable[..., object], *args: object) -> int:
    """Run `fn(*args)` in a fork of this process, which must have one thread.

    Returns:
        The status of the child as `os.waitpid` gives it: exit code 0 if `fn` returned, 1 if it
        raised; the child prints the error.
    """
    pid = os.fork()
    if pid == 0:
        try:
            fn(*args)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 this child must not go on with the tests
            print(repr(error), flush=True)  # noqa: T201
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def _run(theirs: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # A shell that runs the tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        answer = (fn(*args), None, "")
    except BaseException as error:  # noqa: BLE001 raised again where the result is wanted
        answer = (None, error, "".join(traceback.format_exception(error)))
    theirs.send_bytes(pickle.dumps(answer))
    theirs.close()
