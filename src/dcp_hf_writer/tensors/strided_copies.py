"""Strided copies between a runtime tensor and a HuggingFace tensor.

Pure: no I/O, no process group. A copy is a nest of loops. Each loop moves along one dimension of
the runtime tensor and along one dimension of the HuggingFace tensor. After a reshape, a loop may
run over the end of a dimension; such a copy is cut into several copies.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dcp_hf_writer.tensors.boxes import Box, ByteRuns, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt
    import torch


IndexLoops = tuple[tuple[int, int, int], ...]
"""`(extent, dim, step)` of each loop over one tensor, outermost first."""


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop of a copy: `extent` steps, along one dimension of each tensor."""

    extent: int
    """Number of steps; at least 2."""
    hf_dim: int
    """Dimension of the HuggingFace tensor."""
    hf_step: int
    """How many indices of `hf_dim` one step moves."""
    dim: int
    """Dimension of the runtime tensor."""
    step: int
    """How many indices of `dim` one step moves."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of a runtime tensor, and their places in a HuggingFace tensor."""

    hf_start: Shape
    """First index in the HuggingFace tensor."""
    start: Shape
    """First index in the runtime tensor, or in the shard of it that a rank holds."""
    loops: tuple[Loop, ...]
    """The loops, outermost first. They visit the HuggingFace tensor in ascending order."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(loop.extent for loop in self.loops)


def strides_of(shape: Shape) -> Shape:
    """Return the strides of a row-major tensor, in elements."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(shape[d + 1], 1)
    return tuple(strides)


def copy_of_box(box: Box) -> Copy:
    """Return the copy that makes a box of a runtime tensor a whole HuggingFace tensor."""
    loops = tuple(Loop(n, d, 1, d, 1) for d, n in enumerate(box.sizes) if n > 1)
    return Copy((0,) * len(box.sizes), box.offsets, loops)


# `(extent, hf_step, step)` of each loop over flat indices.
_Loops = tuple[tuple[int, int, int], ...]

# `(hf_start, start, loops)`: a copy over flat indices, before its loops move along dimensions.
_Flat = tuple[int, int, _Loops]


def copies_of(
    loops: Sequence[tuple[int, int, int]],
    *,
    hf_start: int,
    start: int,
    hf_shape: Shape,
    shape: Shape,
) -> tuple[Copy, ...]:
    """Turn a loop nest over flat indices into copies whose loops move along dimensions.

    Args:
        loops: `(extent, hf_step, step)` of each loop, steps in elements of the row-major tensors.
        hf_start: Flat index of the first element in the HuggingFace tensor.
        start: Flat index of the first element in the runtime tensor.
        hf_shape: Shape of the HuggingFace tensor.
        shape: Shape of the runtime tensor.

    Returns:
        Disjoint copies that together copy the elements of the nest; none if a loop has extent 0.

    Raises:
        ValueError: If the loops leave a tensor; if a step fits no dimension of a tensor; or if
            loops overlap in the HuggingFace tensor, so that they do not visit it in ascending
            order.
    """
    return _copies_of(tuple(map(tuple, loops)), hf_start, start, tuple(hf_shape), tuple(shape))


# Cached: the layers of a model have the same cuts, and each may have hundreds of experts.
@functools.lru_cache(maxsize=4096)
def _copies_of(
    loops: _Loops, hf_start: int, start: int, hf_shape: Shape, shape: Shape
) -> tuple[Copy, ...]:
    if any(extent == 0 for extent, _, _ in loops):
        return ()
    for of, (first, number) in {"runtime": (start, 2), "HuggingFace": (hf_start, 1)}.items():
        numel = math.prod(shape if of == "runtime" else hf_shape)
        last = first + sum((loop[0] - 1) * loop[number] for loop in loops)
        if first < 0 or last >= numel or any(loop[0] < 0 or loop[number] < 1 for loop in loops):
            msg = (
                f"loops {list(loops)} over elements {first} to {last} of the {of} tensor, "
                f"which has {numel} elements"
            )
            raise ValueError(msg)
    kept = tuple(sorted((one for one in loops if one[0] > 1), key=lambda one: -one[1]))
    todo: list[_Flat] = [(hf_start, start, kept)]
    done: list[Copy] = []
    hf_strides, strides = strides_of(hf_shape), strides_of(shape)
    while todo:
        flat = todo.pop()
        cut = _cut(flat, shape, strides, side=2) or _cut(flat, hf_shape, hf_strides, side=1)
        if cut is None:
            done.append(_along_dims(flat, hf_shape, hf_strides, shape, strides))
        else:
            todo += cut
    return tuple(sorted(done, key=lambda copy: copy.hf_start))


