"""Which rank of a host writes which rows of a tensor whose columns the ranks of the host hold.

A column shard is many short runs of its file: each costs a system call, and the ranks dirty the
same pages in turns. If the ranks of a host hold whole rows together, each of them can write a part
of the rows whole. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.tensors.boxes import Box, Shape
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.strided_copies import strides_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MAX_RUN_NBYTES = 256 << 10
"""Longer runs are written as they are: the system call no longer counts."""


@dataclass(frozen=True, slots=True)
class ColumnShard:
    """A block of a HuggingFace tensor that a rank holds, and where its elements lie.

    Plain values: it travels to the other ranks of the host as JSON.
    """

    key: str
    """HuggingFace name."""
    file: int
    """Number of the output file in the layout."""
    start: int
    """Offset of the tensor's first byte in that file."""
    dtype: str
    """safetensors dtype on disk."""
    shape: Shape
    """Shape of the tensor on disk."""
    box: Box
    """The elements of that tensor."""
    held_dtype: str
    """safetensors dtype of the elements in memory."""
    offset: int
    """First byte of the first element in the staging slab of the rank."""
    extents: Shape
    """Extents of the view of the elements in memory, in the row-major order of the box."""
    strides: Shape
    """Its strides, in elements."""

    @property
    def split_dim(self) -> int:
        """The innermost dimension of which the box has only a part; -1 if it has all elements."""
        cut = [d for d, n in enumerate(self.shape) if self.box.sizes[d] != n]
        return cut[-1] if cut else -1

    @property
    def columns(self) -> tuple[int, int]:
        """First column and number of columns of a row, in elements; see `RowGroup`."""
        inner = math.prod(self.shape[self.split_dim + 1 :])
        return self.box.offsets[self.split_dim] * inner, self.box.sizes[self.split_dim] * inner


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Shards of one tensor that together are whole rows, in the order of their columns.

    A row is all elements along the split dimension and the dimensions within it.
    """

    members: tuple[tuple[int, ColumnShard], ...]
    """Rank within the host, and its shard. All have the same rows and the same outer loop."""
    steps: int
    """Extent of the outer loop."""
    rows_per_step: int
    """Rows of each of its steps."""

    @property
    def first(self) -> ColumnShard:
        """The shard with the first columns."""
        return self.members[0][1]

    @property
    def row_numel(self) -> int:
        """Elements of a row."""
        return math.prod(self.first.shape[self.first.split_dim :])

    @property
    def step_nbytes(self) -> int:
        """Bytes on disk of the rows of one step."""
        return self.rows_per_step * self.row_numel * ITEMSIZE[self.first.dtype]

    def share_of(self, rank: int) -> range:
        """Return the steps whose rows a rank of the host writes: an equal part for each member."""
        ranks = [member for member, _ in self.members]
        if rank not in ranks:
            return range(0)
        number, count = ranks.index(rank), len(ranks)
        return range(self.steps * number // count, self.steps * (number + 1) // count)

    def start_of(self, step: int) -> int:
        """Return the first byte in the file of the rows of a step."""
        one = self.first
        strides = strides_of(one.shape)
        rows = zip(one.box.offsets[: one.split_dim], strides, strict=False)
        return (
            one.start + sum(i * s for i, s in rows) * ITEMSIZE[one.dtype] + step * self.step_nbytes
        )

    def box_of(self, steps: range) -> Box:
        """Return the elements of the tensor in the rows of some steps."""
        one, dim = self.first, _row_dim(self.first)
        per_step = self.rows_per_step // math.prod(one.shape[dim + 1 : one.split_dim])
        offsets = (*one.box.offsets[: one.split_dim], *(0 for _ in one.shape[one.split_dim :]))
        sizes = (*one.box.sizes[: one.split_dim], *one.shape[one.split_dim :])
        return Box(
            (*offsets[:dim], offsets[dim] + steps.start * per_step, *offsets[dim + 1 :]),
            (*sizes[:dim], len(steps) * per_step, *sizes[dim + 1 :]),
        )


def _row_dim(shard: ColumnShard) -> int:
    """Return the outermost dimension along which the rows of a shard run."""
    return next(d for d in range(shard.split_dim) if shard.box.sizes[d] > 1)


def is_column_shard(shard: ColumnShard) -> bool:
    """Whether a block consists of several short runs that lie at equal distances in the file."""
    dim = shard.split_dim
    if dim < 1 or shard.dtype == "F4" or math.prod(shard.box.sizes[:dim]) < 2:  # noqa: PLR2004
        return False
    # Dimensions between the outer one and the columns must be whole, or the rows have gaps.
    between = range(_row_dim(shard) + 1, dim)
    if any(shard.box.sizes[d] != shard.shape[d] for d in between):
        return False
    return shard.columns[1] * ITEMSIZE[shard.dtype] <= MAX_RUN_NBYTES


def row_groups(
    shards: Mapping[int, Iterable[ColumnShard]], *, max_step_nbytes: int
) -> list[RowGroup]:
    """Find the shards that together are whole rows.

    Every rank of the host gets the same result from the same shards. A shard that is in no group
    is written by its rank as it is.

    Args:
        shards: The column shards of each rank of the host.
        max_step_nbytes: Size of the smallest bounce buffer of the ranks, in bytes. The rows of one
            step must fit.
    """
    found: dict[tuple[object, ...], list[tuple[int, ColumnShard]]] = {}
    for rank in sorted(shards):
        for one in shards[rank]:
            rows = (one.box.offsets[: one.split_dim], one.box.sizes[: one.split_dim])
            found.setdefault((one.key, one.split_dim, rows), []).append((rank, one))
    groups = (_group_of(members) for members in found.values())
    return [one for one in groups if one is not None and one.step_nbytes <= max_step_nbytes]


def _group_of(members: Sequence[tuple[int, ColumnShard]]) -> RowGroup | None:
    members = sorted(members, key=lambda member: member[1].columns)
    ranks = {rank for rank, _ in members}
    first = members[0][1]
    at = 0
    for _, one in members:
        if one.columns[0] != at:
            return None
        at += one.columns[1]
    rows = math.prod(first.box.sizes[: first.split_dim])
    steps = first.extents[0]
    per_row_dim = math.prod(first.shape[_row_dim(first) + 1 : first.split_dim])
    is_whole = at == math.prod(first.shape[first.split_dim :])
    is_even = rows % steps == 0 and (rows // steps) % per_row_dim == 0
    same = all(one.extents[0] == steps and row_loops(one, rows) is not None for _, one in members)
    if len(ranks) != len(members) or not (is_whole and is_even and same):
        return None
    return RowGroup(tuple(members), steps, rows // steps)


def row_loops(shard: ColumnShard, rows: int) -> int | None:
    """Return how many outer loops of a shard run over its rows; `None` if a loop runs over both."""
    count = 1
    for number, extent in enumerate(shard.extents):
        if count == rows:
            return number
        count *= extent
    return len(shard.extents) if count == rows else None
