"""Strided copies against dense indexing by torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.tensors.boxes import Box, ByteRuns, Shape, whole
from dcp_hf_writer.tensors.strided_copies import (
    Copy,
    clip,
    copies_of,
    copy_of_box,
    copy_runs,
    coverage_fault,
    hf_box,
    hf_loops,
    hf_view,
    runtime_view,
    split,
)
from support.partitions import boxes_in, partitions_of, shapes


@dataclass
class Piece:
    """Loops over flat indices, and the same as a table: `where[j]` comes from `source[j]`."""

    loops: list[tuple[int, int, int]]
    hf_start: int
    start: int

    def table(self) -> dict[int, int]:
        found = {self.hf_start: self.start}
        for extent, hf_step, step in self.loops:
            found = {
                hf + i * hf_step: runtime + i * step
                for hf, runtime in found.items()
                for i in range(extent)
            }
        return found


@dataclass
class Mapping:
    """One HuggingFace tensor, made of views of one runtime tensor."""

    shape: Shape
    hf_shape: Shape
    pieces: list[Piece]


def factors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


@st.composite
def views(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """Take a random view: dims split, permuted, sliced with steps, indexed."""
    view = tensor
    for _ in range(draw(st.integers(0, 4))):
        dim = draw(st.integers(0, view.ndim - 1)) if view.ndim else None
        if dim is None:
            return view
        match draw(st.sampled_from(["split", "permute", "slice", "index"])):
            case "split":
                view = view.unflatten(dim, (draw(st.sampled_from(factors(view.shape[dim]))), -1))
            case "permute":
                view = view.permute(draw(st.permutations(range(view.ndim))))
            case "slice":
                first = draw(st.integers(0, view.shape[dim] - 1))
                stop = draw(st.integers(first + 1, view.shape[dim]))
                step = draw(st.integers(1, 3))
                at = [slice(None)] * dim + [slice(first, stop, step)]
                view = view[tuple(at)]
            case "index":
                view = view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))
    return view


@st.composite
def shapes_of(draw: st.DrawFn, numel: int) -> Shape:
    shape: list[int] = []
    while numel > 1 and len(shape) < 3:
        shape.append(draw(st.sampled_from(factors(numel))))
        numel //= shape[-1]
    return (*shape, numel)


@st.composite
def mappings(draw: st.DrawFn) -> Mapping:
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    runtime = torch.arange(math.prod(shape)).reshape(shape)
    view = draw(views(runtime))
    hf_shape = draw(shapes_of(view.numel()))
    strides = np.empty(view.shape).strides
    loops = [
        (n, hf // 8, s)
        for n, hf, s in zip(view.shape, strides, view.stride(), strict=True)
        if n > 1
    ]
    pieces = [Piece(loops, 0, view.storage_offset())]
    # A second one that takes the place of every k-th loop step, so that the first has gaps.
    if loops and draw(st.booleans()):
        number = draw(st.integers(0, len(loops) - 1))
        extent, hf_step, step = loops[number]
        period = draw(st.integers(2, 3))
        pieces = [
            Piece(
                [
                    *loops[:number],
                    (len(range(i, extent, period)), hf_step * period, step * period),
                    *loops[number + 1 :],
                ],
                i * hf_step,
                view.storage_offset() + i * step,
            )
            for i in range(min(period, extent))
        ]
    for piece in pieces:
        piece.loops = draw(st.permutations(piece.loops))
    return Mapping(shape, hf_shape, pieces)


def compiled(mapping: Mapping) -> list[Copy]:
    return [
        copy
        for piece in mapping.pieces
        for copy in copies_of(
            piece.loops,
            hf_start=piece.hf_start,
            start=piece.start,
            hf_shape=mapping.hf_shape,
            shape=mapping.shape,
        )
    ]


def carried_out(copies: list[Copy], runtime: torch.Tensor, hf_shape: Shape) -> torch.Tensor:
    found = torch.full(hf_shape, -1)
    for copy in copies:
        target = hf_view(found, copy)
        assert (target == -1).all()
        target.copy_(runtime_view(runtime, copy))
    return found


@settings(deadline=None, max_examples=300)
@given(mappings())
def test_copies_carry_each_element_of_the_pieces_once(mapping: Mapping) -> None:
    runtime = torch.arange(math.prod(mapping.shape)).reshape(mapping.shape)
    expected = torch.full((math.prod(mapping.hf_shape),), -1)
    for piece in mapping.pieces:
        for where, source in piece.table().items():
            expected[where] = source
    found = carried_out(compiled(mapping), runtime, mapping.hf_shape)
    assert torch.equal(found.reshape(-1), expected)


@settings(deadline=None, max_examples=300)
@given(st.data(), mappings())
def test_clips_of_any_partition_are_the_whole(data: st.DataObject, mapping: Mapping) -> None:
    runtime = torch.arange(math.prod(mapping.shape)).reshape(mapping.shape)
    copies = compiled(mapping)
    expected = carried_out(copies, runtime, mapping.hf_shape)
    found = torch.full(mapping.hf_shape, -1)
    clips = []
    for box in data.draw(partitions_of(whole(mapping.shape))):
        local = runtime[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
        for copy in copies:
            parts = clip(copy, box) if box.numel else []
            clips += parts
            for part in parts:
                hf_view(found, part).copy_(runtime_view(local.contiguous(), part))
    assert torch.equal(found, expected)
    assert sum(copy.numel for copy in clips) == math.prod(mapping.hf_shape)
    starts = [(copy.hf_start, hf_loops(copy)) for copy in clips]
    assert coverage_fault(starts, mapping.hf_shape) is None


@settings(deadline=None, max_examples=200)
@given(st.data(), mappings())
def test_coverage_equals_counting(data: st.DataObject, mapping: Mapping) -> None:
    copies = compiled(mapping)
    changed = data.draw(st.integers(0, len(copies) - 1))
    copy = copies[changed]
    dim = data.draw(st.integers(0, len(mapping.hf_shape) - 1))
    by = data.draw(st.integers(-1, 1))
    moved = tuple(n + by if d == dim else n for d, n in enumerate(copy.hf_start))
    copies[changed] = Copy(moved, copy.start, copy.loops)
    count: dict[tuple[int, ...], int] = {}
    for one in copies:
        visited = [one.hf_start]
        for extent, d, step in hf_loops(one):
            visited = [
                (*v[:d], v[d] + i * step, *v[d + 1 :]) for v in visited for i in range(extent)
            ]
        for index in visited:
            count[index] = count.get(index, 0) + 1
    is_whole = count == dict.fromkeys(np.ndindex(*mapping.hf_shape), 1)
    fault = coverage_fault([(c.hf_start, hf_loops(c)) for c in copies], mapping.hf_shape)
    assert (fault is None) == is_whole


@settings(deadline=None, max_examples=200)
@given(mappings(), st.integers(1, 5))
def test_runs_of_bytes_and_boxes_equal_indexing(mapping: Mapping, limit: int) -> None:
    places = torch.arange(math.prod(mapping.hf_shape)).reshape(mapping.hf_shape)
    for copy in compiled(mapping):
        expected = hf_view(places, copy).reshape(-1).tolist()
        runs = copy_runs(copy, mapping.hf_shape, itemsize=2, tensor_start=10)
        covered = [
            (byte - 10) // 2
            for start in runs.starts()
            for byte in range(start, start + runs.nbytes, 2)
        ]
        assert covered == expected
        parts = list(split(copy, limit))
        assert max(part.numel for part in parts) <= limit
        assert [i for p in parts for i in hf_view(places, p).reshape(-1).tolist()] == expected
        box = hf_box(copy)
        where = np.zeros(mapping.hf_shape, bool)
        where.reshape(-1)[expected] = True
        corner = [indices.min() for indices in np.nonzero(where)]
        extent = [indices.max() - indices.min() + 1 for indices in np.nonzero(where)]
        assert (box is not None) == (math.prod(extent) == copy.numel)
        if box is not None:
            assert (list(box.offsets), list(box.sizes)) == (corner, extent)
            assert expected == sorted(expected)


@pytest.mark.parametrize(
    ("loops", "hf_start", "start"),
    [
        ([(5, 1, 1)], 0, 2),
        ([(5, 1, 1)], 2, 0),
        ([(2, 1, 0)], 0, 0),
        ([(2, 0, 1)], 0, 0),
        ([(1, 1, 1)], -1, 0),
    ],
)
def test_loops_that_leave_a_tensor_are_refused(
    loops: list[tuple[int, int, int]], hf_start: int, start: int
) -> None:
    with pytest.raises(ValueError, match="which has 6 elements"):
        copies_of(loops, hf_start=hf_start, start=start, hf_shape=(2, 3), shape=(6,))


@pytest.mark.parametrize("loops", [[(2, 1, 2), (2, 1, 1)], [(2, 5, 1), (3, 4, 2)]])
def test_loops_that_do_not_ascend_are_refused(loops: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="do not ascend"):
        copies_of(loops, hf_start=0, start=0, hf_shape=(20,), shape=(8,))


def test_no_step_is_no_copy() -> None:
    assert copies_of([(0, 1, 1)], hf_start=0, start=0, hf_shape=(0, 3), shape=(0, 3)) == ()


def test_clip_of_a_scalar_is_itself() -> None:
    (copy,) = copies_of([], hf_start=0, start=0, hf_shape=(), shape=())
    assert clip(copy, Box((), ())) == [copy]


def byte_runs(box: Box, shape: Shape, *, itemsize: int, tensor_start: int) -> ByteRuns:
    """Return the runs of a copy that fills a box of a HuggingFace tensor."""
    copy = replace(copy_of_box(Box((0,) * len(shape), box.sizes)), hf_start=box.offsets)
    return copy_runs(copy, shape, itemsize=itemsize, tensor_start=tensor_start)


@settings(deadline=None)
@given(st.data(), shapes(min_side=1), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
def test_byte_runs_equal_the_indexing_of_numpy(
    data: st.DataObject, shape: Shape, itemsize: int, tensor_start: int
) -> None:
    box = data.draw(boxes_in(shape, min_size=1))
    nbytes = int(np.prod(shape, dtype=int)) * itemsize
    positions = np.arange(tensor_start, tensor_start + nbytes).reshape(*shape, itemsize)
    expected = (
        positions[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        .reshape(-1)
        .tolist()
    )
    runs = byte_runs(box, shape, itemsize=itemsize, tensor_start=tensor_start)
    starts = list(runs.starts())
    found = [i for start in starts for i in range(start, start + runs.nbytes)]
    assert found == expected
    assert len(starts) == runs.count
    # As long as they can be: no run goes on where the one before it ends.
    assert all(b > a + runs.nbytes for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(
    ("box", "shape", "runs"),
    [
        (Box((), ()), (), ByteRuns(100, 4, ())),
        (whole((3, 5)), (3, 5), ByteRuns(100, 60, ())),
        (Box((1, 0), (2, 5)), (3, 5), ByteRuns(120, 40, ())),
        (Box((0, 2), (3, 1)), (3, 5), ByteRuns(108, 4, ((3, 20),))),
        (Box((0, 0, 1), (2, 3, 1)), (2, 3, 4), ByteRuns(104, 4, ((6, 16),))),
        (Box((1, 0, 1), (1, 2, 2)), (2, 3, 4), ByteRuns(152, 8, ((2, 16),))),
        (Box((0, 0, 1), (2, 2, 2)), (2, 3, 4), ByteRuns(104, 8, ((2, 48), (2, 16)))),
    ],
    ids=["scalar", "whole", "rows", "column", "merged loops", "one row block", "two loops"],
)
def test_byte_runs_of_known_boxes(box: Box, shape: Shape, runs: ByteRuns) -> None:
    assert byte_runs(box, shape, itemsize=4, tensor_start=100) == runs
