"""Nests of loops over flat indices, and where two of them meet.

Pure: integers in, integers out. A nest visits `start + sum(i * step)` for each `i` of each loop.
What one copy leaves in memory and another one reads from there is found by letting the two nests
meet, whatever their steps are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Loop = tuple[int, int, int]
"""`(extent, step, to_step)`: a loop of a copy, in positions read and in positions written."""

Meeting = tuple[int, int, tuple[Loop, ...]]
"""`(start, start, loops)`: what two copies have in common, in positions of their other ends."""

# A copy that shatters into more pieces than this is no layout that a model is stored in.
MAX_MEETINGS = 100_000


def span(loops: Iterable[Loop]) -> int:
    """Return the number of positions from the first to the last that loops read, both included."""
    return 1 + sum((extent - 1) * step for extent, step, _ in loops)


def visits_once(loops: Iterable[Loop]) -> bool:
    """Whether each loop steps over all that the smaller ones read; such a nest repeats nothing."""
    reach = 1
    for extent, step, _ in sorted(loops, key=_step):
        if step < reach:
            return False
        reach += (extent - 1) * step
    return True


def merged(loops: Iterable[Loop]) -> tuple[Loop, ...]:
    """Return the same copy in as few loops as can be, largest step first."""
    found: list[Loop] = []
    for extent, step, to_step in sorted(loops, key=_step, reverse=True):
        if extent == 1:
            continue
        if found and found[-1][1:] == (extent * step, extent * to_step):
            found[-1] = (found[-1][0] * extent, step, to_step)
        else:
            found.append((extent, step, to_step))
    return tuple(found)


def meetings(first: tuple[Loop, ...], second: tuple[Loop, ...], gap: int) -> list[Meeting]:
    """Find the positions that two copies both read.

    Args:
        first: Loops of a copy that reads from position 0 on, merged.
        second: Loops of a copy that reads from position `gap` on, merged.
        gap: May be negative.

    Returns:
        What they have in common: the position where the first copy writes, counted from its start,
        the same of the second copy, and loops `(extent, step of the first, step of the second)`.

    Raises:
        SpecError: If there are more than `MAX_MEETINGS` of them.
    """
    found = []
    for meeting in _meet(first, second, gap):
        found.append(meeting)
        if len(found) > MAX_MEETINGS:
            raise SpecError(
                "a tensor is cut too small to be described",
                phase="plan",
                expected=f"at most {MAX_MEETINGS} pieces",
            )
    return found


def _step(loop: Loop) -> int:
    return loop[1]


def _meet(first: tuple[Loop, ...], second: tuple[Loop, ...], gap: int) -> Iterator[Meeting]:
    if gap >= span(first) or gap + span(second) <= 0:
        return
    if not first and not second:
        yield 0, 0, ()
    elif not first or (second and second[0][1] > first[0][1]):
        for start, other, loops in _meet(second, first, -gap):
            yield other, start, tuple((n, s, f) for n, f, s in loops)
    elif second and second[0][1] == first[0][1]:
        yield from _meet_in_step(first, second, gap)
    else:
        yield from _meet_slower(first, second, gap)


def _meet_in_step(first: tuple[Loop, ...], second: tuple[Loop, ...], gap: int) -> Iterator[Meeting]:
    """Let two nests meet whose outer loops have the same step."""
    (extent, step, to), (other_extent, _, other_to) = first[0], second[0]
    inner, other_inner = first[1:], second[1:]
    # The outer loops run side by side, `ahead` steps apart; where an inner nest reaches into the
    # next step of the other, there are several such distances.
    least = -((span(inner) - 1 - gap) // step)
    most = (gap + span(other_inner) - 1) // step
    for ahead in range(least, most + 1):
        low = max(0, ahead)
        count = min(extent, other_extent + ahead) - low
        if count < 1:
            continue
        for start, other, loops in _meet(inner, other_inner, gap - ahead * step):
            outer = ((count, to, other_to),) if count > 1 else ()
            yield start + low * to, other + (low - ahead) * other_to, (*outer, *loops)


def _meet_slower(first: tuple[Loop, ...], second: tuple[Loop, ...], gap: int) -> Iterator[Meeting]:
    """Let two nests meet of which the first has the larger step."""
    (extent, step, to), inner = first[0], first[1:]
    if second and second[0][0] * second[0][1] > step:
        # The smaller loop goes on past a step of the larger: bring both to one step.
        other_step, other_to = second[0][1:]
        common = math.lcm(step, other_step)
        reaches = extent * step, second[0][0] * other_step
        if common <= min(reaches) and common < max(reaches):
            for skipped, one in _cut(first, common // step):
                for other_skipped, two in _cut(second, common // other_step):
                    moved = gap + other_skipped * other_step - skipped * step
                    for start, other, loops in _meet(one, two, moved):
                        yield start + skipped * to, other + other_skipped * other_to, loops
            return
    # The second nest meets few of the steps: take them one at a time.
    low = max(0, -((span(inner) - 1 - gap) // step))
    high = min(extent - 1, (gap + span(second) - 1) // step)
    for i in range(low, high + 1):
        for start, other, loops in _meet(inner, second, gap - i * step):
            yield start + i * to, other, loops


def _cut(nest: tuple[Loop, ...], size: int) -> Iterator[tuple[int, tuple[Loop, ...]]]:
    """Cut the outer loop into turns of `size` steps and a rest, each with its first step."""
    (extent, step, to), inner = nest[0], nest[1:]
    turns, rest = divmod(extent, size)
    if extent == size:
        yield 0, nest
        return
    turn = ((size, step, to),) if size > 1 else ()
    yield 0, ((turns, step * size, to * size), *turn, *inner)
    if rest:
        loop = ((rest, step, to),) if rest > 1 else ()
        yield turns * size, (*loop, *inner)
