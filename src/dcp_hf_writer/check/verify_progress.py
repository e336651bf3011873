"""A progress line on the terminal for a long read."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

_WIDTH = 24
_GIB = 1 << 30
_MIB = 1 << 20


class ProgressLine:
    """One line that is rewritten in place; a line break ends it when all bytes are done."""

    def __init__(self, what: str, stream: TextIO) -> None:
        """Prepare a line on `stream` that shows `what` before the bar."""
        self._what, self._stream = what, stream
        self._began = time.monotonic()
        self._is_over = False

    def __call__(self, done: int, total: int) -> None:
        """Show the bytes done out of `total`; ignore calls after all bytes are done."""
        if self._is_over:
            return
        self._is_over = done >= total
        share = done / total if total else 1.0
        filled = int(share * _WIDTH)
        rate = done / max(time.monotonic() - self._began, 1e-6)
        bar = "#" * filled + "." * (_WIDTH - filled)
        end = "\n" if self._is_over else ""
        text = f"\r{self._what} [{bar}] {share:4.0%} {done / _GIB:.2f}/{total / _GIB:.2f} GiB"
        self._stream.write(f"{text} {rate / _MIB:.0f} MiB/s {end}")
        self._stream.flush()


def progress_of(
    wanted: bool | Callable[[int, int], None] | None,  # noqa: FBT001 - as the public function has it
    what: str,
) -> Callable[[int, int], None]:
    """Return the function to call with the bytes done and the total bytes.

    `True` shows a line on stderr, `False` does not, and `None` does if stderr is a terminal. A
    callable is returned unchanged.
    """
    if callable(wanted):
        return wanted
    if wanted or (wanted is None and sys.stderr is not None and sys.stderr.isatty()):
        return ProgressLine(what, sys.stderr)
    return _ignore


def _ignore(done: int, total: int) -> None:
    """Show nothing."""
