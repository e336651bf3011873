"""Strategies for shapes, boxes and the ways in which ranks may cut a tensor."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from dcp_hf_writer.tensors.boxes import Box

if TYPE_CHECKING:
    from dcp_hf_writer.tensors.boxes import Shape


def shapes(*, min_side: int = 0, max_side: int = 6) -> st.SearchStrategy[Shape]:
    """Shapes of up to four dimensions; `()` is a scalar."""
    return st.lists(st.integers(min_side, max_side), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape, *, min_size: int = 0) -> Box:
    """Draw a box within a tensor."""
    offsets, sizes = [], []
    for n in shape:
        start = draw(st.integers(0, n - min_size))
        offsets.append(start)
        sizes.append(draw(st.integers(min_size, n - start)))
    return Box(tuple(offsets), tuple(sizes))


@st.composite
def partitions_of(draw: st.DrawFn, box: Box) -> list[Box]:
    """Cut a box as sharding does, or in any other way that straight cuts allow.

    Slabs along one dimension (rows, columns; even, uneven, empty), a grid over two (a mesh of two
    dimensions), or each part cut anew. Parts without elements may occur anywhere.
    """
    dims = len(box.sizes)
    if not dims:
        return [box]
    kind = draw(st.sampled_from(["slabs", "grid", "any"]))
    if kind == "any":
        return draw(_cuts(box, depth=3))
    parts = draw(_slabs(box, draw(st.integers(0, dims - 1))))
    if kind == "grid":
        other = draw(st.integers(0, dims - 1))
        # The same cuts in each part, as a mesh makes them, unless the dimension is the same.
        edges = draw(_edges(parts[0].sizes[other]))
        whole_side = all(part.sizes[other] == parts[0].sizes[other] for part in parts)
        if whole_side:
            parts = [piece for part in parts for piece in _cut(part, other, edges)]
    return parts


@st.composite
def _edges(draw: st.DrawFn, extent: int) -> list[int]:
    inner = draw(st.lists(st.integers(0, extent), max_size=3))
    return [0, *sorted(inner), extent]


@st.composite
def _slabs(draw: st.DrawFn, box: Box, dim: int) -> list[Box]:
    return _cut(box, dim, draw(_edges(box.sizes[dim])))


@st.composite
def _cuts(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    if not depth or draw(st.booleans()):
        return [box]
    parts = draw(_slabs(box, draw(st.integers(0, len(box.sizes) - 1))))
    return [piece for part in parts for piece in draw(_cuts(part, depth - 1))]


def _cut(box: Box, dim: int, edges: list[int]) -> list[Box]:
    return [
        Box(
            tuple(o + start if d == dim else o for d, o in enumerate(box.offsets)),
            tuple(stop - start if d == dim else s for d, s in enumerate(box.sizes)),
        )
        for start, stop in itertools.pairwise(edges)
    ]
