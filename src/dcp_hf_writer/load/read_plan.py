"""Plan a few large reads, in order, for the stored elements that a load needs.

Pure: no I/O. Bytes that are contiguous both in the file and in memory are read straight into
memory. The rest (casts, other devices, short runs of a column shard) goes through a buffer. If the
gaps between such runs are small, one read takes the span from the first to the last byte.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dcp_hf_writer.tensors.boxes import Box, Shape
    from dcp_hf_writer.tensors.strided_copies import Copy

PIECE_NBYTES = 8 << 20
"""Approximate limit of one read. It lets several threads share a large tensor."""

BOUNCE_NBYTES = 4 << 20
"""Limit of the bytes of one read that go through the buffer. They fit into the CPU cache."""

# Gaps up to this size between two ranges are read too: a system call and a seek cost more.
MAX_GAP_NBYTES = 64 << 10

# Shorter runs go through the buffer: a copy from there is faster than a system call for each run.
MIN_RUN_NBYTES = 128 << 10

# Limit of the buffers of one read; one system call takes 1024.
_MAX_PARTS = 1000

Loops = tuple[tuple[int, int, int], ...]
"""`(extent, stride in the file, stride in memory)` of each nested loop, in elements."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Elements of one stored tensor to read into one tensor in memory."""

    file: str
    """Name of the file."""
    start: int
    """Offset of the first element in the file, in bytes."""
    dtype: torch.dtype
    """Dtype of the elements in the file."""
    target: int
    """Number of the tensor in memory."""
    target_start: int
    """Where the first element goes, in elements from the first element of that tensor."""
    loops: Loops
    """Loops over the elements, in any order; all strides are at least 1."""
    is_direct: bool
    """Whether the bytes can be read straight into memory: host memory of the same dtype."""


def fetch_of_copy(
    copy: Copy,
    *,
    file: str,
    start: int,
    dtype: torch.dtype,
    strides: Shape,
    target: int,
    target_strides: Sequence[int],
    is_direct: bool,
) -> Fetch:
    """Return the fetch of the elements of a copy.

    Args:
        copy: Its HuggingFace side is the stored tensor, its runtime side the tensor in memory.
        file: Name of the file.
        start: Offset of the stored tensor's first element in the file, in bytes.
        dtype: Dtype of the stored tensor.
        strides: Strides of the stored tensor, in elements.
        target: Number of the tensor in memory.
        target_strides: Strides of the tensor in memory, in elements.
        is_direct: As in `Fetch`.
    """
    first = sum(i * s for i, s in zip(copy.hf_start, strides, strict=True))
    return Fetch(
        file=file,
        start=start + first * dtype.itemsize,
        dtype=dtype,
        target=target,
        target_start=sum(i * s for i, s in zip(copy.start, target_strides, strict=True)),
        loops=tuple(
            (n.extent, n.hf_step * strides[n.hf_dim], n.step * target_strides[n.dim])
            for n in copy.loops
        ),
        is_direct=is_direct,
    )


def fetch_of_box(
    box: Box,
    *,
    file: str,
    start: int,
    dtype: torch.dtype,
    strides: Sequence[int],
    target: int,
    target_strides: Sequence[int],
    is_direct: bool,
) -> Fetch:
    """Return the fetch of a box into a tensor of the same shape; see `fetch_of_copy`."""
    first = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    loops = tuple(zip(box.sizes, strides, target_strides, strict=True))
    return Fetch(file, start + first * dtype.itemsize, dtype, target, 0, loops, is_direct)


def fetch_of_bytes(file: str, start: int, nbytes: int) -> Fetch:
    """Return a fetch that names bytes of a file, for a check of their digests."""
    return Fetch(file, start, torch.uint8, 0, 0, ((nbytes, 1, 1),), is_direct=True)


@dataclass(frozen=True, slots=True)
class Scatter:
    """A strided copy from the buffer into one tensor."""

    start: int
    """Byte offset of the first element within the part of the buffer."""
    dtype: torch.dtype
    """Dtype of the elements in the buffer."""
    target: int
    """Number of the tensor in memory."""
    target_start: int
    """Where the first element goes, in elements from the first element of that tensor."""
    loops: Loops
    """Loops over the elements, outermost first."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Bytes that a file must hold at some offset if the caller's assumption about it is right."""

    file: str
    """Name of the file."""
    start: int
    """Offset of the first byte in the file."""
    content: bytes
    """The bytes."""
    number: int
    """Number that the caller gets back if the file holds other bytes."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bytes in the buffer to compare with expected bytes."""

    start: int
    """First byte within the part of the buffer."""
    content: bytes
    """The expected bytes."""
    number: int
    """Number of the `Expected`."""


