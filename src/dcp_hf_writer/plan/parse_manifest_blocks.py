"""Turn the offsets and extent of a block in a manifest into byte runs of its tensor.

Pure. The layers of a model have equal blocks, so `Places` checks each distinct block only once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.formats.strict_json import is_count
from dcp_hf_writer.tensors.boxes import ByteRuns
from dcp_hf_writer.tensors.strided_copies import strides_of

if TYPE_CHECKING:
    from dcp_hf_writer.tensors.boxes import Shape
    from dcp_hf_writer.tensors.strided_copies import IndexLoops

_MAX_LOOPS = 128

_Key = tuple[tuple[int, ...], tuple[int, ...], "Shape", int]


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Where a block lies in its tensor; checked."""

    offsets: Shape
    """Index of its first element."""
    extent: Shape | IndexLoops
    """Its sizes, one per dimension; or its loops, in the order of the bytes."""
    runs: ByteRuns | None
    """Its bytes, ascending, counted from the tensor's first byte; `None` if the block is empty."""


class Places:
    """Places of blocks, each computed once."""

    def __init__(self) -> None:
        """Start empty."""
        self._known: dict[_Key, BlockPlace] = {}

    def find(self, offsets: Any, extent: Any, shape: Shape, itemsize: int) -> BlockPlace:
        """Return the place that values from a manifest describe.

        Raises:
            ValueError: If the values are invalid. Its text completes "expected a block to be ...".
        """
        if not isinstance(offsets, list) or not isinstance(extent, list):
            msg = "of offsets and an extent"
            raise ValueError(msg)  # noqa: TRY004 - what storage says is a value
        # Look up values of type int only: `true` and `1.0` equal 1 and would be accepted as 1.
        if not {*map(type, offsets), *map(type, extent)} <= {int}:
            return _place(offsets, extent, shape, itemsize)
        key = (tuple(offsets), tuple(extent), shape, itemsize)
        place = self._known.get(key)
        if place is None:
            place = self._known[key] = _place(offsets, extent, shape, itemsize)
        return place


def _place(offsets: list[Any], extent: list[Any], shape: Shape, itemsize: int) -> BlockPlace:
    is_solid = not (extent and isinstance(extent[0], list))
    if len(offsets) != len(shape) or (is_solid and len(extent) != len(shape)):
        msg = f"of {len(shape)} dimensions"
        raise ValueError(msg)
    if not all(map(is_count, offsets)):
        msg = "at offsets that are whole numbers >= 0"
        raise ValueError(msg)
    loops = _loops([[n, d, 1] for d, n in enumerate(extent)] if is_solid else extent, shape)
    _check_within(offsets, loops, shape)
    strides = strides_of(shape)
    runs = None
    if 0 not in shape and all(count for count, _, _ in loops):
        start = itemsize * sum(o * s for o, s in zip(offsets, strides, strict=True))
        steps = [(count, step * strides[dim] * itemsize) for count, dim, step in loops]
        runs = _byte_runs(start, steps, itemsize)
    return BlockPlace(tuple(offsets), tuple(extent) if is_solid else loops, runs)


def _loops(values: list[Any], shape: Shape) -> IndexLoops:
    if len(values) > _MAX_LOOPS:
        msg = f"of at most {_MAX_LOOPS} loops"
        raise ValueError(msg)
    for value in values:
        if not isinstance(value, list) or len(value) != len(("count", "dim", "step")):
            msg = "of loops `[count, dimension, step]`"
            raise ValueError(msg)
        count, dim, step = value
        if not is_count(count) or not is_count(dim, below=len(shape)) or not is_count(step):
            msg = f"of loops of whole numbers >= 0, with dimensions below {len(shape)}"
            raise ValueError(msg)
        if step == 0:
            msg = "of loops with steps above 0"
            raise ValueError(msg)
    return tuple((count, dim, step) for count, dim, step in values)


def _check_within(offsets: list[int], loops: IndexLoops, shape: Shape) -> None:
    for d, (first, size) in enumerate(zip(offsets, shape, strict=True)):
        reach = sum((count - 1) * step for count, dim, step in loops if dim == d)
        if first > size or first + reach >= max(size, 1):
            msg = f"within a shape of {list(shape)}"
            raise ValueError(msg)


def _byte_runs(start: int, loops: list[tuple[int, int]], itemsize: int) -> ByteRuns:
    """Merge loops of `(count, byte stride)` into runs; the innermost run starts as one element."""
    merged: list[tuple[int, int]] = []
    run = reach = itemsize
    for count, stride in reversed(loops):
        if count == 1:
            continue
        if stride < reach:
            msg = "of loops in the order of its bytes"
            raise ValueError(msg)
        reach += (count - 1) * stride
        if not merged and stride == run:
            run *= count
        elif merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * count, merged[-1][1])
        else:
            merged.append((count, stride))
    return ByteRuns(start, run, tuple(reversed(merged)))
