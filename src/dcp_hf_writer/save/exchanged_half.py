"""The HuggingFace half on a POSIX file system, written cell by cell by the owners of the cells."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dcp_hf_writer.formats.names_on_disk import path_in_export
from dcp_hf_writer.save.exchange_group import joined_exchange
from dcp_hf_writer.save.exchange_writes import ExchangedFile, ExchangedWrites
from dcp_hf_writer.save.export_failures import export_error
from dcp_hf_writer.save.hf_half import nbytes_of_blocks
from dcp_hf_writer.storage.posix_outputs import OutputFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.plan.global_plan import RankPlan
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.save.tensor_bytes import TensorSource
    from dcp_hf_writer.storage.output_fsync import OpenFiles
    from dcp_hf_writer.storage.write_slots import WriteSlots

    Blocks = Sequence[tuple[WriteItem, Region]]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ExchangedHalf:
    """The HuggingFace half of one rank, by exchange."""

    attempt: Attempt
    directory: StagingDirectory
    own: RankPlan
    slots: WriteSlots
    half: Literal["dcp", "hf"]
    """The half whose slots limit the writers."""
    subdir: str
    host_budget_bytes: int

    def write(
        self, work: Mapping[int, Blocks], files: OpenFiles, source: TensorSource, report: RankReport
    ) -> None:
        """Exchange the bytes and write this rank's cells; all ranks of the save call it.

        The files stay in `files` until their fsync. An error of the export goes into the report.

        Args:
            work: Blocks of this rank, by number of the file.
            files: Keeps the files open.
            source: Resolves items to tensors.
            report: Gets this rank's blocks, and bytes.

        Raises:
            SaveAbortedError: If this rank or another one gave the save up.
            SaveTimeoutError: If the deadline has passed, or a rank was lost.
            SlotTimeoutError: If no slot became free in time.
        """
        attempt, cell = self.attempt, self.attempt.cell_nbytes
        planned = [
            ExchangedFile(path_in_export(self.subdir, name), nbytes, cell, in_order=False)
            for name, nbytes in self.own.files
        ]
        sink = _CellWriter(self, files)
        with attempt.timed("write hf"), joined_exchange(attempt, self.directory.save_id) as group:
            try:
                done = ExchangedWrites(group, planned).run(
                    work,
                    source,
                    headers=self._headers(),
                    sink=sink,
                    check=attempt.check,
                    host_budget_bytes=self.host_budget_bytes,
                    before_wait=sink.give_slot_back,
                )
            finally:
                sink.give_slot_back()
        if done.error is not None:
            report.export_error = report.export_error or self._failed(done.error)
        report.blocks += done.blocks
        report.nbytes["hf"] = sum(nbytes_of_blocks(of_file) for of_file in work.values())
        report.nbytes["hf sent"] = done.sent_nbytes

    def _headers(self) -> dict[int, bytes]:
        """Return the headers of all files, on the coordinator."""
        plan = self.attempt.global_plan
        if plan is None or plan.layout is None:
            return {}
        return {number: file.header for number, file in enumerate(plan.layout.files)}

    def _failed(self, error: Exception) -> ExportError:
        path = getattr(error, "path", None) or os.path.join(self.directory.path, self.subdir)
        _log.warning("rank %d could not write %s: %s", self.attempt.rank, path, error)
        nbytes = sum(size for _, size in self.own.files)
        return export_error(error, rank=self.attempt.rank, path=path, nbytes=nbytes)


@dataclass(slots=True)
class _CellWriter:
    """Writes cells into their files; holds a slot from a write until the next wait."""

    owner: ExchangedHalf
    files: OpenFiles
    _held: ExitStack = field(default_factory=ExitStack)
    _has_slot: bool = False

    def put(self, file: int, cell: int, data: memoryview) -> None:
        """Write a cell; see `CellSink`."""
        half = self.owner
        name, _ = half.own.files[file]
        path = os.path.join(half.directory.path, half.subdir, name)
        self._take_slot()
        output = self.files.take(path) or OutputFile(path, create=False)
        self.files.keep(output)
        output.write(data, cell * half.attempt.cell_nbytes)

    def _take_slot(self) -> None:
        if self._has_slot:
            return
        half = self.owner
        with half.attempt.timed("slot wait"):
            deadline = half.attempt.context.deadline
            self._held.enter_context(
                half.slots.hold(half.directory.path, half.half, deadline=deadline)
            )
        self._has_slot = True

    def give_slot_back(self) -> None:
        """Give the slot back: this rank is about to wait for other ranks."""
        self._held.close()
        self._has_slot = False
