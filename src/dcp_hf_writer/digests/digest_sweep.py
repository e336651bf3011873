"""Read a file once, compute many digests, and prove that they cover each of its bytes once.

Pure, except for the `read` function that the caller passes. A digest may cover strided bytes: the
blocks of column shards interleave in the file, and the sweep still reads each byte once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from dcp_hf_writer.tensors.boxes import ByteRuns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Read = Callable[[memoryview, int], int]

WINDOW_NBYTES = 2 << 20
"""Bytes read at a time; a sweep allocates twice that.

A window that fits in a cache is twice as fast as a larger one.
"""

# Read spans together if the gap is at most this: reading it costs no more than a system call.
_GAP_NBYTES = 64 << 10


@dataclass(eq=False, slots=True)
class Digest:
    """A digest from the manifest, and the digest recomputed from the file."""

    expected: str
    """xxh3_64 from the manifest, in hex."""
    what: str
    """What the digest covers, in words for a report."""
    key: str | None = None
    """HuggingFace name of the tensor that the bytes belong to."""
    rank: int | None = None
    """Rank that wrote the bytes."""
    start: int = 0
    """Offset of the first byte in the file."""
    stop: int = 0
    """One past the last byte."""
    is_of_many: bool = False
    """Whether it covers several spans, so that the end of a span does not finish it."""
    found: str | None = None
    """xxh3_64 of the bytes in the file; `None` until all of them were read."""
    _hasher: xxhash.xxh3_64 | None = None

    def feed(self, data: Any) -> None:
        """Add the next bytes, in the order of the file."""
        if self._hasher is None:
            self._hasher = xxhash.xxh3_64()
        self._hasher.update(data)

    def finish(self) -> None:
        """Set `found` to the digest of the bytes fed.

        This frees the hasher: a manifest has too many digests to keep a hasher for each.
        """
        hasher, self._hasher = self._hasher or xxhash.xxh3_64(), None
        self.found = str(hasher.hexdigest())


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a file, and the digests that must cover each of them once."""

    start: int
    """Offset of the first byte in the file."""
    stop: int
    """One past the last byte."""
    parts: tuple[tuple[Digest, ByteRuns], ...]
    """The digests, each with the bytes of the span that it covers."""
    key: str | None = None
    """HuggingFace name of the tensor whose data the span is."""


def extent_of(runs: ByteRuns) -> int:
    """Return the distance from the start of the first run to the end of the last, in bytes."""
    return runs.nbytes + sum((count - 1) * stride for count, stride in runs.loops)


def contiguous(start: int, stop: int) -> ByteRuns:
    """Return the bytes `[start, stop)` as a single run."""
    return ByteRuns(start, stop - start, ())