def _unravel(index: int, shape: Shape, strides: Shape) -> Shape:
    return tuple(index // s % n for n, s in zip(shape, strides, strict=True))


def _dim_of(step: int, shape: Shape, strides: Shape) -> int:
    """Return the outermost dimension along which a step moves."""
    for d, (n, s) in enumerate(zip(shape, strides, strict=True)):
        if n > 1 and s <= step and step % s == 0:
            return d
    msg = f"a step of {step} elements, which fits no dimension of shape {list(shape)}"
    raise ValueError(msg)


def _cut(flat: _Flat, shape: Shape, strides: Shape, *, side: int) -> list[_Flat] | None:
    """Cut a loop that runs over the end of its dimension; `None` if no loop does."""
    hf_start, start, loops = flat
    first = _unravel(start if side == 2 else hf_start, shape, strides)  # noqa: PLR2004
    by_dim: dict[int, list[int]] = {}
    for number, loop in enumerate(loops):
        by_dim.setdefault(_dim_of(loop[side], shape, strides), []).append(number)
    for d, numbers in by_dim.items():
        numbers.sort(key=lambda number: loops[number][side])
        reach = first[d]
        for number in numbers:
            reach += (loops[number][0] - 1) * loops[number][side] // strides[d]
            if reach >= shape[d]:
                return _cut_loop(flat, number, first[d], shape[d], strides[d], side=side)
    return None


def _cut_loop(
    flat: _Flat, number: int, first: int, size: int, stride: int, *, side: int
) -> list[_Flat]:
    """Cut one loop into the steps before the end of the dimension, whole turns, and the rest.

    A turn is one pass through the whole dimension.
    """
    extent, hf_step, step = flat[2][number]
    stride_in_dim = (step if side == 2 else hf_step) // stride  # noqa: PLR2004
    if size % stride_in_dim:
        # The step does not divide the dimension, so the turns differ: make one copy per step.
        return [_part(flat, number, i, (1,)) for i in range(extent)]
    turn = size // stride_in_dim
    before = min(extent, -(-(size - first) // stride_in_dim) % turn)
    turns, rest = divmod(extent - before, turn)
    parts = [(0, (before,)), (before, (turns, turn)), (extent - rest, (rest,))]
    kept = [_part(flat, number, i, counts) for i, counts in parts if all(counts)]
    if len(kept) > 1 or turns > 1:
        return kept
    # The cut changed nothing: the inner loops run over the end of the dimension in the middle of
    # this turn. Make one copy per step.
    return [_part(flat, number, i, (1,)) for i in range(extent)]


def _part(flat: _Flat, number: int, first: int, counts: tuple[int, ...]) -> _Flat:
    """Keep some steps of one loop, from `first` on. Two counts make two nested loops."""
    hf_start, start, loops = flat
    _, hf_step, step = loops[number]
    inner = counts[-1]
    new = [(inner, hf_step, step)]
    if len(counts) > 1:
        new.insert(0, (counts[0], hf_step * inner, step * inner))
    changed = (*loops[:number], *(loop for loop in new if loop[0] > 1), *loops[number + 1 :])
    return hf_start + first * hf_step, start + first * step, changed


def _along_dims(
    flat: _Flat, hf_shape: Shape, hf_strides: Shape, shape: Shape, strides: Shape
) -> Copy:
    hf_start, start, flat_loops = flat
    flat_loops = tuple(sorted(flat_loops, key=lambda one: -one[1]))
    reach = 1
    for extent, hf_step, _ in reversed(flat_loops):
        if hf_step < reach:
            msg = f"loops {list(flat_loops)} do not ascend in the HuggingFace tensor"
            raise ValueError(msg)
        reach += (extent - 1) * hf_step
    loops = []
    for extent, hf_step, step in flat_loops:
        hf_dim, dim = _dim_of(hf_step, hf_shape, hf_strides), _dim_of(step, shape, strides)
        loops.append(Loop(extent, hf_dim, hf_step // hf_strides[hf_dim], dim, step // strides[dim]))
    return Copy(
        _unravel(hf_start, hf_shape, hf_strides), _unravel(start, shape, strides), tuple(loops)
    )


def clip(copy: Copy, box: Box) -> list[Copy]:
    """Return the part of a copy that lies in a box of the runtime tensor.

    Args:
        copy: A copy whose `start` counts from the first index of the whole runtime tensor.
        box: A box of that tensor.

    Returns:
        Disjoint copies whose `start` counts from the first index of the box.
    """
    ranges: list[list[tuple[tuple[int, int, int], ...]]] = []
    for d, (first, offset, size) in enumerate(zip(copy.start, box.offsets, box.sizes, strict=True)):
        along = [(n, loop) for n, loop in enumerate(copy.loops) if loop.dim == d]
        low = offset - first
        if not along:
            if not low <= 0 < low + size:
                return []
            continue
        along.sort(key=lambda one: -one[1].step)
        found = list(_steps_within(along, low, low + size))
        if not found:
            return []
        ranges.append(found)
    return [
        narrowed(copy, box.offsets, itertools.chain.from_iterable(chosen))
        for chosen in itertools.product(*ranges)
    ]


def _steps_within(
    loops: Sequence[tuple[int, Loop]], low: int, high: int
) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Yield nests that together visit what the loops visit in `[low, high)`.

    A nest holds `(number of the loop, first step, number of steps)` for each loop.
    """
    (number, loop), inner = loops[0], loops[1:]
    step, extent = loop.step, loop.extent
    span = sum((other.extent - 1) * other.step for _, other in inner)
    # Steps whose inner nest lies inside completely.
    first, stop = max(0, -(-low // step)), min(extent, (high - span - 1) // step + 1)
    if first < stop:
        yield ((number, first, stop - first), *((n, 0, other.extent) for n, other in inner))
    if not inner:
        return
    # Steps whose inner nest lies inside partly: at most one at each end if steps do not overlap.
    reach = range(max(0, -(-(low - span) // step)), min(extent, (high - 1) // step + 1))
    for i in (i for i in reach if not first <= i < stop):
        for nest in _steps_within(inner, low - i * step, high - i * step):
            yield ((number, i, 1), *nest)


def narrowed(copy: Copy, origin: Shape, chosen: Iterable[tuple[int, int, int]]) -> Copy:
    """Keep some steps of the chosen loops, and count `start` from `origin`.

    Args:
        copy: The copy.
        origin: First index of the new runtime tensor within the old one.
        chosen: `(number of the loop, first step, number of steps)` of each loop to shorten.
    """
    hf_start, start = list(copy.hf_start), [s - o for s, o in zip(copy.start, origin, strict=True)]
    loops: list[Loop | None] = list(copy.loops)
    for number, first, count in chosen:
        loop = copy.loops[number]
        hf_start[loop.hf_dim] += first * loop.hf_step
        start[loop.dim] += first * loop.step
        if count == 1:
            loops[number] = None
        elif count != loop.extent:
            loops[number] = Loop(count, loop.hf_dim, loop.hf_step, loop.dim, loop.step)
    return Copy(tuple(hf_start), tuple(start), tuple(loop for loop in loops if loop is not None))


def split(copy: Copy, max_elements: int) -> Iterator[Copy]:
    """Cut a copy into copies of at most `max_elements` elements, in the order of its loops."""
    if copy.numel <= max_elements:
        yield copy
        return
    outer = copy.loops[0]
    inner = copy.numel // outer.extent
    step = max(1, max_elements // inner)
    origin = (0,) * len(copy.start)
    for first in range(0, outer.extent, step):
        part = narrowed(copy, origin, [(0, first, min(step, outer.extent - first))])
        yield from split(part, max_elements)


def hf_loops(copy: Copy) -> IndexLoops:
    """Return the loops of a copy over the HuggingFace tensor alone."""
    return tuple((loop.extent, loop.hf_dim, loop.hf_step) for loop in copy.loops)


def runtime_loops(copy: Copy) -> IndexLoops:
    """Return the loops of a copy over the runtime tensor alone."""
    return tuple((loop.extent, loop.dim, loop.step) for loop in copy.loops)


def runtime_box(copy: Copy) -> Box | None:
    """Return the box of the runtime tensor that a copy reads; `None` if it has gaps."""
    sizes = [1] * len(copy.start)
    for extent, dim, step in sorted(runtime_loops(copy), key=lambda loop: loop[2]):
        if step != sizes[dim]:
            return None
        sizes[dim] *= extent
    return Box(copy.start, tuple(sizes))


def hf_box(copy: Copy) -> Box | None:
    """Return the box of the HuggingFace tensor that a copy fills; `None` if it has gaps.

    The loops of a copy that fills a box visit it in row-major order.
    """
    sizes = [1] * len(copy.hf_start)
    for loop in reversed(copy.loops):
        if loop.hf_step != sizes[loop.hf_dim]:
            return None
        sizes[loop.hf_dim] *= loop.extent
    return Box(copy.hf_start, tuple(sizes))


def copy_runs(copy: Copy, hf_shape: Shape, *, itemsize: int, tensor_start: int) -> ByteRuns:
    """Map a copy to the bytes of the HuggingFace tensor that it fills.

    Args:
        copy: A copy with at least one element.
        hf_shape: Shape of the HuggingFace tensor.
        itemsize: Bytes per element.
        tensor_start: Byte offset of the tensor's first element in its file.

    Returns:
        The longest possible runs; their bytes are the copy's elements in the order of its loops.

    Source:
        safetensors README, "Format": row-major, no holes in the byte buffer.
    """
    strides = [itemsize * s for s in strides_of(hf_shape)]
    start = tensor_start + sum(o * s for o, s in zip(copy.hf_start, strides, strict=True))
    run, loops = itemsize, list(copy.loops)
    while loops and loops[-1].hf_step * strides[loops[-1].hf_dim] == run:
        run *= loops.pop().extent
    merged: list[tuple[int, int]] = []
    for loop in loops:
        count, stride = loop.extent, loop.hf_step * strides[loop.hf_dim]
        if merged and merged[-1][1] == count * stride:
            merged[-1] = (merged[-1][0] * count, stride)
        else:
            merged.append((count, stride))
    return ByteRuns(start, run, tuple(merged))


def runtime_view(tensor: torch.Tensor, copy: Copy) -> torch.Tensor:
    """Return a view of a copy's elements in the runtime tensor, one dimension per loop."""
    strides = tensor.stride()
    return tensor.as_strided(
        tuple(loop.extent for loop in copy.loops),
        tuple(loop.step * strides[loop.dim] for loop in copy.loops),
        tensor.storage_offset() + sum(i * s for i, s in zip(copy.start, strides, strict=True)),
    )


def hf_view(tensor: torch.Tensor, copy: Copy) -> torch.Tensor:
    """Return a view of a copy's elements in the HuggingFace tensor, one dimension per loop."""
    strides = tensor.stride()
    return tensor.as_strided(
        tuple(loop.extent for loop in copy.loops),
        tuple(loop.hf_step * strides[loop.hf_dim] for loop in copy.loops),
        tensor.storage_offset() + sum(i * s for i, s in zip(copy.hf_start, strides, strict=True)),
    )


def source_span(copy: Copy) -> tuple[int, int]:
    """Return the first and the last index along dim 0 of the runtime tensor that a copy reads.

    `(0, 0)` for a scalar.
    """
    if not copy.start:
        return 0, 0
    last = copy.start[0]
    for loop in copy.loops:
        if loop.dim == 0:
            last += (loop.extent - 1) * loop.step
    return copy.start[0], last


def coverage_fault(parts: Sequence[tuple[Shape, IndexLoops]], shape: Shape) -> str | None:
    """Return why the loops do not visit each element of a tensor once; `None` if they do.

    The answer is exact for any loops. To keep the count small, all indices of a dimension that the
    same parts visit are counted as one.

    Args:
        parts: First index and loops of each part.
        shape: Shape of the tensor; `()` for a scalar.
    """
    visited = [_indices(start, loops) for start, loops in parts]
    for sets in visited:
        for d, indices in enumerate(sets):
            if len(np.unique(indices)) != len(indices):
                return f"a part visits an index of dim {d} twice"
            if np.min(indices) < 0 or np.max(indices) >= shape[d]:
                return f"a part reaches outside the tensor in dim {d}"
    wanted, have = math.prod(shape), sum(math.prod(map(len, sets)) for sets in visited)
    if have != wanted:
        return f"the parts hold {have} elements, the tensor has {wanted}"
    atoms, cells = _cells(visited, shape)
    # The volumes add up to the tensor. So if a cell is visited twice, another is not visited.
    bad = np.argwhere(cells != 1)
    if not len(bad):
        return None
    at = [int((atoms[d] == label).argmax()) for d, label in enumerate(bad[0])]
    return f"parts overlap or leave a gap at {at}"


def covered(parts: Sequence[tuple[Shape, IndexLoops]], shape: Shape) -> int:
    """Count the distinct elements of a tensor that the loops visit.

    Args:
        parts: First index and loops of each part, within the tensor.
        shape: Shape of the tensor; `()` for a scalar.
    """
    if not parts:
        return 0
    atoms, cells = _cells([_indices(start, loops) for start, loops in parts], shape)
    volumes = (cells > 0).astype(np.int64)
    for labels in atoms:
        volumes = np.tensordot(np.bincount(labels), volumes, axes=(0, 0))
    return int(volumes)


def _cells(
    visited: Sequence[Sequence[npt.NDArray[np.int64]]], shape: Shape
) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int32]]:
    """Return the labels of each dimension, as `_atoms` gives them, and how many parts visit a cell.

    A cell is one combination of labels, one per dimension.
    """
    atoms = [_atoms([sets[d] for sets in visited], n) for d, n in enumerate(shape)]
    cells = np.zeros([int(np.max(labels)) + 1 for labels in atoms], dtype=np.int32)
    for sets in visited:
        cells[np.ix_(*(np.unique(atoms[d][i]) for d, i in enumerate(sets)))] += 1
    return atoms, cells


def _indices(start: Shape, loops: IndexLoops) -> list[npt.NDArray[np.int64]]:
    sets = [np.array([first], np.int64) for first in start]
    for extent, dim, step in loops:
        sets[dim] = (sets[dim][:, None] + np.arange(extent, dtype=np.int64) * step).reshape(-1)
    return sets


def _atoms(sets: Sequence[npt.NDArray[np.int64]], size: int) -> npt.NDArray[np.int64]:
    """Label each index of a dimension. Indices that the same sets hold get the same label."""
    distinct = list({indices.tobytes(): indices for indices in sets}.values())
    numbers = np.random.default_rng(0)
    while True:
        marks = np.zeros(size, np.uint64)
        for indices, mark in zip(distinct, _random(numbers, len(distinct)), strict=True):
            marks[indices] ^= mark
        labels = np.unique(marks, return_inverse=True)[1].reshape(-1).astype(np.int64)
        counts = np.bincount(labels)
        # Random marks can collide by chance. Then a set holds only some indices of a label: retry.
        if all(counts[np.unique(labels[i])].sum() == len(i) for i in distinct):
            return labels


def _random(numbers: np.random.Generator, count: int) -> npt.NDArray[np.uint64]:
    return numbers.integers(1, 1 << 63, size=count, dtype=np.uint64)
