"""A line on the terminal that says how far a long read is."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

Progress = bool | None
"""`True` shows a line on stderr, `False` none, `None` one where stderr is a terminal."""

_WIDTH = 24
_GIB = 1 << 30
_MIB = 1 << 20


class ProgressLine:
    """One line, written over and over; ends with a line break, or nothing was shown."""

    def __init__(self, what: str, stream: TextIO) -> None:
        """Show `what` before the bar."""
        self._what, self._stream = what, stream
        self._began = time.monotonic()
        self._is_over = False

    def __call__(self, done: int, total: int) -> None:
        """Show how many of how many bytes are done; what comes after the last is not shown."""
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
    """Return what to call with bytes done and bytes in all."""
    if callable(wanted):
        return wanted
    if wanted or (wanted is None and sys.stderr is not None and sys.stderr.isatty()):
        return ProgressLine(what, sys.stderr)
    return _ignore


def _ignore(done: int, total: int) -> None:
    """Show nothing."""
