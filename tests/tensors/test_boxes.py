"""Boxes and byte runs, compared with numpy's own indexing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcp_hf_writer.tensors.boxes import Box, BoxTable, intersect, tiling_fault, whole
from support.partitions import boxes_in, partitions_of, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.tensors.boxes import Shape


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))


def mask(box: Box, shape: Shape) -> np.ndarray:
    filled = np.zeros(shape, dtype=bool)
    filled[slices(box)] = True
    return filled


def covers_once(boxes: Sequence[Box], shape: Shape) -> bool:
    """Tell what `tiling_fault` tells, element by element."""
    inside = all(
        0 <= o and 0 <= s and o + s <= n
        for box in boxes
        for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)
    )
    if not inside:
        return False
    count = np.zeros(shape, dtype=int)
    for box in boxes:
        count[slices(box)] += 1
    return bool((count == 1).all())


# Boxes


@given(st.data(), shapes())
def test_intersection_equals_that_of_masks(data: st.DataObject, shape: Shape) -> None:
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = intersect(a, b)
    expected = mask(a, shape) & mask(b, shape)
    assert (common is None) == (not expected.any())
    if common is not None:
        assert (mask(common, shape) == expected).all()


def test_boxes_count_their_elements() -> None:
    assert (Box((), ()).numel, Box((1, 2), (3, 4)).numel, Box((1, 2), (3, 0)).numel) == (1, 12, 0)


@pytest.mark.parametrize(
    ("box", "is_inside"),
    [
        (Box((0, 0), (4, 6)), True),
        (Box((4, 6), (0, 0)), True),
        (Box((1, 0), (4, 6)), False),
        (Box((-1, 0), (2, 2)), False),
        (Box((0, 0), (-1, 2)), False),
        (Box((0,), (4,)), False),
        (Box((0, 0, 0), (4, 6, 1)), False),
    ],
)
def test_box_is_inside_when_it_neither_leaves_the_shape_nor_has_another_rank(
    box: Box, *, is_inside: bool
) -> None:
    fault = tiling_fault([box], (4, 6)) or ""
    assert ("reaches outside the tensor" not in fault and "dimensions" not in fault) is is_inside


# Tilings


@settings(deadline=None)
@given(st.data(), shapes())
def test_partition_has_no_fault(data: st.DataObject, shape: Shape) -> None:
    parts = data.draw(partitions_of(whole(shape)))
    order = data.draw(st.permutations(parts))
    assert tiling_fault(order, shape) is None


@st.composite
def damaged_partitions(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """Take a partition and drop, double, move, grow, shrink or replace some of its boxes."""
    parts = list(draw(partitions_of(whole(shape))))
    for _ in range(draw(st.integers(1, 2))):
        i = draw(st.integers(0, len(parts) - 1))
        box = parts[i]
        by = tuple(draw(st.integers(-1, 1)) for _ in shape)
        grown = tuple(max(0, s + b) for s, b in zip(box.sizes, by, strict=True))
        kind = draw(st.sampled_from(["drop", "double", "move", "resize", "replace", "add"]))
        if kind == "drop" and len(parts) > 1:
            del parts[i]
        elif kind == "double":
            parts.append(box)
        elif kind == "move":
            parts[i] = Box(tuple(o + b for o, b in zip(box.offsets, by, strict=True)), box.sizes)
        elif kind == "resize":
            parts[i] = Box(box.offsets, grown)
        elif kind == "replace":
            parts[i] = draw(st.sampled_from(parts))
        else:
            parts.append(draw(boxes_in(shape)))
    return parts


@settings(deadline=None, max_examples=400)
@given(st.data(), shapes())
def test_every_gap_and_overlap_is_found(data: st.DataObject, shape: Shape) -> None:
    boxes = data.draw(damaged_partitions(shape))
    fault = tiling_fault(boxes, shape)
    assert (fault is None) == covers_once(boxes, shape)
    table = BoxTable(tuple(b.offsets for b in boxes), tuple(b.sizes for b in boxes))
    assert tiling_fault(table, shape) == fault


PINWHEEL = [
    Box((0, 0), (1, 2)),
    Box((0, 2), (2, 1)),
    Box((2, 1), (1, 2)),
    Box((1, 0), (2, 1)),
    Box((1, 1), (1, 1)),
]


def test_tiling_that_no_straight_cut_divides_has_no_fault() -> None:
    assert tiling_fault(PINWHEEL, (3, 3)) is None
    assert covers_once(PINWHEEL, (3, 3))


@given(st.integers(0, 4), st.integers(0, 4))
@example(0, 4)
def test_tiling_has_a_fault_when_one_part_of_the_pinwheel_takes_the_place_of_another(
    i: int, j: int
) -> None:
    boxes = [*PINWHEEL]
    boxes[i] = PINWHEEL[j]
    assert (tiling_fault(boxes, (3, 3)) is None) == (i == j)


@pytest.mark.parametrize(
    ("boxes", "shape", "words"),
    [
        ([], (), "hold 0 elements, the tensor has 1"),
        ([], (2, 3), "hold 0 elements, the tensor has 6"),
        ([Box((0,), (2,)), Box((3,), (2,))], (5,), "hold 4 elements, the tensor has 5"),
        ([Box((0,), (3,)), Box((2,), (2,))], (5,), "overlap at index 2 of dim 0"),
        ([Box((0,), (2,)), Box((3,), (3,))], (5,), r"part at \[3\] of size \[3\] reaches outside"),
        ([Box((1,), (2,)), Box((3,), (2,)), Box((3,), (1,))], (5,), "gap at index 1 of dim 0"),
        ([Box((0, 0), (2, 2)), Box((1, 1), (2, 2)), Box((0, 0), (1, 1))], (3, 3), r"at \[0, 0\]"),
        ([Box((0,), (1,))], (1, 1), "the tensor"),
    ],
)
def test_fault_says_where(boxes: list[Box], shape: Shape, words: str) -> None:
    fault = tiling_fault(boxes, shape)
    assert fault is not None
    assert re.search(words, fault)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2)])
def test_tensor_without_elements_needs_no_part(shape: Shape) -> None:
    assert tiling_fault([], shape) is None
    assert tiling_fault([whole(shape), whole(shape)], shape) is None


def test_parts_without_elements_do_not_count() -> None:
    assert tiling_fault([whole((4, 2)), Box((4, 0), (0, 2)), Box((0, 0), (0, 0))], (4, 2)) is None


def test_planning_stays_linear_for_many_slabs() -> None:
    # A grid of every border would take 10^10 cells.
    parts = [Box((i, 0), (1, 100_000)) for i in range(100_000)]
    assert tiling_fault(parts, (100_000, 100_000)) is None
    parts[7] = parts[8]
    assert tiling_fault(parts, (100_000, 100_000)) == "parts leave a gap at index 8 of dim 0"
