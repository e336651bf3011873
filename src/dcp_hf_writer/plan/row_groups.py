"""Which rank of a host writes which rows, where the ranks of the host hold the columns.

A column shard is many short runs of its output file, at equal distances. Each run costs a system
call, and the ranks dirty the same pages in turns. Where the runs of several shards fill the file
between them without a gap, each rank can write a part of the rows whole. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.tensors.boxes import whole
from dcp_hf_writer.tensors.copy_cuts import elements_between
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.strided_copies import copy_of_box, hf_box

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.tensors.boxes import Box, ByteRuns, Shape

MAX_RUN_NBYTES = 32 << 10
"""Longer runs are written as they are: a copy of one would cost more than its system call."""

_FEWEST_RUNS = 2


@dataclass(frozen=True, slots=True)
class ColumnShard:
    """Equal runs of an output file at equal distances, and where their elements lie in memory.

    Plain values: it travels to the other ranks of the host as JSON.
    """

    key: str
    """HuggingFace name."""
    file: int
    """Number of the output file in the layout."""
    dtype: str
    """safetensors dtype on disk."""
    start: int
    """Offset of the first run in the file, in bytes."""
    nbytes: int
    """Length of each run, in bytes."""
    count: int
    """Number of runs, one a row; at least 2."""
    stride: int
    """Distance between the starts of two runs, in bytes."""
    held_dtype: str
    """safetensors dtype of the elements in memory."""
    offset: int
    """First byte of the first element in the memory of the rank."""
    extents: Shape
    """Extents of the loops over the elements in memory, in the order of the file."""
    strides: Shape
    """Steps of these loops, in elements."""

    @property
    def row_loops(self) -> int:
        """How many of the loops, from the first one on, move from row to row."""
        reached = 1
        for number, extent in enumerate(self.extents):
            if reached == self.count:
                return number
            reached *= extent
        return len(self.extents)

    @property
    def rows_per_step(self) -> int:
        """Rows in one step of the outermost loop."""
        return self.count // self.extents[0]


def column_shard(
    runs: ByteRuns,
    *,
    key: str,
    file: int,
    dtype: str,
    held_dtype: str,
    offset: int,
    extents: Shape,
    strides: Shape,
) -> ColumnShard | None:
    """Return a block as a column shard; `None` if it is not one, or if its runs are long.

    Args:
        runs: Bytes of the block in its output file.
        key: HuggingFace name.
        file: Number of the output file.
        dtype: safetensors dtype on disk.
        held_dtype: safetensors dtype in memory.
        offset: First byte of the first element in memory.
        extents: Extents of the loops over the elements in memory, in the order of the file.
        strides: Steps of these loops, in elements.
    """
    if len(runs.loops) != 1 or runs.nbytes > MAX_RUN_NBYTES or dtype == "F4":
        return None
    ((count, stride),) = runs.loops
    # Specs may hold numbers of numpy, which JSON does not know.
    extents, strides = tuple(map(int, extents)), tuple(map(int, strides))
    if count < _FEWEST_RUNS:
        return None
    one = ColumnShard(
        *(key, file, dtype, int(runs.start), int(runs.nbytes), int(count), int(stride)),
        *(held_dtype, offset, extents, strides),
    )
    row_extents, row_strides = _merged(extents[: one.row_loops], strides[: one.row_loops])
    return ColumnShard(
        *(key, file, dtype, one.start, one.nbytes, one.count, one.stride, held_dtype, offset),
        (*row_extents, *extents[one.row_loops :]),
        (*row_strides, *strides[one.row_loops :]),
    )


def _merged(extents: Shape, strides: Shape) -> tuple[Shape, Shape]:
    """Join adjacent loops that take equal steps through memory."""
    found: list[tuple[int, int]] = []
    for extent, stride in zip(extents, strides, strict=True):
        if found and found[-1][1] == extent * stride:
            found[-1] = (found[-1][0] * extent, stride)
        else:
            found.append((extent, stride))
    return tuple(n for n, _ in found), tuple(s for _, s in found)


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Column shards of one tensor that fill a part of its file together, in the order of columns.

    All have the same number of rows at the same distance.
    """

    members: tuple[tuple[int, ColumnShard], ...]
    """Rank within the host, and its shard."""
    unit_rows: int
    """Rows that are put together at once: every shard can be cut between two units."""

    @property
    def first(self) -> ColumnShard:
        """The shard with the first columns."""
        return self.members[0][1]

    @property
    def unit_nbytes(self) -> int:
        """Bytes of one unit in the file."""
        return self.unit_rows * self.first.stride

    @property
    def units(self) -> int:
        """Number of units."""
        return self.first.count // self.unit_rows

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that hold the shards, each once, ascending."""
        return tuple(sorted({rank for rank, _ in self.members}))

    def share_of(self, rank: int, *, turn: int) -> range:
        """Return the units that a rank of the host writes: an equal part for each member.

        Args:
            rank: The rank.
            turn: Number of the group. It decides who gets the larger parts, so that they do not
                all go to one rank.
        """
        ranks = self.ranks
        if rank not in ranks:
            return range(0)
        number, count = (ranks.index(rank) + turn) % len(ranks), len(ranks)
        return range(self.units * number // count, self.units * (number + 1) // count)

    def start_of(self, unit: int) -> int:
        """Return the offset of a unit in the file, in bytes."""
        return self.first.start + unit * self.unit_nbytes


def row_groups(
    shards: Mapping[int, Iterable[ColumnShard]], *, max_unit_nbytes: int
) -> list[RowGroup]:
    """Find the shards that together fill a part of a file without a gap.

    Every rank of the host gets the same result from the same shards. A shard that is in no group
    is written by its rank as it is.

    Args:
        shards: The column shards of each rank of the host.
        max_unit_nbytes: Size of the smallest bounce buffer of the ranks, in bytes. A unit must fit.
    """
    alike: dict[tuple[object, ...], list[tuple[int, ColumnShard]]] = {}
    for rank in sorted(shards):
        for one in shards[rank]:
            like = (one.file, one.key, one.dtype, one.count, one.stride)
            alike.setdefault(like, []).append((rank, one))
    groups = (_group(rows) for members in alike.values() for rows in _rows_of(members))
    return [one for one in groups if one is not None and one.unit_nbytes <= max_unit_nbytes]


def _rows_of(
    members: Sequence[tuple[int, ColumnShard]],
) -> Iterator[list[tuple[int, ColumnShard]]]:
    """Yield the shards of each set of rows, as far as their first runs follow each other."""
    ordered = sorted(members, key=lambda member: (member[1].start, member[0]))
    row: list[tuple[int, ColumnShard]] = []
    for member in ordered:
        shard = member[1]
        if row and shard.start != row[-1][1].start + row[-1][1].nbytes:
            row = []
        row.append(member)
        if shard.start + shard.nbytes - row[0][1].start == shard.stride:
            yield row
            row = []


def _group(members: Sequence[tuple[int, ColumnShard]]) -> RowGroup | None:
    """Return the group of shards that fill their rows; `None` if one rank alone holds them."""
    if len({rank for rank, _ in members}) == 1:
        return None
    unit = math.lcm(*(shard.rows_per_step for _, shard in members))
    count = members[0][1].count
    return RowGroup(tuple(members), unit) if count % unit == 0 else None


def boxes_between(shape: Shape, dtype: str, first: int, stop: int) -> list[Box]:
    """Return the boxes that a range of a tensor's bytes consists of, in the order of the bytes.

    Args:
        shape: Shape of the tensor; it has elements.
        dtype: safetensors dtype.
        first: First byte, counted from the first byte of the tensor; the first of an element.
        stop: One past the last byte.
    """
    size = ITEMSIZE[dtype]
    parts = elements_between(copy_of_box(whole(shape)), first // size, stop // size)
    boxes = [hf_box(part) for part in parts]
    assert all(box is not None for box in boxes)
    return [box for box in boxes if box is not None]
