"""Boxes of tensor elements, and the byte runs that a box fills in a row-major tensor.

Pure: no I/O, no torch, no process group. Offsets and sizes count elements, per dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box of elements: `offsets[d] <= index[d] < offsets[d] + sizes[d]`."""

    offsets: Shape
    """First index per dimension."""
    sizes: Shape
    """Extent per dimension; `()` is the one element of a scalar."""

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 if any extent is 0."""
        return math.prod(self.sizes)

    def shifted(self, by: Shape, *, sign: int = 1) -> Box:
        """Return the box moved by `sign * by`."""
        moved = tuple(o + sign * b for o, b in zip(self.offsets, by, strict=True))
        return Box(moved, self.sizes)

    def is_inside(self, shape: Shape) -> bool:
        """Whether the box has the rank of `shape` and does not leave it."""
        return len(self.offsets) == len(shape) == len(self.sizes) and all(
            0 <= o and 0 <= s and o + s <= n
            for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )


def whole(shape: Shape) -> Box:
    """Return the box that covers a tensor of `shape`."""
    return Box((0,) * len(shape), shape)


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common part of two boxes of one tensor; `None` if it has no element."""
    offsets, sizes = [], []
    for a_start, a_size, b_start, b_size in zip(
        a.offsets, a.sizes, b.offsets, b.sizes, strict=True
    ):
        start = max(a_start, b_start)
        size = min(a_start + a_size, b_start + b_size) - start
        if size <= 0:
            return None
        offsets.append(start)
        sizes.append(size)
    return Box(tuple(offsets), tuple(sizes))


def tiling_fault(boxes: Sequence[Box], shape: Shape) -> str | None:
    """Say why boxes do not cover a tensor exactly once; `None` if they do.

    Exact for any set of boxes. Linear for slabs along one dimension, which is what sharding makes;
    otherwise the tensor is cut at every border of a box, and each cell must be covered once.

    Args:
        boxes: Parts of the tensor, in any order; those without elements do not count.
        shape: Shape of the tensor; `()` for a scalar.
    """
    outside = next((box for box in boxes if not box.is_inside(shape)), None)
    if outside is not None:
        return f"a part at {list(outside.offsets)} of size {list(outside.sizes)} leaves the tensor"
    parts = [box for box in boxes if box.numel]
    wanted, have = math.prod(shape), sum(box.numel for box in parts)
    if have != wanted:
        return f"the parts hold {have} elements, the tensor has {wanted}"
    if len(parts) <= 1 or not wanted:
        return None
    cut_dims = [d for d, n in enumerate(shape) if any(box.sizes[d] != n for box in parts)]
    if len(cut_dims) == 1:
        return _slab_fault(parts, cut_dims[0])
    return _grid_fault(parts, shape)


def _slab_fault(parts: Sequence[Box], dim: int) -> str | None:
    reached = 0
    for start, size in sorted((box.offsets[dim], box.sizes[dim]) for box in parts):
        if start != reached:
            fault = "overlap" if start < reached else "leave a gap"
            return f"parts {fault} at index {start} of dim {dim}"
        reached = start + size
    return None


def _grid_fault(parts: Sequence[Box], shape: Shape) -> str | None:
    borders = [
        sorted({e for b in parts for e in (b.offsets[d], b.offsets[d] + b.sizes[d])})
        for d in range(len(shape))
    ]
    position = [{edge: i for i, edge in enumerate(edges)} for edges in borders]
    cells = np.zeros([len(edges) - 1 for edges in borders], dtype=np.int32)
    for box in parts:
        where = tuple(
            slice(position[d][start], position[d][start + size])
            for d, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True))
        )
        cells[where] += 1
    # The volumes add up, so a cell that is covered twice means another that is not covered.
    bad = np.argwhere(cells != 1)
    if not len(bad):
        return None
    at = [borders[d][int(i)] for d, i in enumerate(bad[0])]
    return f"parts overlap or leave a gap at {at}"


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """The bytes of a box within a row-major tensor: equal runs on a grid of starts."""

    start: int
    """Offset of the first run, in bytes from the start of the file."""
    nbytes: int
    """Length of each run."""
    loops: tuple[tuple[int, int], ...]
    """`(count, stride in bytes)` of each loop around a run, outermost first."""

    def starts(self) -> Iterator[int]:
        """Yield the offset of each run, ascending."""
        yield from _starts(self.start, self.loops)

    @property
    def count(self) -> int:
        """Number of runs."""
        return math.prod(count for count, _ in self.loops)


def _starts(start: int, loops: tuple[tuple[int, int], ...]) -> Iterator[int]:
    if not loops:
        yield start
        return
    (count, stride), inner = loops[0], loops[1:]
    if not inner:
        yield from range(start, start + count * stride, stride)
        return
    for i in range(count):
        yield from _starts(start + i * stride, inner)


def byte_runs(box: Box, shape: Shape, *, itemsize: int, tensor_start: int) -> ByteRuns:
    """Map a box of a row-major tensor to the bytes that it fills.

    Args:
        box: Part of the tensor, with at least one element.
        shape: Shape of the tensor.
        itemsize: Bytes per element.
        tensor_start: Byte offset of the tensor's first element in its file.

    Returns:
        Runs as long as they can be, in ascending order; their bytes are the box in row-major order.

    Source:
        safetensors README, "Format": row-major, no holes in the byte buffer.
    """
    strides = [itemsize] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    start = tensor_start + sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    dim = len(shape)
    run = itemsize
    while dim > 0:
        dim -= 1
        run = box.sizes[dim] * strides[dim]
        if box.sizes[dim] != shape[dim]:
            break
    loops: list[tuple[int, int]] = []
    for d in range(dim):
        count, stride = box.sizes[d], strides[d]
        if count == 1:
            continue
        if loops and loops[-1][1] == count * stride:
            loops[-1] = (loops[-1][0] * count, stride)
        else:
            loops.append((count, stride))
    return ByteRuns(start, run, tuple(loops))
