"""The cells that an owner puts together, and the memory that the exchange reuses."""

from __future__ import annotations

from collections import deque
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from dcp_hf_writer.tensors.run_cuts import rows_between

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from dcp_hf_writer.plan.cells import Grid
    from dcp_hf_writer.tensors.boxes import ByteRuns

# How often a wait for a sink looks whether the save was given up.
_LOOK_S = 0.2


class CellSink(Protocol):
    """Takes the complete cells that this rank owns."""

    def put(self, file: int, cell: int, data: memoryview) -> Future[None] | None:
        """Write a cell. The cells of a file come in ascending order.

        Args:
            file: Index of the file.
            cell: Index of the cell in its file.
            data: All its bytes.

        Returns:
            `None` if the bytes are not needed any more. Or a future: the bytes stay as they are
            until it is done.
        """


class Arena:
    """Reused memory for the messages of one round."""

    def __init__(self) -> None:
        """Start without memory."""
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def cut(self, sizes: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Return memory for each message, as flat uint8 tensors; valid until the next call.

        Args:
            sizes: Bytes of the message from or to each rank.
        """
        nbytes = sum(sizes.values())
        if self._memory.nbytes < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        found, used = {}, 0
        for rank, size in sizes.items():
            found[rank] = self._memory[used : used + size]
            used += size
        return found


@dataclass(slots=True)
class _Cell:
    """A cell that is not complete yet."""

    file: int
    start: int
    """First byte in the file."""
    stop: int
    """One past the last byte."""
    left: int
    """Bytes that have not arrived."""
    data: torch.Tensor
    """Its bytes, flat uint8."""
    buffer: torch.Tensor | None
    """The buffer that holds `data`; `None` if they lie in this rank's own tensor."""


class CellAssembly:
    """The incomplete cells of one owner, and those that its sink still writes."""

    def __init__(
        self, grid: Grid, sink: CellSink, check: Callable[[], None], *, buffers: int
    ) -> None:
        """Start without a cell.

        Args:
            grid: The cells.
            sink: Takes complete cells.
            check: Called during waits; raises if the save was given up.
            buffers: Largest number of buffers of one cell each, and of cells that the sink writes.
        """
        self._grid, self._sink, self._check = grid, sink, check
        self._most_writing = self._left = buffers
        self._free: list[torch.Tensor] = []
        self._open: dict[int, _Cell] = {}
        self._writing: deque[tuple[Future[None], torch.Tensor | None]] = deque()

    def fill(self, number: int, runs: ByteRuns, position: int, data: torch.Tensor) -> None:
        """Copy bytes into the cell of a slice.

        Args:
            number: The slice.
            runs: The piece that the bytes belong to.
            position: Position of the first byte within the piece.
            data: The bytes, flat uint8; all lie within the slice.
        """
        cell = self._cell(number)
        used = 0
        for row in rows_between(runs, position, position + data.nbytes):
            to = cell.data.as_strided(
                (row.count, row.nbytes), (row.stride, 1), row.start - cell.start
            )
            nbytes = row.count * row.nbytes
            to.copy_(data[used : used + nbytes].view(row.count, row.nbytes))
            used += nbytes
        cell.left -= used

    def use(self, number: int, runs: ByteRuns, whole: torch.Tensor, nbytes: int) -> bool:
        """Take the cell of a slice from this rank's own memory, if one piece holds all of it.

        Args:
            number: The slice.
            runs: The piece.
            whole: All bytes of the piece, flat uint8; they stay as they are for the whole save.
            nbytes: Bytes of the slice.

        Returns:
            Whether this piece is the whole cell. If not, nothing has been done.
        """
        index = int(self._grid.cell[number])
        file, start, stop = self._grid.cell_range(index)
        if runs.count > 1 or not (runs.start <= start and stop <= runs.start + runs.nbytes):
            return False
        if index not in self._open:
            data = whole[start - runs.start : stop - runs.start]
            self._open[index] = _Cell(file, start, stop, stop - start, data, None)
        self._open[index].left -= nbytes
        return True

    def _cell(self, number: int) -> _Cell:
        index = int(self._grid.cell[number])
        if index not in self._open:
            file, start, stop = self._grid.cell_range(index)
            buffer = self._buffer(self._grid.files[file].cell_nbytes)
            data = buffer[: stop - start]
            self._open[index] = _Cell(file, start, stop, stop - start, data, buffer)
        return self._open[index]

    def _buffer(self, nbytes: int) -> torch.Tensor:
        while not self._free and not self._left:
            self._await_one()
        if self._free:
            buffer = self._free.pop()
            return buffer if buffer.nbytes >= nbytes else _memory(nbytes)
        self._left -= 1
        return _memory(nbytes)

    def put_complete(self) -> None:
        """Pass all complete cells to the sink, ascending."""
        for index in sorted(self._open):
            cell = self._open[index]
            if cell.left:
                continue
            # Cells that lie in this rank's own tensors take no buffer, but the sink has limits too.
            while len(self._writing) >= self._most_writing:
                self._await_one()
            del self._open[index]
            number = cell.start // self._grid.files[cell.file].cell_nbytes
            future = self._sink.put(cell.file, number, cell.data.numpy().data)
            if future is not None:
                self._writing.append((future, cell.buffer))
            elif cell.buffer is not None:
                self._free.append(cell.buffer)

    def finish(self) -> None:
        """Wait until the sink has written everything.

        Raises:
            Exception: What the sink's future raises.
        """
        while self._writing:
            self._await_one()

    def _await_one(self) -> None:
        future, buffer = self._writing[0]
        while not future.done():
            wait([future], timeout=_LOOK_S)
            self._check()
        self._writing.popleft()
        future.result()
        if buffer is not None:
            self._free.append(buffer)


def _memory(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