def clip(runs: ByteRuns, low: int, high: int) -> Iterator[ByteRuns]:
    """Yield the bytes of `runs` that lie in `[low, high)`, in order, and cut runs at both ends.

    Args:
        runs: Ascending: the stride of each loop is at least the extent of everything inside it.
        low: Offset of the first byte.
        high: One past the last byte.
    """
    if low <= runs.start and runs.start + extent_of(runs) <= high:
        yield runs
        return
    if not runs.loops:
        start, stop = max(runs.start, low), min(runs.start + runs.nbytes, high)
        if start < stop:
            yield contiguous(start, stop)
        return
    (count, stride), inner = runs.loops[0], ByteRuns(runs.start, runs.nbytes, runs.loops[1:])
    reach = extent_of(inner)
    # Steps that lie at least partly inside, then those that lie completely inside.
    first = max(0, (low - runs.start - reach) // stride + 1)
    stop = min(count, -(-(high - runs.start) // stride))
    whole_first = max(first, -(-(low - runs.start) // stride))
    whole_stop = min(stop, (high - runs.start - reach) // stride + 1)
    if whole_first >= whole_stop:
        whole_first = whole_stop = stop
    for i in range(first, whole_first):
        yield from clip(_step(inner, i * stride), low, high)
    if whole_first < whole_stop:
        loops = ((whole_stop - whole_first, stride), *inner.loops)
        yield ByteRuns(runs.start + whole_first * stride, runs.nbytes, loops)
    for i in range(whole_stop, stop):
        yield from clip(_step(inner, i * stride), low, high)


def _step(runs: ByteRuns, by: int) -> ByteRuns:
    return ByteRuns(runs.start + by, runs.nbytes, runs.loops)


class Sweep:
    """Reads spans of files, one window after another, and reuses its memory for every file."""

    def __init__(self, window_nbytes: int = WINDOW_NBYTES) -> None:
        """Allocate two windows."""
        self._window: Bytes = np.empty(window_nbytes, np.uint8)
        self._scratch: Bytes = np.empty(window_nbytes, np.uint8)
        self._check: Callable[[int], None] = lambda _: None

    def run(
        self, spans: Sequence[Span], read: Read, check: Callable[[int], None]
    ) -> list[tuple[Span, str]]:
        """Read spans of one file and feed their digests.

        Args:
            spans: Spans in ascending order, without overlap.
            read: Fills a buffer from an offset of the file; returns the number of bytes read.
            check: Called with the number of bytes done, after each span and after each window of a
                large span; raises to stop the sweep.

        Returns:
            Each faulty span, with the reason: its digests do not cover each byte once, or it ends
            beyond the end of the file.
        """
        self._check = check
        found = []
        for group in self._groups(spans):
            found += self._large(group[0], read) if len(group) == 1 else self._small(group, read)
        return found

    def _groups(self, spans: Sequence[Span]) -> Iterator[list[Span]]:
        """Yield groups of neighbouring spans that fit in one window; a larger span is alone."""
        group: list[Span] = []
        for span in spans:
            is_near = group and span.start - group[-1].stop <= _GAP_NBYTES
            if group and not (is_near and span.stop - group[0].start <= len(self._window)):
                yield group
                group = []
            group.append(span)
        if group:
            yield group

    def _small(self, group: Sequence[Span], read: Read) -> list[tuple[Span, str]]:
        base = group[0].start
        have = read(self._window[: group[-1].stop - base].data, base)
        found = []
        for span in group:
            if span.stop - base > have:
                found.append((span, BEYOND))
                continue
            here = self._feed(span, base, span.start, span.stop)
            fault = _volume_fault(span) or here
            if fault is not None:
                found.append((span, fault))
            self._end(span, span.stop - span.start)
        return found

    def _large(self, span: Span, read: Read) -> list[tuple[Span, str]]:
        fault = _volume_fault(span)
        step = len(self._window)
        unit = _unit(span)
        # Windows end at multiples of the unit, because the coverage is counted in whole units.
        step = step // unit * unit if unit <= step else step
        for low in range(span.start, span.stop, step):
            high = min(low + step, span.stop)
            if read(self._window[: high - low].data, low) < high - low:
                return [(span, BEYOND)]
            # Go on after a coverage fault, because the digests of the blocks are still useful.
            here = self._feed(span, low, low, high)
            fault = fault or here
            self._check(high - low)
        self._end(span, 0)
        return [] if fault is None else [(span, fault)]

    def _end(self, span: Span, nbytes: int) -> None:
        for digest, _ in span.parts:
            if not digest.is_of_many:
                digest.finish()
        self._check(nbytes)

    def _feed(self, span: Span, base: int, low: int, high: int) -> str | None:
        """Feed the bytes in `[low, high)` of a window that starts at `base` in the file."""
        pieces = [(digest, piece) for digest, runs in span.parts for piece in clip(runs, low, high)]
        for digest, piece in pieces:
            data = _strided(self._window, piece, base)
            if piece.loops:
                scratch = self._scratch[: data.nbytes].view(data.dtype).reshape(data.shape)
                np.copyto(scratch, data)
                data = scratch
            digest.feed(data)
        return self._cover_fault([piece for _, piece in pieces], low, high)

    def _cover_fault(self, pieces: Sequence[ByteRuns], low: int, high: int) -> str | None:
        if pieces == [contiguous(low, high)]:
            return None
        unit = math.gcd(
            high - low, *(n for piece in pieces for n in _offset_length_strides(piece, low))
        )
        count = np.zeros((high - low) // max(unit, 1), np.uint8)
        for piece in pieces:
            loops = tuple((n, stride // unit) for n, stride in piece.loops)
            runs = ByteRuns((piece.start - low) // unit, piece.nbytes // unit, loops)
            _strided(count, runs, 0, is_byte_wise=True)[...] += np.uint8(1)
        # The uint8 count of a unit covered 257 times wraps to 1. The volume is checked apart: if it
        # is right, such a unit means a gap elsewhere, which this finds.
        wrong = np.flatnonzero(count != 1)
        if not len(wrong):
            return None
        fault = "overlap" if count[wrong[0]] else "leave a gap"
        return f"the blocks {fault} at byte {int(wrong[0]) * unit + low}"


BEYOND = "the bytes reach beyond the end of the file"
"""The reason for a span that the file is too short for; its digests stay incomplete."""


def _volume_fault(span: Span) -> str | None:
    have = sum(runs.nbytes * runs.count for _, runs in span.parts)
    wanted = span.stop - span.start
    return None if have == wanted else f"the blocks hold {have} of {wanted} bytes"


def _unit(span: Span) -> int:
    """Return the greatest common divisor of all run offsets, lengths and strides, in bytes."""
    return (
        math.gcd(*(n for _, runs in span.parts for n in _offset_length_strides(runs, span.start)))
        or 1
    )


def _offset_length_strides(runs: ByteRuns, base: int) -> Iterator[int]:
    yield runs.start - base
    yield runs.nbytes
    yield from (stride for _, stride in runs.loops)


def _strided(memory: Bytes, runs: ByteRuns, base: int, *, is_byte_wise: bool = False) -> Any:
    """View runs in memory that starts at `base` in the file; an element is a run, or a byte."""
    start = runs.start - base
    if not runs.loops:
        return memory[start : start + runs.nbytes]
    shape, strides = zip(*runs.loops, strict=True)
    if is_byte_wise:
        shape, strides = (*shape, runs.nbytes), (*strides, 1)
    kind = np.dtype("u1" if is_byte_wise else f"V{runs.nbytes}")
    return np.ndarray(shape, kind, memory.data, start, strides)
