"""Find the bytes that several ranks need, and choose the rank that reads them.

Pure. Every rank computes the same result, because each has the needs of all ranks as input.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.load.read_plan import Bounce

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.load.read_plan import Read

Wanted = dict[str, list[tuple[int, int]]]
"""Byte ranges `(start, stop)` that a rank needs, by file; each goes to one piece of memory."""

ROUND_NBYTES = 32 << 20
"""Bytes that the ranks exchange before they wait for one another."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive bytes that several ranks need; on each rank they go to one piece of memory."""

    file: str
    """Name of the file."""
    start: int
    """First byte."""
    stop: int
    """One past the last byte."""
    ranks: tuple[int, ...]
    """The ranks that need the bytes; ascending."""
    reader: int
    """The one of `ranks` that reads the bytes and sends them to the others."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


def wanted_of(reads: Iterable[Read]) -> Wanted:
    """Return the byte ranges that a rank needs, without the gaps that its reads include."""
    found: Wanted = {}
    for read in reads:
        start = read.start
        for part in read.parts:
            if not isinstance(part, Bounce) or part.scatters or part.comparisons:
                found.setdefault(read.file, []).append((start, start + part.nbytes))
            start += part.nbytes
    return found


def shared_segments(wanted: Sequence[Mapping[str, Sequence[tuple[int, int]]]]) -> list[Segment]:
    """Find the bytes that several ranks need, and divide the reading among these ranks.

    Args:
        wanted: The byte ranges that each rank needs, by rank.

    Returns:
        Disjoint segments, ascending by file and position. No range that a rank needs begins or ends
        inside a segment. The reader of a segment is the one of its ranks that has the fewest bytes
        to read so far.
    """
    load = [0] * len(wanted)
    found = []
    for file in sorted({file for one in wanted for file in one}):
        ranges = [one.get(file, ()) for one in wanted]
        for start, stop, ranks in _cut(ranges):
            if len(ranks) == 1:
                load[ranks[0]] += stop - start
                continue
            reader = min(ranks, key=lambda rank: (load[rank], rank))
            load[reader] += stop - start
            found.append(Segment(file, start, stop, ranks, reader))
    return found


def _cut(
    ranges: Sequence[Sequence[tuple[int, int]]],
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Cut the ranges wherever one begins or ends; yield each piece with the ranks that need it."""
    events = sorted(
        event
        for rank, of_rank in enumerate(ranges)
        for start, stop in of_rank
        for event in ((start, rank, 1), (stop, rank, -1))
    )
    counts: dict[int, int] = {}
    before = 0
    for position, group in itertools.groupby(events, key=lambda event: event[0]):
        if counts and before < position:
            yield before, position, tuple(sorted(counts))
        for _, rank, change in group:
            counts[rank] = counts.get(rank, 0) + change
            if not counts[rank]:
                del counts[rank]
        before = position


def rounds(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Yield the segments of each round: at most `ROUND_NBYTES`, or one larger segment."""
    group: list[Segment] = []
    nbytes = 0
    for segment in segments:
        if group and nbytes + segment.nbytes > ROUND_NBYTES:
            yield group
            group, nbytes = [], 0
        group.append(segment)
        nbytes += segment.nbytes
    if group:
        yield group
