"""Shorten a long list for a message: show the first entries, and say that there are more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_NAMES = 20
"""Largest number of names that an error lists."""

_RANKS = 8
"""Largest number of ranks that a message names."""


def some_of(texts: Iterable[str], *, most: int, separator: str = ", ") -> str:
    """Return the first texts in one line, such as `a, b and 5 more`; empty if there are no texts.

    Args:
        texts: The texts, in the order in which to show them.
        most: Largest number of texts to show.
        separator: Text to put between two texts.
    """
    every = list(texts)
    more = len(every) - most
    return separator.join(every[:most]) + (f" and {more} more" if more > 0 else "")


def some_ranks(ranks: Iterable[int]) -> str:
    """Return the lowest ranks in order, such as `[0, 1]`; `...` at the end stands for the rest."""
    every = sorted(ranks)
    shown = ", ".join(map(str, every[:_RANKS]))
    return f"[{shown}, ...]" if len(every) > _RANKS else f"[{shown}]"
