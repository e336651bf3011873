"""Find the first byte of a range that runs of bytes do not cover exactly once.

Pure. Shards along columns cut a tensor into runs that interleave. If all blocks repeat with one
period, one period tells everything; otherwise the runs are written out and sorted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dcp_hf_writer.tensors.boxes import ByteRuns

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Integers = npt.NDArray[np.int64]

MOST_RUNS = 8 << 20
"""Most runs that are written out; each takes about 40 bytes of memory."""


@dataclass(frozen=True, slots=True)
class RunsFault:
    """The first bytes that are not covered exactly once."""

    start: int
    """First byte."""
    stop: int
    """One past the last byte that has the same fault."""
    owners: tuple[int, ...]
    """Numbers of the blocks that cover these bytes: none for a gap, two of an overlap."""


class TooManyRunsError(Exception):
    """The blocks have more than `MOST_RUNS` runs, and no common period."""


def runs_fault(blocks: Sequence[ByteRuns], start: int, stop: int) -> RunsFault | None:
    """Return the first bytes of a range that blocks do not cover once; `None` if there are none.

    Args:
        blocks: Blocks of bytes, all within the range; each holds at least one byte.
        start: First byte of the range.
        stop: One past its last byte.

    Raises:
        TooManyRunsError: If the blocks have more than `MOST_RUNS` runs and no common period.
    """
    rows = tuple((one.start - start, one.nbytes, one.loops) for one in blocks)
    found = _fault(rows, stop - start)
    if found is None:
        return None
    return RunsFault(start + found.start, start + found.stop, found.owners)


_Rows = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


# Cached: the layers of a model have the same cuts, and so has every save of a run.
@functools.lru_cache(maxsize=32)
def _fault(rows: _Rows, nbytes: int) -> RunsFault | None:
    rows, nbytes = _one_period(rows, nbytes)
    blocks = [ByteRuns(*row) for row in rows]
    if sum(one.count for one in blocks) > MOST_RUNS:
        raise TooManyRunsError
    starts = [_starts(one) for one in blocks]
    owners = np.repeat(np.arange(len(blocks)), [len(one) for one in starts])
    begins = np.concatenate([np.zeros(0, np.int64), *starts])
    stops = begins + np.array([one.nbytes for one in blocks], np.int64)[owners]
    order = np.argsort(begins, kind="stable")
    return first_fault(begins[order], stops[order], owners[order], 0, nbytes)


def first_fault(
    begins: Integers, stops: Integers, owners: npt.NDArray[np.intp], start: int, stop: int
) -> RunsFault | None:
    """Return the first bytes of `[start, stop)` that ranges do not cover exactly once.

    Args:
        begins: First byte of each range, ascending; shape `(ranges,)`.
        stops: One past the last byte of each.
        owners: Block that each range belongs to.
        start: First byte to cover.
        stop: One past the last byte to cover.
    """
    reached = np.concatenate((np.array([start], np.int64), stops))
    wrong = np.flatnonzero(np.concatenate((begins, [stop])) != reached)
    if not len(wrong):
        return None
    at = int(wrong[0])
    begin = int(begins[at]) if at < len(begins) else stop
    done = int(reached[at])
    if begin > done:
        return RunsFault(done, begin, ())
    if at == len(begins):
        return RunsFault(stop, done, (int(owners[at - 1]),))
    last = min(done, int(stops[at]))
    owner = () if at == 0 else (int(owners[at - 1]),)
    return RunsFault(begin, last, (*owner, int(owners[at])))


def _one_period(rows: _Rows, nbytes: int) -> tuple[_Rows, int]:
    """Reduce blocks that all repeat with one period to their first period."""
    while rows:
        outer = {loops[0] if loops else None for _, _, loops in rows}
        period = next(iter(outer))
        if len(outer) > 1 or period is None or period[0] * period[1] != nbytes:
            break
        inner = tuple((start, size, loops[1:]) for start, size, loops in rows)
        reach = [
            start + size + sum((count - 1) * stride for count, stride in loops)
            for start, size, loops in inner
        ]
        if max(reach) > period[1]:
            break
        rows, nbytes = inner, period[1]
    return rows, nbytes


def _starts(block: ByteRuns) -> Integers:
    starts = np.array([block.start], np.int64)
    for count, stride in block.loops:
        steps = np.arange(count, dtype=np.int64) * stride
        starts = (starts[:, None] + steps).reshape(-1)
    return starts
