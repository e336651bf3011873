"""Prove that what the ranks wrote covers every byte of the export exactly once.

Pure. Without this check, a file with a slice that no rank wrote would look valid, with zeros there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dcp_hf_writer.errors import CoverageError
from dcp_hf_writer.plan.block_columns import joined, pack_blocks, targets_by_key
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.strided_copies import copies_of, coverage_fault, hf_loops
from dcp_hf_writer.tensors.tiling_runs import (
    RunsFault,
    TooManyRunsError,
    first_fault,
    runs_fault,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from dcp_hf_writer.plan.block_columns import BlockColumns, Integers
    from dcp_hf_writer.plan.layout import Layout, PartTarget
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.tensors.boxes import ByteRuns

_BUG = "nothing was published; this is a bug in dcp-hf-writer, please report it"


def check_coverage(layout: Layout, reports: Sequence[RankReport]) -> None:
    """Check that the reported blocks tile every tensor of every output file exactly.

    Raises:
        CoverageError: If the blocks do not cover a tensor exactly once, or a rank reports bytes
            that no tensor of the export has. It names the tensor, the bytes and the ranks.
    """
    _Coverage(layout, reports).check()


@dataclass(frozen=True, slots=True, eq=False)
class _Tensors:
    """The tensors of an export that have bytes, in the order of files and bytes."""

    targets: list[PartTarget]
    start: Integers
    """Place of the first byte, counted through all files."""
    stop: Integers
    """One past the last byte."""


class _Coverage:
    """One check. It counts bytes through all files, so that one sort puts all blocks in order."""

    def __init__(self, layout: Layout, reports: Sequence[RankReport]) -> None:
        self._layout = layout
        sizes = [file.nbytes for file in layout.files]
        self._file_start = np.cumsum([0, *sizes], dtype=np.int64)
        known = targets_by_key(layout.targets)
        self._tensors = self._tensors_of(known)
        parts = []
        for report in reports:
            parts += [] if report.columns is None else [(report.rank, report.columns)]
            if report.blocks:
                parts.append((report.rank, pack_blocks(report.blocks, known, rank=report.rank)))
        self._rank = np.repeat(
            np.array([rank for rank, _ in parts], np.int64), [len(one) for _, one in parts]
        )
        self._blocks: BlockColumns = joined([one for _, one in parts])

    def _tensors_of(self, known: dict[str, PartTarget]) -> _Tensors:
        rows = [
            (target.file, target.start, size, target)
            for target in known.values()
            if (size := math.prod(target.shape) * ITEMSIZE[target.dtype])
        ]
        rows.sort(key=lambda row: row[:2])
        files = np.array([row[0] for row in rows], np.intp)
        start = self._file_start[files] + np.array([row[1] for row in rows], np.int64)
        nbytes = np.array([row[2] for row in rows], np.int64)
        return _Tensors([row[3] for row in rows], start, start + nbytes)

    def check(self) -> None:
        """Check everything; `check_coverage` says what is raised."""
        start, stop = self._places()
        tensor = np.searchsorted(self._tensors.start, start, side="right") - 1
        self._check_within(tensor, start, stop)
        order = np.lexsort((start, tensor))
        has_loops = self._blocks.loop_count > 0
        strided = np.unique(tensor[has_loops])
        self._check_solid(order[~np.isin(tensor[order], strided)], tensor, start, stop, strided)
        lows = np.searchsorted(tensor[order], strided).tolist()
        highs = np.searchsorted(tensor[order], strided, side="right").tolist()
        for number, first, last in zip(strided.tolist(), lows, highs, strict=True):
            self._check_strided(number, order[first:last])

    def _places(self) -> tuple[Integers, Integers]:
        """Return the first byte of each block and one past its last, through all files."""
        blocks = self._blocks
        file = blocks.file.astype(np.int64)
        extents = blocks.extents()
        is_known = file < len(self._layout.files)
        sizes = np.append(np.diff(self._file_start), 0)[np.where(is_known, file, 0)]
        fits = is_known & (blocks.start >= 0) & (blocks.nbytes > 0)
        fits &= (extents <= sizes) & (blocks.start <= sizes - extents)
        if not fits.all():
            row = int(np.flatnonzero(~fits)[0])
            rank, number = int(self._rank[row]), int(file[row])
            raise CoverageError(
                "a rank reports bytes that reach outside its output file",
                rank=rank,
                phase="finish",
                path=self._layout.files[number].name if is_known[row] else None,
                expected=f"bytes of a file of {int(sizes[row])} bytes"
                if is_known[row]
                else f"a file number below {len(self._layout.files)}",
                found=f"bytes {int(blocks.start[row])} to {int(blocks.start[row] + extents[row])} "
                f"of file number {number}",
                hint=_BUG,
            )
        start = self._file_start[file] + blocks.start
        return start, start + extents

    def _check_within(self, tensor: npt.NDArray[np.intp], start: Integers, stop: Integers) -> None:
        if not len(start):
            return
        ends = self._tensors.stop
        inside = (tensor >= 0) & (stop <= ends[tensor]) if len(ends) else np.zeros(len(start), bool)
        if inside.all():
            return
        row = int(np.flatnonzero(~inside)[0])
        number = int(tensor[row])
        is_in_tensor = number >= 0 and start[row] < ends[number]
        target = self._tensors.targets[number] if is_in_tensor else None
        file = int(self._blocks.file[row])
        raise CoverageError(
            "a rank reports bytes that reach outside the tensor",
            rank=int(self._rank[row]),
            phase="finish",
            path=self._layout.files[file].name,
            key=None if target is None else target.key,
            expected="bytes of a tensor" if target is None else self._bytes(number, file),
            found=self._range(file, int(start[row]), int(stop[row])),
            hint=_BUG,
        )

    def _check_solid(
        self,
        order: npt.NDArray[np.intp],
        tensor: npt.NDArray[np.intp],
        start: Integers,
        stop: Integers,
        strided: npt.NDArray[np.intp],
    ) -> None:
        """Check the tensors of which every block is one run, all at once.

        Args:
            order: Their blocks, by place.
            tensor: Tensor of each block.
            start: First byte of each block, through all files.
            stop: One past the last byte of each block.
            strided: The tensors that have a block with several runs.
        """
        of, begins, stops = tensor[order], start[order], stop[order]
        is_solid = np.ones(len(self._tensors.targets), bool)
        is_solid[strided] = False
        is_first = np.ones(len(of), bool)
        is_first[1:] = of[1:] != of[:-1]
        reached = np.empty_like(begins)
        reached[1:] = stops[:-1]
        reached[is_first] = self._tensors.start[of[is_first]]
        end = np.full(len(is_solid), -1, np.int64)
        end[of] = stops  # the last block of a tensor wins
        bad = np.zeros(len(is_solid), bool)
        bad[of[begins != reached]] = True
        bad |= is_solid & (end != self._tensors.stop)
        if not bad.any():
            return
        number = int(np.flatnonzero(bad)[0])
        rows = order[of == number]
        fault = first_fault(
            start[rows],
            stop[rows],
            np.arange(len(rows)),
            int(self._tensors.start[number]),
            int(self._tensors.stop[number]),
        )
        assert fault is not None
        self._refuse(number, rows, self._fault_text(number, rows, fault))

    def _check_strided(self, number: int, rows: npt.NDArray[np.intp]) -> None:
        """Check a tensor that has a block with several runs."""
        target, blocks = self._tensors.targets[number], self._blocks.runs(rows)
        nbytes = int(self._tensors.stop[number] - self._tensors.start[number])
        try:
            fault = runs_fault(blocks, target.start, target.start + nbytes)
        except TooManyRunsError:
            text = _fault_along_dims(blocks, target)
            if text is not None:
                self._refuse(number, rows, text)
            return
        if fault is not None:
            base = int(self._file_start[target.file])
            shifted = RunsFault(base + fault.start, base + fault.stop, fault.owners)
            self._refuse(number, rows, self._fault_text(number, rows, shifted))

    def _refuse(self, number: int, rows: npt.NDArray[np.intp], found: str) -> None:
        target = self._tensors.targets[number]
        ranks = set(self._rank[rows].tolist())
        raise CoverageError(
            "the blocks that ranks report do not tile a tensor of the export",
            rank=ranks.pop() if len(ranks) == 1 else None,
            phase="finish",
            path=self._layout.files[target.file].name,
            key=target.key,
            expected=self._bytes(number, target.file),
            found=found,
            hint=_BUG,
        )

    def _fault_text(self, number: int, rows: npt.NDArray[np.intp], fault: RunsFault) -> str:
        where = self._range(self._tensors.targets[number].file, fault.start, fault.stop)
        if not fault.owners:
            return f"{where} from no rank"
        ranks = [int(self._rank[rows[owner]]) for owner in fault.owners]
        return f"{where} from {' and '.join(f'rank {rank}' for rank in ranks)}"

    def _bytes(self, number: int, file: int) -> str:
        start, stop = int(self._tensors.start[number]), int(self._tensors.stop[number])
        return f"each of {stop - start} bytes once, {self._range(file, start, stop)}"

    def _range(self, file: int, start: int, stop: int) -> str:
        base = int(self._file_start[file])
        return f"bytes {start - base} to {stop - base}"


def _fault_along_dims(blocks: Sequence[ByteRuns], target: PartTarget) -> str | None:
    """Return why blocks do not tile a tensor, without writing out their runs."""
    itemsize, shape = ITEMSIZE[target.dtype], tuple(target.shape)
    parts = []
    for one in blocks:
        first = (one.start - target.start) // itemsize
        steps = [(n, s // itemsize, s // itemsize) for n, s in one.loops]
        steps.append((one.nbytes // itemsize, 1, 1))
        found = copies_of(steps, hf_start=first, start=first, hf_shape=shape, shape=shape)
        parts += [(copy.hf_start, hf_loops(copy)) for copy in found]
    return coverage_fault(parts, shape)
