"""Cut the byte runs of a block at offsets of the file, and at positions within the block.

Pure. A *position* counts the bytes of a block in the order of its runs, from 0; an *offset* counts
the bytes of the file. The runs of a block ascend in the file, so both orders agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from dcp_hf_writer.tensors.boxes import ByteRuns


@dataclass(frozen=True, slots=True)
class RunRow:
    """Runs of equal length at equal distances."""

    start: int
    """Offset of the first run."""
    nbytes: int
    """Length of each run, in bytes."""
    count: int
    """Number of runs; at least 1."""
    stride: int
    """Distance of their starts, in bytes; 0 for a single run."""


def total_nbytes(runs: ByteRuns) -> int:
    """Return the number of bytes in all runs."""
    return runs.nbytes * runs.count


def last_offset(runs: ByteRuns) -> int:
    """Return one past the last byte of the last run."""
    return runs.start + runs.nbytes + sum((count - 1) * stride for count, stride in runs.loops)


def positions_of(runs: ByteRuns, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each offset how many bytes of the runs lie before it in the file.

    Args:
        runs: The runs of a block.
        offsets: Offsets in the file, in any order.
    """
    left = np.asarray(offsets, np.int64) - runs.start
    found = np.zeros_like(left)
    inner = total_nbytes(runs)
    for count, stride in runs.loops:
        inner //= count
        steps = np.clip(left // stride, 0, count)
        found += steps * inner
        # Behind the last step of a loop, no inner loop counts any more.
        left = np.where(steps == count, 0, left - steps * stride)
    return found + np.clip(left, 0, runs.nbytes)


def rows_between(runs: ByteRuns, first: int, stop: int) -> Iterator[RunRow]:
    """Yield the parts of the runs between two positions, ascending.

    Args:
        runs: The runs of a block.
        first: First position.
        stop: One past the last position.
    """
    if first >= stop:
        return
    nbytes = runs.nbytes
    (at, skipped), (end, rest) = divmod(first, nbytes), divmod(stop, nbytes)
    if at == end:
        yield RunRow(_start_of(runs, at) + skipped, stop - first, 1, 0)
        return
    if skipped:
        yield RunRow(_start_of(runs, at) + skipped, nbytes - skipped, 1, 0)
        at += 1
    row, stride = runs.loops[-1] if runs.loops else (1, 0)
    while at < end:
        count = min(row - at % row, end - at)
        yield RunRow(_start_of(runs, at), nbytes, count, stride if count > 1 else 0)
        at += count
    if rest:
        yield RunRow(_start_of(runs, end), rest, 1, 0)


def _start_of(runs: ByteRuns, number: int) -> int:
    """Return the offset of a run, counted in the order of the loops."""
    start, inner = runs.start, math.prod(count for count, _ in runs.loops)
    for count, stride in runs.loops:
        inner //= count
        step, number = divmod(number, inner)
        start += step * stride
    return start
