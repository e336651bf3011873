"""Ranks write the cells of output files for each other, so that each cell has one writer.

Each rank casts, reorders and digests its own blocks, once, and sends the bytes to the owners of
their cells. An owner puts a cell together in a reused buffer and passes it to a sink. The work goes
in rounds of bounded memory. A rank never waits for another one inside a sink.

After an error in its own tensors or its sink, a rank stays in all rounds, because the others wait
for it; it returns the error at the end. What it sends after the error is of no use: the save then
has no export. Any error that is raised instead ends the save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dcp_hf_writer.errors import CoverageError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.cells import ExchangedFile, Grid, Shares, cell_owners
from dcp_hf_writer.plan.exchange_rounds import ExchangeMemory, Travel, plan_rounds
from dcp_hf_writer.plan.slice_cuts import (
    cuts_by_slice,
    decode_pieces,
    encode_pieces,
    pieces_of_owners,
)
from dcp_hf_writer.save.block_bytes import BlockBytes, HeaderBytes
from dcp_hf_writer.save.bounce_buffer import BounceBuffer
from dcp_hf_writer.save.cell_assembly import Arena, CellAssembly, CellSink
from dcp_hf_writer.save.export_failures import FATAL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt
    import torch
    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.plan.slice_cuts import Cut, Piece
    from dcp_hf_writer.plan.written_block import WrittenBlock
    from dcp_hf_writer.save.block_bytes import FileBytes
    from dcp_hf_writer.save.exchange_group import ExchangeGroup
    from dcp_hf_writer.save.hf_half import ItemTensors

    Numbers = npt.NDArray[np.int64]

__all__ = ["CellSink", "Exchanged", "ExchangedFile", "ExchangedWrites"]


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What one rank did in an exchange."""

    blocks: list[WrittenBlock]
    """Its own blocks, whoever wrote them, with their digests; none after an error."""
    sent_nbytes: int
    """Bytes that it sent to other ranks."""
    received_nbytes: int
    """Bytes that it received from them."""
    error: Exception | None = None
    """What went wrong on this rank alone, or `CoverageError` on all ranks: there is no export."""


class ExchangedWrites:
    """The exchange of one save."""

    def __init__(self, group: ExchangeGroup | None, files: Sequence[ExchangedFile]) -> None:
        """Exchange bytes of some files.

        Args:
            group: The ranks; `None` if this is the only one.
            files: The files; equal on all ranks.
        """
        self._group = group
        self._files = tuple(files)

    def run(
        self,
        work: Mapping[int, Sequence[tuple[WriteItem, Region]]],
        source: ItemTensors,
        *,
        headers: Mapping[int, bytes],
        sink: CellSink,
        check: Callable[[], None],
        host_budget_bytes: int,
        before_wait: Callable[[], None] = lambda: None,
    ) -> Exchanged:
        """Exchange all bytes, and put this rank's cells into its sink; all ranks call it.

        Args:
            work: Blocks of this rank by index of the file, as `regions_by_file` returns them.
            source: Resolves items to tensors.
            headers: Header of each file, on the coordinator; empty on the other ranks.
            sink: Takes the cells that this rank owns.
            check: Called again and again; raises if the save was given up.
            host_budget_bytes: Memory that this rank may use in addition to the staged copy. A cell
                should take at most a quarter of it.
            before_wait: Called before this rank waits for other ranks.

        Returns:
            What this rank did. The caller must look at `error`.

        Raises:
            RankLostError: If a rank was lost, or did not answer by the deadline.
            SaveAbortedError: If this rank or another one gave the save up.
            SaveTimeoutError: If the deadline has passed.
            SlotTimeoutError: If the sink got no slot in time.
        """
        before_wait()
        memory = self._memory(host_budget_bytes)
        bounce = BounceBuffer()
        bounce.resize(memory.bounce_nbytes)
        held: list[FileBytes] = [HeaderBytes(file, data) for file, data in headers.items()]
        blocks = [
            BlockBytes(file, item, region, source, bounce)
            for file, of_file in sorted(work.items())
            for item, region in of_file
        ]
        held += blocks
        try:
            plan = _agree(self._group, Grid(self._files, slice_nbytes=memory.slice_nbytes), held)
        except CoverageError as fault:
            return Exchanged([], 0, 0, fault)
        rounds = _Rounds(self._group, plan, held, memory, _Calls(sink, check, before_wait))
        written, error = rounds.run(blocks)
        return Exchanged(written, rounds.sent_nbytes, rounds.received_nbytes, error)

    def _memory(self, budget_nbytes: int) -> ExchangeMemory:
        """Return how memory is divided; equal on all ranks, so the smallest budget counts."""
        if self._group is not None:
            told = self._group.gather(np.array([budget_nbytes], np.int64))
            budget_nbytes = min(int(one[0]) for one in told)
        largest = max((min(file.cell_nbytes, file.nbytes) for file in self._files), default=1)
        return ExchangeMemory.within(budget_nbytes, largest_cell=largest)


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What a rank knows once the ranks have told each other what they hold."""

    grid: Grid
    travel: Travel
    pieces: list[list[Piece]]
    """By rank, the pieces that reach into this rank's cells; at this rank, all its own pieces."""


