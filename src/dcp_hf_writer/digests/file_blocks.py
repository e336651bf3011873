"""The digests of one output file, in the order of its bytes.

Blocks that interleave form a group: one pass over their bytes feeds all their digests. Bytes that
no block covers form a group of their own, so that a pass over it finds the fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dcp_hf_writer.digests.digest_sweep import Digest, Span, extent_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from dcp_hf_writer.plan.block_columns import BlockColumns, Integers


@dataclass(frozen=True, slots=True, eq=False)
class FileBlocks:
    """Blocks of one output file, and the groups that they form."""

    blocks: BlockColumns
    """The blocks, by their first byte."""
    rank: Integers
    """Rank that wrote each block; shape `(blocks,)`."""
    data_start: int
    """First byte after the header of the file."""
    nbytes: int
    """Size of the file."""
    is_complete: bool
    """Whether the digests of all ranks could be read; otherwise bytes without a block are no
    fault of their own."""
    start: Integers = field(init=False)
    """First byte of each group, ascending; shape `(groups,)`."""
    stop: Integers = field(init=False)
    """One past the last byte of each group."""
    first: Integers = field(init=False)
    """First block of each group; equal to `last` in a group without blocks."""
    last: Integers = field(init=False)
    """One past the last block of each group."""

    def __post_init__(self) -> None:
        """Find the groups."""
        begins = self.blocks.start
        ends = np.maximum.accumulate(begins + self.blocks.extents()) if len(begins) else begins
        is_first = np.ones(len(begins), bool)
        is_first[1:] = begins[1:] >= ends[:-1]
        first = np.flatnonzero(is_first).astype(np.int64)
        last = np.append(first[1:], len(begins)).astype(np.int64)[: len(first)]
        start, stop = begins[first], ends[last - 1]
        if self.is_complete:
            gap_start = np.concatenate(([self.data_start], stop)).astype(np.int64)
            gap_stop = np.concatenate((start, [self.nbytes])).astype(np.int64)
            is_gap = gap_start < gap_stop
            at = np.concatenate((first, [len(begins)])).astype(np.int64)[is_gap]
            start = np.concatenate((start, gap_start[is_gap]))
            stop = np.concatenate((stop, gap_stop[is_gap]))
            first, last = np.concatenate((first, at)), np.concatenate((last, at))
            order = np.argsort(start, kind="stable")
            start, stop, first, last = start[order], stop[order], first[order], last[order]
        for name, column in zip(
            ("start", "stop", "first", "last"), (start, stop, first, last), strict=True
        ):
            object.__setattr__(self, name, column)

    def near(self, start: int, stop: int) -> range:
        """Return the groups that have bytes in `[start, stop)`."""
        low = int(np.searchsorted(self.stop, start, side="right"))
        return range(low, max(low, int(np.searchsorted(self.start, stop, side="left"))))

    def ranks_in(self, start: int, stop: int) -> list[int]:
        """Return the ranks whose blocks begin in `[start, stop)`, ascending."""
        low, high = np.searchsorted(self.blocks.start, (start, stop))
        return sorted(set(self.rank[low:high].tolist()))

    def work(
        self, groups: Sequence[int], key_at: Callable[[int], str | None]
    ) -> tuple[list[Span], list[Digest]]:
        """Return what one pass over some groups reads, and the digests that it finds.

        Args:
            groups: Numbers of the groups, ascending.
            key_at: Returns the key of the tensor that holds a byte of the file.
        """
        spans, digests = [], []
        for group in groups:
            rows: npt.NDArray[np.intp] = np.arange(self.first[group], self.last[group])
            start, stop = int(self.start[group]), int(self.stop[group])
            key, parts = key_at(start), []
            for runs, rank, digest in zip(
                self.blocks.runs(rows),
                self.rank[rows].tolist(),
                self.blocks.digest[rows].tolist(),
                strict=True,
            ):
                one = Digest(f"{digest:016x}", "a block", key=key, rank=rank, start=runs.start)
                one.stop = runs.start + extent_of(runs)
                digests.append(one)
                parts.append((one, runs))
            spans.append(Span(start, stop, tuple(parts), key))
        return spans, digests