@dataclass(frozen=True, slots=True)
class Direct:
    """Bytes that go straight into a tensor."""

    nbytes: int
    target: int
    """Number of the tensor in memory."""
    target_start: int
    """Where the first byte goes, in bytes from the start of that tensor."""


@dataclass(frozen=True, slots=True)
class Bounce:
    """Bytes that go into the buffer and are copied to tensors from there; a gap has no copies."""

    nbytes: int
    scatters: tuple[Scatter, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


Part = Direct | Bounce


@dataclass(frozen=True, slots=True)
class Read:
    """Consecutive bytes of one file."""

    file: str
    """Name of the file."""
    start: int
    """Offset of the first byte."""
    parts: tuple[Part, ...]
    """Where the bytes go; the parts follow one another in the file."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return sum(part.nbytes for part in self.parts)


def span_of(fetch: Fetch) -> int:
    """Return the number of bytes from the first to the last byte of a fetch; 0 if it is empty."""
    if any(extent == 0 for extent, _, _ in fetch.loops):
        return 0
    return _span(fetch.loops) * fetch.dtype.itemsize


def plan_reads(fetches: Iterable[Fetch], expected: Iterable[Expected] = ()) -> list[Read]:
    """Plan the reads that fetch everything.

    Args:
        fetches: The elements to read.
        expected: Bytes to compare with the file in the same reads.

    Returns:
        Reads, ascending by file and offset. They overlap only where two fetches need the same
        bytes.
    """
    extents = [extent for fetch in dict.fromkeys(fetches) for extent in _extents(fetch)]
    for one in expected:
        comparison = Comparison(0, one.content, one.number)
        part = Bounce(len(one.content), comparisons=(comparison,))
        extents.append(_Extent(one.file, one.start, part))
    extents.sort(key=lambda extent: (extent.file, extent.start, extent.part.nbytes))
    reads: list[Read] = []
    for file, group in itertools.groupby(extents, key=lambda extent: extent.file):
        builder = _Builder(file)
        for extent in group:
            if not builder.add(extent):
                reads.append(builder.read())
                builder = _Builder(file)
                builder.add(extent)
        reads.append(builder.read())
    return reads


@dataclass(frozen=True, slots=True)
class _Extent:
    """Consecutive bytes of one file that become one part of a read."""

    file: str
    start: int
    part: Part


class _Builder:
    """Collects extents of one file, in ascending order, into one read."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._start = self._stop = -1
        self._parts: list[Part] = []
        self._bounced = 0

    def add(self, extent: _Extent) -> bool:
        """Add an extent; return `False` if it must start a new read."""
        if not self._parts:
            self._start = self._stop = extent.start
        gap = extent.start - self._stop
        if gap < 0:
            return self._add_overlapping(extent)
        nbytes = extent.part.nbytes
        bounced = nbytes if isinstance(extent.part, Bounce) else 0
        if self._parts and (
            gap > MAX_GAP_NBYTES
            or extent.start + nbytes - self._start > PIECE_NBYTES
            or len(self._parts) + 2 > _MAX_PARTS
            or self._bounced + gap + bounced > BOUNCE_NBYTES
        ):
            return False
        if gap:
            self._parts.append(Bounce(gap))
        self._parts.append(extent.part)
        self._bounced += gap + bounced
        self._stop = extent.start + nbytes
        return True

    def _add_overlapping(self, extent: _Extent) -> bool:
        """Add an extent that begins within the last part, if both go through the buffer."""
        last, part = self._parts[-1], extent.part
        if not isinstance(last, Bounce) or not isinstance(part, Bounce):
            return False
        skipped = extent.start - (self._stop - last.nbytes)
        nbytes = max(last.nbytes, skipped + part.nbytes)
        if skipped < 0 or self._bounced + nbytes - last.nbytes > BOUNCE_NBYTES:
            return False
        if any(skipped % scatter.dtype.itemsize for scatter in part.scatters):
            return False
        scatters = (replace(one, start=one.start + skipped) for one in part.scatters)
        comparisons = (replace(one, start=one.start + skipped) for one in part.comparisons)
        self._parts[-1] = Bounce(
            nbytes, (*last.scatters, *scatters), (*last.comparisons, *comparisons)
        )
        self._bounced += nbytes - last.nbytes
        self._stop += nbytes - last.nbytes
        return True

    def read(self) -> Read:
        """Return the read of the collected extents."""
        return Read(self._file, self._start, tuple(self._parts))


def merged(loops: Loops) -> Loops:
    """Merge loops into as few as possible; the outermost loop in the file comes first."""
    kept = [loop for loop in loops if loop[0] > 1]
    if len(kept) > 1:
        kept.sort(key=lambda loop: (-loop[1], -loop[2]))
    found: list[tuple[int, int, int]] = []
    for extent, stride, target_stride in kept:
        if found and found[-1][1:] == (extent * stride, extent * target_stride):
            found[-1] = (found[-1][0] * extent, stride, target_stride)
        else:
            found.append((extent, stride, target_stride))
    return tuple(found)


def _extents(fetch: Fetch) -> Iterator[_Extent]:
    if any(loop[0] == 0 for loop in fetch.loops):
        return
    loops, itemsize = merged(fetch.loops), fetch.dtype.itemsize
    run = 1
    if loops and loops[-1][1:] == (1, 1):
        run, outer = loops[-1][0], loops[:-1]
    else:
        outer = loops
    if fetch.is_direct and not outer:
        yield from _direct(fetch, fetch.start, fetch.target_start * itemsize, run * itemsize)
        return
    if fetch.is_direct and run * itemsize >= MIN_RUN_NBYTES:
        for start, target_start in _starts(fetch, outer):
            yield from _direct(fetch, start, target_start * itemsize, run * itemsize)
        return
    spans = _cut(loops, max(1, BOUNCE_NBYTES // itemsize), MAX_GAP_NBYTES // itemsize)
    for first, target_first, inner in spans:
        start = fetch.start + first * itemsize
        scatter = Scatter(0, fetch.dtype, fetch.target, fetch.target_start + target_first, inner)
        yield _Extent(fetch.file, start, Bounce(_span(inner) * itemsize, (scatter,)))


def _direct(fetch: Fetch, start: int, target_start: int, nbytes: int) -> Iterator[_Extent]:
    if nbytes <= PIECE_NBYTES:
        yield _Extent(fetch.file, start, Direct(nbytes, fetch.target, target_start))
        return
    for done in range(0, nbytes, PIECE_NBYTES):
        size = min(PIECE_NBYTES, nbytes - done)
        yield _Extent(fetch.file, start + done, Direct(size, fetch.target, target_start + done))


def _starts(fetch: Fetch, loops: Loops) -> Iterator[tuple[int, int]]:
    """Yield the start of each step in the file, in bytes, and in memory, in elements."""
    itemsize = fetch.dtype.itemsize
    for steps in itertools.product(*(range(extent) for extent, _, _ in loops)):
        first = sum(i * loop[1] for i, loop in zip(steps, loops, strict=True))
        target_first = sum(i * loop[2] for i, loop in zip(steps, loops, strict=True))
        yield fetch.start + first * itemsize, fetch.target_start + target_first


def _span(loops: Sequence[tuple[int, int, int]]) -> int:
    """Return the number of elements from the first to the last that loops visit in the file."""
    return 1 + sum((extent - 1) * stride for extent, stride, _ in loops)


def _cut(loops: Loops, max_elements: int, max_gap: int) -> Iterator[tuple[int, int, Loops]]:
    """Cut loops into groups; one read takes the whole span of a group.

    Yields:
        The first element of a group in the file and in memory, counted from the first elements of
        all loops; and the loops of the group.
    """
    if not loops:
        yield 0, 0, loops
        return
    (extent, stride, target_stride), inner = loops[0], loops[1:]
    span = _span(inner)
    # Number of steps of this loop that are read together.
    together = 1
    if stride - span <= max_gap and span <= max_elements:
        together = min(extent, 1 + (max_elements - span) // stride)
    if together > 1:
        for first in range(0, extent, together):
            count = min(together, extent - first)
            part = ((count, stride, target_stride), *inner) if count > 1 else inner
            yield first * stride, first * target_stride, part
        return
    for i in range(extent):
        for first, target_first, part in _cut(inner, max_elements, max_gap):
            yield i * stride + first, i * target_stride + target_first, part
