"""How messages show a long list: its first entries, and how many more there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_RANKS = 8
"""How many ranks a message names."""


def some_of(texts: Iterable[str], *, most: int, separator: str = ", ") -> str:
    """Return the first texts in one line: `a, b and 5 more`; empty for none.

    Args:
        texts: In the order in which they are shown.
        most: How many are shown.
        separator: Between those that are shown.
    """
    every = list(texts)
    more = len(every) - most
    return separator.join(every[:most]) + (f" and {more} more" if more > 0 else "")


def some_ranks(ranks: Iterable[int]) -> str:
    """Return the first ranks as a list: `[0, 1, 2]`, or with `...` where there are more."""
    every = sorted(ranks)
    shown = ", ".join(map(str, every[:_RANKS]))
    return f"[{shown}, ...]" if len(every) > _RANKS else f"[{shown}]"
