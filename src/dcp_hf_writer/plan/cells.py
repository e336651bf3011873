"""The grid of an exchange: cut the output files into cells and slices, and name each cell's owner.

Pure. A *cell* is an aligned range of one file that one rank writes. A *slice* is a range within a
cell, small enough to travel at once. Cells and slices have numbers that run through all files, in
the order of the files and ascending within each. All ranks compute the same from the same input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dcp_hf_writer.errors import CoverageError
from dcp_hf_writer.tensors.run_cuts import last_offset, positions_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from dcp_hf_writer.tensors.boxes import ByteRuns

    Numbers = npt.NDArray[np.int64]
    Loads = npt.NDArray[np.float64]

# A rank that holds this part of the bytes of the rank with most bytes may own a cell too. So ranks
# with about equal parts (column shards) take turns, and no rank receives everything for a while.
_NEARLY_MOST = 7 / 8

# A rank may own this much more than an equal share of all bytes.
_MOST_OF_SHARE = 5 / 4


@dataclass(frozen=True, slots=True)
class ExchangedFile:
    """An output file whose cells ranks write for each other; equal on all ranks."""

    name: str
    """Path of the file within the checkpoint."""
    nbytes: int
    """Its whole size in bytes, header included."""
    cell_nbytes: int
    """Size of its cells; the last one may be smaller."""
    in_order: bool
    """Whether one rank must write all its cells, in ascending order."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How many bytes a rank holds of each slice; only slices of which it holds some."""

    slices: Numbers
    """Numbers of the slices, ascending."""
    nbytes: Numbers
    """Bytes of each of them, more than 0."""


class Grid:
    """The cells and slices of all files of an exchange."""

    def __init__(self, files: Sequence[ExchangedFile], *, slice_nbytes: int) -> None:
        """Cut the files.

        Args:
            files: The files; each cell begins at a multiple of its file's `cell_nbytes`.
            slice_nbytes: Largest size of a slice.
        """
        self.files = tuple(files)
        starts, files_of, cells_of = [], [], []
        self.first_slice: list[int] = [0]
        """For each file, the number of its first slice; one more at the end."""
        cell = slices = 0
        for number, file in enumerate(self.files):
            for begin in range(0, file.nbytes, file.cell_nbytes):
                end = min(begin + file.cell_nbytes, file.nbytes)
                at = np.arange(begin, end, slice_nbytes, dtype=np.int64)
                starts.append(at)
                files_of.append(np.full(len(at), number, np.int64))
                cells_of.append(np.full(len(at), cell, np.int64))
                cell += 1
                slices += len(at)
            self.first_slice.append(slices)
        self.cells = cell
        """Number of cells."""
        self.start = _joined(starts)
        """First byte of each slice in its file."""
        self.file = _joined(files_of)
        """File of each slice."""
        self.cell = _joined(cells_of)
        """Cell of each slice."""
        self.stop = self._stops()
        """One past the last byte of each slice in its file."""

    def _stops(self) -> Numbers:
        stops = np.append(self.start[1:], 0)
        last = np.array(self.first_slice[1:], np.int64)[np.diff(self.first_slice) > 0] - 1
        sizes = np.array([file.nbytes for file in self.files], np.int64)
        stops[last] = sizes[self.file[last]]
        return stops

    def cell_range(self, cell: int) -> tuple[int, int, int]:
        """Return the file of a cell, its first byte there, and one past its last byte."""
        first = int(np.searchsorted(self.cell, cell))
        last = int(np.searchsorted(self.cell, cell, side="right")) - 1
        return int(self.file[first]), int(self.start[first]), int(self.stop[last])

    def is_first_of_cell(self, number: int) -> bool:
        """Whether a slice is the first one of its cell."""
        return number == 0 or bool(self.cell[number - 1] != self.cell[number])

    def is_last_of_cell(self, number: int) -> bool:
        """Whether a slice is the last one of its cell."""
        return number + 1 == len(self.cell) or self.is_first_of_cell(number + 1)

    def touched(self, file: int, runs: ByteRuns) -> tuple[int, Numbers]:
        """Return the first slice that runs reach, and the positions at which slices cut them.

        Args:
            file: The file of the runs.
            runs: At least one byte.

        Returns:
            The number of the first slice, and `n + 1` ascending positions for `n` slices: slice `i`
            after the first one holds the bytes between positions `i` and `i + 1`.
        """
        low, high = self.first_slice[file], self.first_slice[file + 1]
        starts = self.start[low:high]
        first = int(np.searchsorted(starts, runs.start, side="right")) - 1
        last = int(np.searchsorted(starts, last_offset(runs) - 1, side="right")) - 1
        edges = np.append(starts[first : last + 1], self.stop[low + last])
        return low + first, positions_of(runs, edges)

    def shares_of(self, pieces: Iterable[tuple[int, ByteRuns]]) -> Shares:
        """Return how many bytes of each slice a rank holds.

        Args:
            pieces: What the rank holds: files, and the bytes in them; disjoint.
        """
        held = np.zeros(len(self.start), np.int64)
        for file, runs in pieces:
            first, positions = self.touched(file, runs)
            held[first : first + len(positions) - 1] += np.diff(positions)
        slices = np.flatnonzero(held)
        return Shares(slices, held[slices])

    def check_whole(self, shares: Sequence[Shares]) -> None:
        """Check that the ranks together hold each slice's bytes.

        Raises:
            CoverageError: If they hold too few or too many; names the first such file.
        """
        held = np.zeros(len(self.start), np.int64)
        for one in shares:
            np.add.at(held, one.slices, one.nbytes)
        wrong = np.flatnonzero(held != self.stop - self.start)
        if len(wrong):
            number = int(wrong[0])
            start, stop = int(self.start[number]), int(self.stop[number])
            raise CoverageError(
                "the ranks do not hold each byte of a file once",
                phase="write",
                path=self.files[int(self.file[number])].name,
                expected=f"{stop - start} bytes in [{start}, {stop})",
                found=f"{int(held[number])} bytes",
                hint="nothing was published; this is a bug in dcp-hf-writer, please report it",
            )


