"""Which shards together fill rows, and how the ranks share the rows among them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer.plan.row_groups import (
    MAX_RUN_NBYTES,
    ColumnShard,
    RowGroup,
    boxes_between,
    column_shard,
    row_groups,
)
from dcp_hf_writer.tensors.boxes import Box, ByteRuns, whole
from dcp_hf_writer.tensors.strided_copies import clip, copy_of_box, copy_runs
from support.partitions import shapes


def columns(start: int, nbytes: int, *, count: int = 6, stride: int = 10) -> ColumnShard:
    """Make a shard of bytes; two rows are one step through memory."""
    made = column_shard(
        ByteRuns(start, nbytes, ((count, stride),)),
        key="w",
        file=0,
        dtype="U8",
        held_dtype="U8",
        offset=0,
        extents=(count, nbytes),
        strides=(nbytes, 1),
    )
    assert made is not None
    return made


def members(groups: list[RowGroup]) -> list[list[tuple[int, int]]]:
    return [[(rank, one.start) for rank, one in group.members] for group in groups]


def test_shards_that_fill_their_rows_are_a_group() -> None:
    shards = {0: [columns(5, 3)], 1: [columns(8, 7)]}
    assert members(row_groups(shards, max_unit_nbytes=10)) == [[(0, 5), (1, 8)]]


@pytest.mark.parametrize(
    "other",
    [
        columns(9, 6),  # a gap
        columns(7, 8),  # an overlap
        columns(8, 6),  # too short
        columns(8, 7, count=5),
        columns(8, 7, stride=11),
    ],
    ids=["gap", "overlap", "short", "fewer rows", "other distance"],
)
def test_shards_that_do_not_fill_their_rows_are_none(other: ColumnShard) -> None:
    assert row_groups({0: [columns(5, 3)], 1: [other]}, max_unit_nbytes=100) == []


def test_rows_of_several_groups_are_kept_apart() -> None:
    shards = {
        0: [columns(0, 4)],
        1: [columns(4, 6)],
        2: [columns(60, 4)],
        3: [columns(64, 6)],
    }
    found = members(row_groups(shards, max_unit_nbytes=10))
    assert found == [[(0, 0), (1, 4)], [(2, 60), (3, 64)]]


def test_rows_that_do_not_fit_into_the_buffer_are_no_group() -> None:
    shards = {0: [columns(0, 4)], 1: [columns(4, 6)]}
    assert row_groups(shards, max_unit_nbytes=9) == []


def test_shards_of_one_rank_are_no_group() -> None:
    assert row_groups({0: [columns(0, 4), columns(4, 6)]}, max_unit_nbytes=10) == []


@pytest.mark.parametrize(
    ("loops", "nbytes", "dtype"),
    [
        ((), 8, "U8"),
        (((1, 10),), 8, "U8"),
        (((3, 100), (4, 10)), 8, "U8"),
        (((4, 1 << 20),), MAX_RUN_NBYTES + 1, "U8"),
        (((4, 10),), 8, "F4"),
    ],
    ids=["one run", "one row", "two distances", "long runs", "packed"],
)
def test_other_blocks_are_no_column_shards(
    loops: tuple[tuple[int, int], ...], nbytes: int, dtype: str
) -> None:
    count = int(np.prod([n for n, _ in loops]))
    found = column_shard(
        ByteRuns(0, nbytes, loops),
        key="w",
        file=0,
        dtype=dtype,
        held_dtype=dtype,
        offset=0,
        extents=(count, nbytes),
        strides=(nbytes, 1),
    )
    assert found is None


def test_rows_that_lie_evenly_in_memory_can_be_cut_anywhere() -> None:
    one = column_shard(
        ByteRuns(0, 4, ((6, 10),)),
        key="w",
        file=0,
        dtype="U8",
        held_dtype="U8",
        offset=0,
        extents=(2, 3, 4),
        strides=(12, 4, 1),
    )
    assert one is not None
    assert (one.extents, one.strides, one.rows_per_step) == ((6, 4), (4, 1), 1)


def test_rows_that_do_not_are_cut_between_steps() -> None:
    one = column_shard(
        ByteRuns(0, 4, ((6, 10),)),
        key="w",
        file=0,
        dtype="U8",
        held_dtype="U8",
        offset=0,
        extents=(2, 3, 4),
        strides=(4, 8, 1),
    )
    assert one is not None
    assert (one.extents, one.rows_per_step) == ((2, 3, 4), 3)
    (group,) = row_groups({0: [one], 1: [columns(4, 6)]}, max_unit_nbytes=30)
    assert (group.unit_rows, group.units) == (3, 2)
    assert row_groups({0: [one], 1: [columns(4, 6)]}, max_unit_nbytes=29) == []


@given(
    st.integers(2, 40),
    st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda r: len({*r}) > 1),
    st.integers(0, 9),
)
def test_every_row_has_one_writer_and_parts_are_equal(
    count: int, ranks: list[int], turn: int
) -> None:
    stride = 2 * len(ranks)
    shards: dict[int, list[ColumnShard]] = {}
    for column, rank in enumerate(ranks):
        shards.setdefault(rank, []).append(columns(2 * column, 2, count=count, stride=stride))
    (group,) = row_groups(shards, max_unit_nbytes=stride)
    parts = sorted(
        (group.share_of(rank, turn=turn) for rank in range(6)), key=lambda part: part.start
    )
    parts = [part for part in parts if part]
    assert [row for part in parts for row in part] == list(range(count))
    sizes = [len(group.share_of(rank, turn=turn)) for rank in {*ranks}]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(group.share_of(rank, turn=turn)) == 0 for rank in {*range(6)} - {*ranks})
    assert all(a.stop == b.start for a, b in pairwise(parts))


@given(st.data(), shapes(min_side=1), st.sampled_from(["U8", "BF16", "F32"]))
def test_boxes_hold_the_bytes_between_two_offsets(
    data: st.DataObject, shape: tuple[int, ...], dtype: str
) -> None:
    size = {"U8": 1, "BF16": 2, "F32": 4}[dtype]
    numel = int(np.prod(shape))
    first = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(first + 1, numel))
    found = []
    for box in boxes_between(shape, dtype, first * size, stop * size):
        (copy,) = clip(copy_of_box(whole(shape)), Box(box.offsets, box.sizes))
        runs = copy_runs(copy, shape, itemsize=size, tensor_start=0)
        found += [i for start in runs.starts() for i in range(start, start + runs.nbytes)]
    assert found == list(range(first * size, stop * size))
