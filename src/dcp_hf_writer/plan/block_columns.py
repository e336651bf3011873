"""The blocks of an export as columns of numbers: what ranks report, and what digests files hold.

Pure. A job of a thousand ranks has millions of blocks, too many for one object each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dcp_hf_writer.errors import CoverageError
from dcp_hf_writer.plan.parse_manifest_blocks import Places
from dcp_hf_writer.tensors.boxes import ByteRuns
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dcp_hf_writer.plan.layout import PartTarget
    from dcp_hf_writer.plan.written_block import WrittenBlock

Integers = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class BlockColumns:
    """Blocks that ranks wrote, one row each; a block without elements has no row.

    The bytes of a block are runs of equal length, as in `ByteRuns`.
    """

    file: npt.NDArray[np.uint32]
    """Number of the output file in the layout; shape `(blocks,)`, as of all columns but `loops`."""
    start: Integers
    """Offset of the first run in that file, in bytes."""
    nbytes: Integers
    """Length of each run, in bytes."""
    loop_count: npt.NDArray[np.uint32]
    """Number of loops over the runs; 0 for a block that is one run."""
    loops: Integers
    """`(count, stride in bytes)` of the loops of all blocks, one block after another, outermost
    loop first; shape `(loops, 2)`."""
    digest: Digests
    """xxh3_64 of the bytes of each block in file order; empty in a report."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.start)

    @property
    def first_loop(self) -> Integers:
        """Row in `loops` of the first loop of each block."""
        counts = self.loop_count.astype(np.int64)
        return np.cumsum(counts) - counts

    def extents(self) -> Integers:
        """Return the distance from the first to the last byte of each block, plus one."""
        spans = (self.loops[:, 0] - 1) * self.loops[:, 1]
        return self.nbytes + _sums(spans, self.loop_count)

    def data_nbytes(self) -> int:
        """Return the number of bytes in all blocks."""
        looped = np.flatnonzero(self.loop_count)
        solid = int(self.nbytes.sum()) - int(self.nbytes[looped].sum())
        return solid + sum(one.count * one.nbytes for one in self.runs(looped))

    def runs(self, rows: npt.NDArray[np.intp]) -> list[ByteRuns]:
        """Return the bytes of some blocks."""
        first = self.first_loop[rows]
        loops = [
            tuple((int(count), int(stride)) for count, stride in self.loops[low : low + many])
            for low, many in zip(first.tolist(), self.loop_count[rows].tolist(), strict=True)
        ]
        return list(map(ByteRuns, self.start[rows].tolist(), self.nbytes[rows].tolist(), loops))

    def take(self, rows: npt.NDArray[np.intp]) -> BlockColumns:
        """Return some blocks, in the order of `rows`."""
        counts, first = self.loop_count[rows], self.first_loop[rows]
        inner = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return BlockColumns(
            self.file[rows],
            self.start[rows],
            self.nbytes[rows],
            counts,
            self.loops[np.repeat(first, counts) + inner.astype(np.int64)],
            self.digest[rows] if len(self.digest) else self.digest,
        )

    def without_digests(self) -> BlockColumns:
        """Return the same blocks without their digests, as a report holds them."""
        return BlockColumns(
            self.file, self.start, self.nbytes, self.loop_count, self.loops, np.empty(0, np.uint64)
        )


def _sums(values: Integers, counts: npt.NDArray[np.uint32]) -> Integers:
    """Return the sums of consecutive groups of values; the groups have `counts` values."""
    sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(values)))
    stops = np.cumsum(counts.astype(np.int64))
    found: Integers = sums[stops] - sums[stops - counts]
    return found


def columns_of(rows: Sequence[tuple[int, ByteRuns, int]]) -> BlockColumns:
    """Return columns of blocks given as `(file, runs, digest)`."""
    loops = [loop for _, runs, _ in rows for loop in runs.loops]
    return BlockColumns(
        np.array([file for file, _, _ in rows], np.uint32),
        np.array([runs.start for _, runs, _ in rows], np.int64),
        np.array([runs.nbytes for _, runs, _ in rows], np.int64),
        np.array([len(runs.loops) for _, runs, _ in rows], np.uint32),
        np.array(loops, np.int64).reshape(len(loops), 2),
        np.array([digest for _, _, digest in rows], np.uint64),
    )


def joined(parts: Sequence[BlockColumns]) -> BlockColumns:
    """Return the blocks of several columns, one after another."""
    if len(parts) == 1:
        return parts[0]
    parts = parts or [columns_of([])]
    return BlockColumns(
        *(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(parts[0]))
    )


def targets_by_key(
    targets: Mapping[str, Sequence[PartTarget]],
) -> dict[str, PartTarget]:
    """Return a target of each HuggingFace tensor, by its key: all have the same place on disk."""
    return {one.key: one for parts in targets.values() for one in parts}


def pack_blocks(
    blocks: Iterable[WrittenBlock], targets: Mapping[str, PartTarget], *, rank: int
) -> BlockColumns:
    """Turn the blocks that a rank wrote into columns, in the order of files and bytes.

    Args:
        blocks: The blocks; those without elements are left out.
        targets: The tensors of the export, by key.
        rank: Rank that wrote them, for the error.

    Raises:
        CoverageError: If a block is not in the export, or not within its tensor.
    """
    rows, places = [], Places()
    for block in blocks:
        target = targets.get(block.key)
        if target is None:
            msg = "a rank reports a tensor that is not in the export"
            raise CoverageError(msg, rank=rank, phase="finish", key=block.key)
        extent = [list(one) if isinstance(one, tuple) else one for one in block.extent]
        try:
            place = places.find(
                list(block.offsets), extent, tuple(target.shape), ITEMSIZE[target.dtype]
            )
        except ValueError as error:
            raise CoverageError(
                "a rank reports a block that reaches outside the tensor",
                rank=rank,
                phase="finish",
                key=block.key,
                expected=f"a block {error}",
                found=f"a block at {list(block.offsets)} of {extent}",
            ) from error
        if place.runs is not None:
            runs = place.runs
            runs = ByteRuns(target.start + runs.start, runs.nbytes, runs.loops)
            rows.append((target.file, runs, int(block.digest, 16)))
    # Ranks write in many orders; in this one, equal blocks give equal digests files.
    return columns_of(sorted(rows, key=lambda row: (row[0], row[1].start)))