def _joined(parts: Sequence[Numbers]) -> Numbers:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def cell_owners(grid: Grid, shares: Sequence[Shares]) -> Numbers:
    """Return the rank that writes each cell: one that holds most of its bytes, if it has room.

    No rank owns more than 5/4 of an equal share plus one cell (one file, of files in order).

    Args:
        grid: The cells.
        shares: What each rank holds.
    """
    units = _units(grid)
    held = _held(grid, shares, units)
    sizes = np.zeros(int(units.max(initial=-1)) + 1, np.int64)
    np.add.at(sizes, units[grid.cell], grid.stop - grid.start)
    limit = _MOST_OF_SHARE * float(sizes.sum()) / len(shares)
    loads = np.zeros(len(shares), np.float64)
    owners = np.zeros(len(sizes), np.int64)
    for unit in _largest_files_first(grid, units, len(sizes)):
        size = float(sizes[unit])
        # A file larger than the limit still needs an owner: one that owns nothing yet.
        owner = _owner(*held[unit], loads, room=max(limit, size) - size)
        owners[unit] = owner
        loads[owner] += size
    return owners[units]


def _owner(ranks: Numbers, nbytes: Numbers, loads: Loads, *, room: float) -> int:
    """Return the rank that a cell or file goes to.

    Args:
        ranks: The ranks that hold bytes of it.
        nbytes: How many bytes each of them holds.
        loads: Bytes that each rank owns so far.
        room: Largest load with which a rank may take it.
    """
    has_room = loads[ranks] <= room
    if not has_room.any():
        return int(np.argmin(loads))
    ranks, nbytes = ranks[has_room], nbytes[has_room]
    most = ranks[nbytes >= _NEARLY_MOST * nbytes.max()]
    return int(most[np.argmin(loads[most])])


def _units(grid: Grid) -> Numbers:
    """Return for each cell the number of what gets one owner: the cell, or its whole file."""
    file_of = np.zeros(grid.cells, np.int64)
    file_of[grid.cell] = grid.file
    in_order = np.array([file.in_order for file in grid.files], bool)
    begins = np.ones(grid.cells, bool)
    begins[1:] = ~in_order[file_of[1:]] | (file_of[1:] != file_of[:-1])
    return np.cumsum(begins) - 1


def _largest_files_first(grid: Grid, units: Numbers, count: int) -> list[int]:
    """Return the units in the order in which they get owners: cells ascending, then whole files."""
    whole: list[tuple[int, int]] = []
    cells: list[int] = []
    for number, file in enumerate(grid.files):
        low, high = grid.first_slice[number], grid.first_slice[number + 1]
        if low == high:
            continue
        first, last = int(units[grid.cell[low]]), int(units[grid.cell[high - 1]])
        if file.in_order:
            whole.append((-file.nbytes, first))
        else:
            cells += range(first, last + 1)
    ordered = [unit for _, unit in sorted(whole)] + cells
    assert len(ordered) == count
    return ordered


def _held(grid: Grid, shares: Sequence[Shares], units: Numbers) -> list[tuple[Numbers, Numbers]]:
    """Return for each unit the ranks that hold bytes of it, ascending, and how many."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(int(units.max(initial=-1)) + 1)]
    for rank, one in enumerate(shares):
        if not len(one.slices):
            continue
        numbers, at = np.unique(units[grid.cell[one.slices]], return_index=True)
        for unit, nbytes in zip(numbers, np.add.reduceat(one.nbytes, at), strict=True):
            found[int(unit)].append((rank, int(nbytes)))
    return [
        (np.array([r for r, _ in one], np.int64), np.array([n for _, n in one], np.int64))
        for one in found
    ]
