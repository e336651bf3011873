"""Let one rank read the bytes that several ranks need, and send them to the others.

This pays if storage is slower than the network. The ranks go through the shared bytes in rounds
of bounded size. One rank reads each segment into its own memory and sends it from there. The other
ranks receive the segment into their memory. If only one rank needs some bytes, that rank reads them
as without an exchange.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dcp_hf_writer.errors import CheckpointError, ReadError
from dcp_hf_writer.load.plan_exchange import rounds, shared_segments, wanted_of
from dcp_hf_writer.load.read_phase import Landing, run_reads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

    from dcp_hf_writer.load.plan_exchange import Segment
    from dcp_hf_writer.load.read_phase import Buffer
    from dcp_hf_writer.load.read_plan import Read
    from dcp_hf_writer.storage.open_inputs import OpenInputs


class Reading:
    """Runs the reads of one load: alone, or together with the other ranks of a group.

    A context manager. Enter it before the first step that can fail. If this rank fails before it
    calls `run`, leaving the context tells the other ranks; otherwise they would wait for it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Read with the ranks of `group`, whose backend must send CPU tensors; `None` is alone."""
        self._group = group
        self._is_known = group is None

    def run(
        self, inputs: OpenInputs, reads: Sequence[Read], targets: Sequence[torch.Tensor]
    ) -> list[int]:
        """Run reads as `run_reads` does, but read each byte on one rank only.

        A collective: all ranks of the group call it.

        Args:
            inputs: The files; every rank must give them the same names.
            reads: The reads that this rank planned.
            targets: The tensors in memory, by number.

        Returns:
            The number of each `Expected` whose bytes differ from the file.

        Raises:
            ReadError: If another rank could not read; names that rank and its error.
            CheckpointError: If this rank could not read.
        """
        if self._group is None:
            return run_reads(inputs, reads, targets)
        wanted = self._tell(wanted_of(reads))
        exchange = _Exchange(inputs, reads, targets, shared_segments(wanted), self._group)
        error: CheckpointError | None = None
        differing: list[int] = []
        try:
            exchange.run()
            differing = exchange.differing + run_reads(inputs, exchange.others, targets)
        except CheckpointError as found:
            error = found
        self._tell(error)
        return differing

    def _tell(self, what: Any) -> list[Any]:
        """Exchange one value with the other ranks; raise if one of them sends an error."""
        told: list[Any] = [None] * dist.get_world_size(self._group)
        self._is_known = True
        dist.all_gather_object(told, what, group=self._group)
        if isinstance(what, BaseException):
            raise what
        for rank, found in enumerate(told):
            if isinstance(found, BaseException):
                raise ReadError(
                    "another rank of the exchange failed",
                    phase="read",
                    path=getattr(found, "path", None),
                    found=f"on rank {rank} of the group: {found}",
                )
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and not self._is_known:
            known = isinstance(error, CheckpointError)
            self._tell(error if known else ReadError(str(error), phase="read"))


@dataclass(slots=True)
class _Filling:
    """A read whose memory is filled segment by segment."""

    read: Read
    segments: list[Segment]
    """The segments of it that other ranks need too; ascending and disjoint."""
    left: int
    """Number of segments that have not arrived yet."""
    buffer: Buffer
    memory: list[memoryview]
    """The memory of each part of the read."""

    def at(self, start: int, stop: int) -> memoryview:
        """Return the memory of a byte range of the file that lies within one part."""
        reached = self.read.start
        for part, memory in zip(self.read.parts, self.memory, strict=True):
            if start < reached + part.nbytes:
                return memory[start - reached : stop - reached]
            reached += part.nbytes
        raise AssertionError

    def alone(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the ranges that only this rank needs: first byte in the file, and memory."""
        reached = self.read.start
        for start, stop in wanted_of([self.read])[self.read.file]:
            reached = start
            for segment in self.segments:
                if start <= segment.start < stop:
                    if reached < segment.start:
                        yield reached, self.at(reached, segment.start)
                    reached = segment.stop
            if reached < stop:
                yield reached, self.at(reached, stop)


