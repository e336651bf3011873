"""Wait for a call no longer than a limit, although nothing can end the call.

A request to torch's store hangs if the host of the store is stopped, or if the network between them
is cut: the connection stays open, and torch sets no timeout for the answer to `set` or `check`.

Mechanism: a daemon thread per call. Looked at: torch 2.10 to 2.15. When torch changes: nothing.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

from dcp_hf_writer.torch_seam.calls_until_exit import CALLS_UNTIL_EXIT

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


def call_in_time(act: Callable[[], _T], *, limit_s: float) -> _T:
    """Return what `act` returns, or raise what it raises.

    Args:
        act: Runs in a thread of its own, which goes on if the call is given up.
        limit_s: How long to wait, in seconds.

    Raises:
        TimeoutError: If the call does not return in time.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with CALLS_UNTIL_EXIT.call():
                results.append(act())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="dcp-hf-ask", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # The interpreter is exiting. It waits for saves in flight but starts no new threads.
        return act()
    thread.join(limit_s)
    if results:
        return results[0]
    error = errors[0] if errors else None
    if error is None or isinstance(error, SystemExit):
        msg = f"no answer within {limit_s:.1f} s"
        raise TimeoutError(msg) from error
    raise error