def _agree(group: ExchangeGroup | None, grid: Grid, held: Sequence[FileBytes]) -> _Agreed:
    own: list[Piece] = [(one.file, one.runs) for one in held]
    mine = grid.shares_of(own)
    if group is None:
        shares, told = [mine], [own]
    else:
        shares = [_decoded(one) for one in group.gather(np.concatenate([mine.slices, mine.nbytes]))]
    grid.check_whole(shares)
    travel = Travel(grid, cell_owners(grid, shares), shares)
    if group is not None:
        for_owners = pieces_of_owners(grid, travel.owner, own, world_size=group.size)
        told = [decode_pieces(one) for one in group.swap([encode_pieces(p) for p in for_owners])]
        told[group.rank] = own
    return _Agreed(grid, travel, told)


def _decoded(both: Numbers) -> Shares:
    slices, nbytes = np.split(both, 2)
    return Shares(slices, nbytes)


@dataclass(frozen=True, slots=True)
class _Calls:
    """What a rank calls during the rounds; see `ExchangedWrites.run`."""

    sink: CellSink
    check: Callable[[], None]
    before_wait: Callable[[], None]


class _Rounds:
    """One rank's part in all rounds."""

    def __init__(
        self,
        group: ExchangeGroup | None,
        plan: _Agreed,
        held: Sequence[FileBytes],
        memory: ExchangeMemory,
        calls: _Calls,
    ) -> None:
        self._group, self._plan, self._held, self._memory = group, plan, held, memory
        self._check, self._before_wait = calls.check, calls.before_wait
        self._rank = 0 if group is None else group.rank
        self._cuts = [cuts_by_slice(plan.grid, pieces) for pieces in plan.pieces]
        self._cells = CellAssembly(plan.grid, calls.sink, calls.check, buffers=memory.buffers)
        self._sending, self._receiving = Arena(), Arena()
        self._error: Exception | None = None
        self.sent_nbytes = 0
        self.received_nbytes = 0

    def run(self, blocks: Sequence[BlockBytes]) -> tuple[list[WrittenBlock], Exception | None]:
        """Go through all rounds; return the reports of the blocks, and this rank's first error."""
        for number, slices in enumerate(
            plan_rounds(self._plan.grid, self._plan.travel, self._memory)
        ):
            self._check()
            self._try(reach, "mid exchange")
            self._run_round(number, slices)
        self._try(self._cells.finish)
        written: list[WrittenBlock] = []
        self._try(lambda: written.extend(block.written() for block in blocks))
        return ([] if self._error else written), self._error

    def _run_round(self, number: int, slices: Sequence[int]) -> None:
        owner = self._plan.travel.owner
        incoming, outgoing = self._messages(slices)
        waits = []
        if self._group is not None:
            waits = [self._group.receive(data, r, number) for r, data in incoming.items()]
        written = dict.fromkeys(outgoing, 0)
        for one in slices:
            to = int(owner[one])
            for cut in self._cuts[self._rank].get(one, ()):
                if to == self._rank:
                    self._try(self._keep_own, one, cut)
                else:
                    at = outgoing[to][written[to] : written[to] + cut.stop - cut.first]
                    self._try(self._copy_out, cut, at)
                    written[to] += at.nbytes
        if self._group is not None:
            waits += [self._group.send(data, r, number) for r, data in outgoing.items()]
            if waits:
                self._before_wait()
            for wait in waits:
                self._group.wait(wait)
        self._take_in(slices, incoming)
        self._try(self._cells.put_complete)

    def _messages(
        self, slices: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Return memory for what this rank receives and sends in a round, by the other rank."""
        incoming: dict[int, int] = {}
        outgoing: dict[int, int] = {}
        for one in slices:
            owner = int(self._plan.travel.owner[one])
            ranks, sizes = self._plan.travel.sent(one)
            if owner == self._rank:
                for rank, nbytes in zip(ranks.tolist(), sizes.tolist(), strict=True):
                    incoming[rank] = incoming.get(rank, 0) + nbytes
            elif self._rank in ranks:
                nbytes = int(sizes[ranks == self._rank][0])
                outgoing[owner] = outgoing.get(owner, 0) + nbytes
        self.sent_nbytes += sum(outgoing.values())
        self.received_nbytes += sum(incoming.values())
        return self._receiving.cut(incoming), self._sending.cut(outgoing)

    def _keep_own(self, number: int, cut: Cut) -> None:
        held = self._held[cut.piece]
        whole = held.in_memory()
        nbytes = cut.stop - cut.first
        if whole is not None and self._cells.use(number, held.runs, whole, nbytes):
            return
        position = cut.first
        for data in held.read(cut.first, cut.stop):
            self._cells.fill(number, held.runs, position, data)
            position += data.nbytes

    def _copy_out(self, cut: Cut, at: torch.Tensor) -> None:
        filled = 0
        for data in self._held[cut.piece].read(cut.first, cut.stop):
            at[filled : filled + data.nbytes].copy_(data)
            filled += data.nbytes

    def _take_in(self, slices: Sequence[int], incoming: Mapping[int, torch.Tensor]) -> None:
        taken = dict.fromkeys(incoming, 0)
        for one in slices:
            if int(self._plan.travel.owner[one]) != self._rank:
                continue
            for rank in incoming:
                for cut in self._cuts[rank].get(one, ()):
                    data = incoming[rank][taken[rank] : taken[rank] + cut.stop - cut.first]
                    taken[rank] += data.nbytes
                    runs = self._plan.pieces[rank][cut.piece][1]
                    self._try(self._cells.fill, one, runs, cut.first, data)

    def _try(self, step: Callable[..., None], *args: Any) -> None:
        """Take a step of this rank alone, unless an earlier one failed."""
        if self._error is not None:
            return
        try:
            step(*args)
        except FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - `run` returns it after all rounds
            self._error = error
