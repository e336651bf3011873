"""Which bytes of a block may share disk blocks with the same bytes in an output file.

A file system that can clone lets two files share whole disk blocks. So the bytes must start at
the same place within a disk block in both files. The place of a block's data in its `.distcp` file
is free, the place in the safetensors file is not: `phase_of` picks the place that lets most bytes
be shared, and `whole_blocks` cuts a run down to the disk blocks that it fills.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcp_hf_writer.tensors.boxes import ByteRuns

# Shorter runs are written twice: a clone is a system call that waits for the disk.
MIN_SHARED_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Bytes of a block's data that an output file holds too, in one piece."""

    offset: int
    """Where they start in the data of the block, in bytes."""
    nbytes: int
    """How many they are."""
    file: int
    """Number of the output file in the layout."""
    start: int
    """Where they start in that file, in bytes."""

    def phase(self, block_nbytes: int) -> int:
        """Return where the block's data must start, modulo the size of a disk block."""
        return (self.start - self.offset) % block_nbytes


def long_runs(runs: ByteRuns, *, file: int, offset: int) -> list[SharedRun]:
    """Return the runs of a region, or none if they are too short to be shared.

    Args:
        runs: The bytes of the output file that the region fills.
        file: Number of the output file.
        offset: Where the region's bytes start in the data of the block; they lie in one piece
            there, in the order of `runs`.
    """
    if runs.nbytes < MIN_SHARED_NBYTES:
        return []
    return [
        SharedRun(offset + i * runs.nbytes, runs.nbytes, file, start)
        for i, start in enumerate(runs.starts())
    ]


def phase_of(runs: Iterable[SharedRun], block_nbytes: int) -> int | None:
    """Return where the data of a block should start, modulo the size of a disk block.

    Args:
        runs: The runs of the block.
        block_nbytes: Size of a disk block.

    Returns:
        The place that lets most bytes be shared; the smallest one if several do. `None` without
        runs.
    """
    nbytes: dict[int, int] = {}
    for run in runs:
        phase = run.phase(block_nbytes)
        nbytes[phase] = nbytes.get(phase, 0) + run.nbytes
    return min(nbytes, key=lambda phase: (-nbytes[phase], phase), default=None)


def whole_blocks(run: SharedRun, *, data_start: int, block_nbytes: int) -> SharedRun | None:
    """Cut a run down to the disk blocks that it fills in both files.

    Args:
        run: A run of a block.
        data_start: Where the data of the block starts in its `.distcp` file.
        block_nbytes: Size of a disk block.

    Returns:
        The part of the run to share; `None` if the run starts at another place within a disk block
        in each file, or fills no disk block.
    """
    if run.phase(block_nbytes) != data_start % block_nbytes:
        return None
    skipped = -run.start % block_nbytes
    nbytes = (run.nbytes - skipped) // block_nbytes * block_nbytes
    if nbytes <= 0:
        return None
    return SharedRun(run.offset + skipped, nbytes, run.file, run.start + skipped)
