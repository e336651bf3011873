"""Numbers and names as text for people. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_STEP = 1024
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_SHORT_S = 10
_GB = 10**9


def size(nbytes: float) -> str:
    """Return a number of bytes in binary units, such as `1.5 GiB`."""
    value = float(nbytes)
    for unit in _UNITS[:-1]:
        if abs(value) < _STEP:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= _STEP
    return f"{value:.1f} {_UNITS[-1]}"


def rate(nbytes: float, seconds: float) -> str:
    """Return a transfer rate in decimal units; `-` if no time passed."""
    if seconds <= 0:
        return "-"
    value = nbytes / seconds
    return f"{value / 1e9:.2f} GB/s" if value >= _GB else f"{value / 1e6:.1f} MB/s"


def age(seconds: float) -> str:
    """Return a time span in its largest unit, such as `3 min`."""
    seconds = max(seconds, 0.0)
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} min"
    if seconds < 2 * _DAY_S:
        return f"{seconds / _HOUR_S:.0f} h"
    return f"{seconds / _DAY_S:.0f} d"


def duration(seconds: float) -> str:
    """Return a measured time."""
    return f"{seconds:.3f} s" if seconds < _SHORT_S else f"{seconds:.1f} s"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 tensor`, `2,000 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shape(sizes: Sequence[int]) -> str:
    """Return a shape, such as `[4, 7]`."""
    return f"[{', '.join(map(str, sizes))}]"


def printable(text: str) -> str:
    """Return a text from storage without characters that control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
