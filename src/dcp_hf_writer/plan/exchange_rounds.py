"""The rounds of an exchange: which slices travel together, so that no rank needs much memory.

Pure; the same on every rank. Slices of one file travel in ascending order, because a rank casts and
digests a block from front to back. Slices of different files travel side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dcp_hf_writer.plan.cells import Grid, Numbers, Shares

_MIB = 1 << 20
_LARGEST_SLICE = 8 * _MIB


@dataclass(frozen=True, slots=True)
class ExchangeMemory:
    """How the memory that a rank may use in addition to the staged copy is divided."""

    slice_nbytes: int
    """Largest size of a slice."""
    travelling_nbytes: int
    """Bytes that a rank sends in one round, and those that it receives in one; at least a slice."""
    open_cells: int
    """Cells of one owner that may be incomplete at a time."""
    buffers: int
    """Buffers of one cell each that an owner has; those beyond `open_cells` are being written."""
    bounce_nbytes: int
    """Size of the buffer for casts and reordering."""

    @classmethod
    def within(cls, budget_nbytes: int, *, largest_cell: int) -> ExchangeMemory:
        """Divide a budget: three quarters for cells, one quarter for what travels and for casts.

        Args:
            budget_nbytes: Memory that the rank may use. If it is less than 4/3 of a cell, the rank
                uses one buffer of a cell nevertheless.
            largest_cell: Size of the largest cell, in bytes.
        """
        buffers = max(1, budget_nbytes * 3 // 4 // max(largest_cell, 1))
        travelling = max(1, budget_nbytes // 16)
        return cls(
            slice_nbytes=max(1, min(_LARGEST_SLICE, travelling)),
            travelling_nbytes=travelling,
            open_cells=max(1, buffers // 2),
            buffers=buffers,
            bounce_nbytes=max(64, min(8 * _MIB, budget_nbytes // 16)),
        )


class Travel:
    """What each rank holds of each slice, slice by slice."""

    def __init__(self, grid: Grid, owners: Numbers, shares: Sequence[Shares]) -> None:
        """Sort what the ranks hold by slice.

        Args:
            grid: The slices.
            owners: The owner of each cell.
            shares: What each rank holds.
        """
        slices = np.concatenate([one.slices for one in shares])
        order = np.argsort(slices, kind="stable")
        ranks = np.repeat(np.arange(len(shares)), [len(one.slices) for one in shares])
        self._ranks = ranks[order]
        self._nbytes = np.concatenate([one.nbytes for one in shares])[order]
        self._first = np.searchsorted(slices[order], np.arange(len(grid.start) + 1))
        self.owner = owners[grid.cell]
        """The owner of each slice."""
        self.world_size = len(shares)

    def of(self, number: int) -> tuple[Numbers, Numbers]:
        """Return the ranks that hold bytes of a slice, ascending, and how many each holds."""
        part = slice(self._first[number], self._first[number + 1])
        return self._ranks[part], self._nbytes[part]

    def sent(self, number: int) -> tuple[Numbers, Numbers]:
        """Return the ranks that send bytes of a slice to its owner, and how many each sends."""
        ranks, nbytes = self.of(number)
        away = ranks != self.owner[number]
        return ranks[away], nbytes[away]


def plan_rounds(grid: Grid, travel: Travel, memory: ExchangeMemory) -> Iterator[list[int]]:
    """Yield the slices of each round, ascending; each slice is in one round.

    In a round, no rank sends or receives more than `travelling_nbytes`, and no rank has more than
    `open_cells` cells that were begun before its end and were incomplete at its beginning.

    Args:
        grid: The slices.
        travel: Who holds and who owns them.
        memory: The limits; its `slice_nbytes` made the grid.
    """
    ends = grid.first_slice[1:]
    at = dict(enumerate(grid.first_slice[:-1]))
    incomplete = np.zeros(travel.world_size, np.int64)
    while at:
        load = _Load.of(travel.world_size, incomplete.copy())
        found: list[int] = []
        for file in list(at):
            while at[file] < ends[file] and _take(at[file], grid, travel, memory, load):
                found.append(at[file])
                at[file] += 1
            if at[file] == ends[file]:
                del at[file]
        for number in found:
            owner = travel.owner[number]
            incomplete[owner] += grid.is_first_of_cell(number)
            incomplete[owner] -= grid.is_last_of_cell(number)
        if found:
            yield sorted(found)


@dataclass(slots=True)
class _Load:
    """What the slices of one round ask of each rank."""

    sent: Numbers
    received: Numbers
    cells: Numbers
    """Cells that are incomplete at some time of the round."""

    @classmethod
    def of(cls, world_size: int, cells: Numbers) -> _Load:
        return cls(np.zeros(world_size, np.int64), np.zeros(world_size, np.int64), cells)


def _take(number: int, grid: Grid, travel: Travel, memory: ExchangeMemory, load: _Load) -> bool:
    """Add a slice to a round if it fits; `False` if it does not."""
    owner = travel.owner[number]
    ranks, nbytes = travel.sent(number)
    limit = memory.travelling_nbytes
    begins = grid.is_first_of_cell(number)
    if begins and load.cells[owner] >= memory.open_cells:
        return False
    if load.received[owner] + nbytes.sum() > limit or (load.sent[ranks] + nbytes > limit).any():
        return False
    load.cells[owner] += begins
    load.received[owner] += nbytes.sum()
    load.sent[ranks] += nbytes
    return True