class _Exchange:
    """One rank's part in an exchange."""

    def __init__(
        self,
        inputs: OpenInputs,
        reads: Sequence[Read],
        targets: Sequence[torch.Tensor],
        segments: Sequence[Segment],
        group: dist.ProcessGroup,
    ) -> None:
        self._inputs, self._landing, self._group = inputs, Landing(targets), group
        self._rank = dist.get_rank(group)
        self._segments = segments
        own = [segment for segment in segments if self._rank in segment.ranks]
        per_read = [(read, _within(read, own)) for read in reads]
        self.others = [read for read, found in per_read if not found]
        """Reads that share no bytes with another rank."""
        self._users: dict[Segment, list[int]] = {}
        self._shared = [one for one in per_read if one[1]]
        for number, (_, found) in enumerate(self._shared):
            for segment in found:
                self._users.setdefault(segment, []).append(number)
        self._open: dict[int, _Filling] = {}
        self._error: CheckpointError | None = None

    @property
    def differing(self) -> list[int]:
        """The number of each `Expected` whose bytes differ from the file."""
        return self._landing.differing

    def run(self) -> None:
        """Exchange all segments, in the same rounds on every rank.

        Raises:
            CheckpointError: If this rank could not read. It has sent its memory nevertheless,
                because the other ranks wait for it.
        """
        tag = 0
        for group in rounds(self._segments):
            numbered = [
                (number, segment)
                for number, segment in enumerate(group, tag)
                if self._rank in segment.ranks
            ]
            tag += len(group)
            # Post all receives before any wait: a send may complete only when its receive exists.
            pending = [
                w for n, s in numbered if s.reader != self._rank for w in self._receive(s, n)
            ]
            pending += [w for n, s in numbered if s.reader == self._rank for w in self._send(s, n)]
            for work in pending:
                work.wait()
            for _, segment in numbered:
                self._arrived(segment)
        if self._error is not None:
            raise self._error

    def _receive(self, segment: Segment, tag: int) -> list[dist.Work]:
        memory = _tensor(self._memory(segment)[0])
        source = dist.get_global_rank(self._group, segment.reader)
        work = dist.irecv(memory, source, group=self._group, tag=tag)
        return [] if work is None else [work]

    def _send(self, segment: Segment, tag: int) -> list[dist.Work]:
        memory = self._memory(segment)[0]
        try:
            with self._inputs.use(segment.file) as file:
                file.read_into([memory], segment.start)
        except CheckpointError as error:
            self._error = self._error or error
        others = [rank for rank in segment.ranks if rank != self._rank]
        targets = [dist.get_global_rank(self._group, rank) for rank in others]
        sent = [dist.isend(_tensor(memory), to, group=self._group, tag=tag) for to in targets]
        return [work for work in sent if work is not None]

    def _memory(self, segment: Segment) -> list[memoryview]:
        """Return all memory of this rank that a segment goes to."""
        fillings = [self._filling(number) for number in self._users[segment]]
        return [filling.at(segment.start, segment.stop) for filling in fillings]

    def _filling(self, number: int) -> _Filling:
        found = self._open.get(number)
        if found is None:
            read, segments = self._shared[number]
            buffer = self._landing.buffer()
            memory = self._landing.memory(read, buffer)
            found = _Filling(read, segments, len(segments), buffer, memory)
            self._open[number] = found
        return found

    def _arrived(self, segment: Segment) -> None:
        first, *others = self._memory(segment)
        for other in others:
            other[:] = first
        for number in self._users[segment]:
            filling = self._open[number]
            filling.left -= 1
            if not filling.left:
                self._finish(self._open.pop(number))

    def _finish(self, filling: _Filling) -> None:
        """Read the bytes that only this rank needs, then copy the whole read to its targets."""
        try:
            with self._inputs.use(filling.read.file) as file:
                for start, memory in filling.alone():
                    file.read_into([memory], start)
            self._landing.scatter(filling.read, filling.buffer)
        except CheckpointError as error:
            self._error = self._error or error
        finally:
            filling.buffer.give_back()


def _within(read: Read, segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments that a read needs; they are ascending, as `segments` must be."""
    first = bisect.bisect_left(segments, (read.file, read.start), key=lambda s: (s.file, s.start))
    stop = bisect.bisect_left(
        segments, (read.file, read.start + read.nbytes), key=lambda s: (s.file, s.start)
    )
    ranges = wanted_of([read]).get(read.file, [])
    return [
        segment
        for segment in segments[first:stop]
        if any(start <= segment.start < end for start, end in ranges)
    ]


def _tensor(memory: memoryview) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)
