"""Write many names as few patterns: `layers.{0-47}.mlp.{gate,up}_proj.weight`.

Pure. A pattern stands for every combination of the values in its braces. Together, the patterns
stand for exactly the given names.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_Heads = tuple[str, ...]
_Pattern = tuple[_Heads, ...]

# Longest list within braces. A longer list shows its first entries, `...` and its last entry.
_SHOWN = 6


def template(name: str) -> str:
    """Replace each number in a name by `#`, so that the names of all layers become equal."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def patterns(names: Iterable[str], *, is_complete: bool = False) -> dict[str, list[str]]:
    """Return patterns that together stand for the given names, each with its names.

    Args:
        names: Distinct names; dots separate their parts.
        is_complete: Whether to write long lists in full. Otherwise their middle is left out.
    """
    by_length: dict[int, list[_Heads]] = {}
    for name in names:
        parts = tuple(name.split("."))
        by_length.setdefault(len(parts), []).append(parts)
    found: dict[str, list[str]] = {}
    for alike in by_length.values():
        for pattern in _merged(alike):
            text = ".".join(_text(heads, is_complete=is_complete) for heads in pattern)
            found.setdefault(text, []).extend(map(".".join, itertools.product(*pattern)))
    return found


def ranges(numbers: Iterable[int], *, is_complete: bool = False) -> str:
    """Return numbers as ranges, such as `0-3,7`.

    The middle of many ranges is left out, unless `is_complete`.
    """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    texts = [f"{low}" if low == high else f"{low}-{high}" for low, high in found]
    return ",".join(texts if is_complete else _some(texts))


def _merged(names: Sequence[_Heads]) -> list[_Pattern]:
    """Join the first parts that have the same continuations; later parts are joined first."""
    if not names[0]:
        return [()]
    tails: dict[str, list[_Heads]] = {}
    for name in names:
        tails.setdefault(name[0], []).append(name[1:])
    heads: dict[tuple[_Pattern, ...], list[str]] = {}
    for head, some in tails.items():
        heads.setdefault(tuple(_merged(some)), []).append(head)
    return [(tuple(some), *tail) for of_tail, some in heads.items() for tail in of_tail]


def _text(heads: _Heads, *, is_complete: bool) -> str:
    if len(heads) == 1:
        return heads[0]
    if all(_is_number(head) for head in heads):
        return f"{{{ranges(map(int, heads), is_complete=is_complete)}}}"
    words = [head.split("_") for head in heads]
    start = _common(words)
    stop = _common([some[start:][::-1] for some in words])
    middles = ["_".join(some[start : len(some) - stop]) for some in words]
    inside = ",".join(middles if is_complete else _some(middles))
    first = words[0]
    return "_".join([*first[:start], f"{{{inside}}}", *first[len(first) - stop :]])


def _is_number(text: str) -> bool:
    # Only ASCII digits, and no leading zeros as in 007: a range must give back the same names.
    return text.isascii() and text.isdecimal() and str(int(text)) == text


def _common(words: Sequence[Sequence[str]]) -> int:
    """Count the leading words that all lists share; at least one word of each is not counted."""
    count = 0
    for column in zip(*(some[:-1] for some in words), strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _some(texts: Sequence[str]) -> Sequence[str]:
    if len(texts) <= _SHOWN:
        return texts
    return [*texts[: _SHOWN - 2], "...", texts[-1]]
