"""Loop nests over flat indices, and the positions that two nests share.

Pure: integers in, integers out. A nest visits `start + sum(i * step)` for each combination of the
loop indices `i`. A copy is a pair of nests: the positions that it reads, and the positions that it
writes. This module finds the positions that two copies both read, for any steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Loop = tuple[int, int, int]
"""`(extent, step, to_step)` of a loop: `step` counts positions read, `to_step` those written."""

Meeting = tuple[int, int, tuple[Loop, ...]]
"""`(first start, second start, loops)`: elements that two copies both read.

Starts and steps count the positions that each copy writes. `loops` holds `(extent, step of the
first copy, step of the second copy)`.
"""

# No layout of a real model cuts a copy into more pieces than this.
MAX_MEETINGS = 100_000


def span(loops: Iterable[Loop]) -> int:
    """Count the positions from the first to the last one that the loops read, both included."""
    return 1 + sum((extent - 1) * step for extent, step, _ in loops)


def visits_once(loops: Iterable[Loop]) -> bool:
    """Whether the step of each loop is at least the span of all loops with smaller steps.

    Such a nest reads no position twice.
    """
    reach = 1
    for extent, step, _ in sorted(loops, key=_step):
        if step < reach:
            return False
        reach += (extent - 1) * step
    return True


def merged(loops: Iterable[Loop]) -> tuple[Loop, ...]:
    """Return the same copy in as few loops as possible, largest step first."""
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
        first: Loops of a copy that starts to read at position 0, as `merged` returns them.
        second: Loops of a copy that starts to read at position `gap`, as `merged` returns them.
        gap: Distance between the two starts; may be negative.

    Returns:
        The elements that both copies read. The starts count the positions written, each from the
        start of its own copy.

    Raises:
        SpecError: If there are more than `MAX_MEETINGS` meetings.
    """
    found = []
    for meeting in _meet(first, second, gap):
        found.append(meeting)
        if len(found) > MAX_MEETINGS:
            raise SpecError(
                "a tensor is cut into too many pieces",
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
    """Intersect two loop nests whose outer loops have the same step."""
    (extent, step, to), (other_extent, _, other_to) = first[0], second[0]
    inner, other_inner = first[1:], second[1:]
    # Step `i` of the first outer loop meets step `i - ahead` of the second. Several values of
    # `ahead` are possible: one inner nest can overlap two or more outer steps of the other.
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
    """Intersect two loop nests. The first has the larger outer step."""
    (extent, step, to), inner = first[0], first[1:]
    if second and second[0][0] * second[0][1] > step:
        # The second loop runs past one step of the first. Cut both at the least common multiple
        # of their steps, so that their outer steps become equal.
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
    # The second nest meets only a few steps of the first: intersect them one at a time.
    low = max(0, -((span(inner) - 1 - gap) // step))
    high = min(extent - 1, (gap + span(second) - 1) // step)
    for i in range(low, high + 1):
        for start, other, loops in _meet(inner, second, gap - i * step):
            yield start + i * to, other, loops


def _cut(nest: tuple[Loop, ...], size: int) -> Iterator[tuple[int, tuple[Loop, ...]]]:
    """Cut the outer loop into turns of `size` steps and a remainder.

    Yields the first step and the nest of each of the two.
    """
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
