"""Boxes of tensor elements, and the byte runs that a box fills in a row-major tensor.

Pure: no I/O, no torch, no process group. Offsets and sizes count elements, per dimension.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box of elements: `offsets[d] <= index[d] < offsets[d] + sizes[d]`."""

    offsets: Shape
    """First index per dimension."""
    sizes: Shape
    """Extent per dimension; `()` for a scalar, which has one element."""

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 if any extent is 0."""
        return math.prod(self.sizes)


def whole(shape: Shape) -> Box:
    """Return the box that covers a tensor of `shape`."""
    return Box((0,) * len(shape), shape)


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common part of two boxes of one tensor; `None` if they share no element."""
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


@dataclass(frozen=True, slots=True)
class BoxTable:
    """Many boxes of one tensor, as two columns instead of `Box` objects.

    A global plan holds one box per rank and tensor, too many for an object each.
    """

    offsets: Sequence[Shape]
    """First indices of each box."""
    sizes: Sequence[Shape]
    """Extents of each box."""


def _array(rows: Sequence[Shape], ndim: int) -> npt.NDArray[np.int64]:
    count = len(rows) * ndim
    return np.fromiter(chain.from_iterable(rows), np.int64, count).reshape(len(rows), ndim)


def tiling_fault(boxes: Sequence[Box] | BoxTable, shape: Shape) -> str | None:
    """Return why the boxes do not cover a tensor exactly once; `None` if they do.

    The answer is exact for any set of boxes. Sharding usually cuts a tensor into slabs along one
    dimension. For slabs the check takes one sort and linear time. For other boxes it cuts the
    tensor at every border of a box and counts how many boxes cover each cell of that grid.

    Args:
        boxes: Parts of the tensor, in any order; boxes without elements do not count.
        shape: Shape of the tensor; `()` for a scalar.
    """
    if isinstance(boxes, BoxTable):
        return _fault(tuple(boxes.offsets), tuple(boxes.sizes), shape)
    return _fault(tuple(b.offsets for b in boxes), tuple(b.sizes for b in boxes), shape)


# Cached: the layers of a model have the same cuts, and so has every save of a run.
@functools.lru_cache(maxsize=32)
def _fault(
    offset_rows: tuple[Shape, ...], size_rows: tuple[Shape, ...], shape: Shape
) -> str | None:
    if not {*map(len, offset_rows), *map(len, size_rows)} <= {len(shape)}:
        return f"a part does not have the {len(shape)} dimensions of the tensor"
    offsets, sizes = _array(offset_rows, len(shape)), _array(size_rows, len(shape))
    outside = ((offsets < 0) | (sizes < 0) | (offsets + sizes > np.array(shape, np.int64))).any(1)
    if outside.any():
        i = int(np.argmax(outside))
        at, size = offsets[i].tolist(), sizes[i].tolist()
        return f"a part at {at} of size {size} reaches outside the tensor"
    volumes = sizes.prod(axis=1)
    wanted, have = math.prod(shape), int(volumes.sum())
    if have != wanted:
        return f"the parts hold {have} elements, the tensor has {wanted}"
    offsets, sizes = offsets[volumes > 0], sizes[volumes > 0]
    cut_dims = np.flatnonzero((sizes != np.array(shape, np.int64)).any(axis=0))
    if len(cut_dims) == 0:
        return None
    if len(cut_dims) == 1:
        return _slab_fault(offsets, sizes, int(cut_dims[0]))
    return _grid_fault(offsets, sizes)


def _slab_fault(
    offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], dim: int
) -> str | None:
    order = np.argsort(offsets[:, dim], kind="stable")
    starts = offsets[order, dim]
    reached = np.concatenate(([0], np.cumsum(sizes[order, dim])[:-1]))
    wrong = np.flatnonzero(starts != reached)
    if not len(wrong):
        return None
    i = int(wrong[0])
    fault = "overlap" if starts[i] < reached[i] else "leave a gap"
    return f"parts {fault} at index {int(starts[i])} of dim {dim}"


def _grid_fault(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> str | None:
    stops = offsets + sizes
    ndim = offsets.shape[1]
    borders = [np.unique(np.concatenate((offsets[:, d], stops[:, d]))) for d in range(ndim)]
    first = [np.searchsorted(borders[d], offsets[:, d]) for d in range(ndim)]
    last = [np.searchsorted(borders[d], stops[:, d]) for d in range(ndim)]
    cells = np.zeros([len(edges) - 1 for edges in borders], dtype=np.int32)
    for i in range(len(offsets)):
        cells[tuple(slice(first[d][i], last[d][i]) for d in range(ndim))] += 1
    # The volumes add up to the tensor. So if a cell is covered twice, another is not covered.
    bad = np.argwhere(cells != 1)
    if not len(bad):
        return None
    at = [int(borders[d][int(i)]) for d, i in enumerate(bad[0])]
    return f"parts overlap or leave a gap at {at}"


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """The bytes of a box in a row-major tensor: runs of equal length, whose starts form a grid."""

    start: int
    """Offset of the first run, in bytes from the start of the file."""
    nbytes: int
    """Length of each run."""
    loops: tuple[tuple[int, int], ...]
    """`(count, stride in bytes)` of each loop over the runs, outermost first."""

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
