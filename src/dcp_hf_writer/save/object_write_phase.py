"""The write phase of a rank in a save to an object store.

The rank sends its DCP file as one object. It sends the cells of the export that it owns as parts of
the objects of the export. Both come from the staged copy; nothing is written to a local disk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.planner import WriteItemType

from dcp_hf_writer.errors import (
    CheckpointError,
    SaveAbortedError,
    SaveTimeoutError,
    SlotTimeoutError,
    StorageError,
)
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.cells import ExchangedFile
from dcp_hf_writer.plan.rank_digests import pack_report
from dcp_hf_writer.save.bounce_buffer import bounce_nbytes_of
from dcp_hf_writer.save.dcp_half import SlabFileSystemWriter, check_results
from dcp_hf_writer.save.exchange_group import joined_exchange
from dcp_hf_writer.save.exchange_writes import Exchanged, ExchangedWrites
from dcp_hf_writer.save.export_cells import ExportCells
from dcp_hf_writer.save.export_failures import export_error
from dcp_hf_writer.save.hf_half import nbytes_of_blocks, regions_by_file
from dcp_hf_writer.save.object_parts import SentObject, in_flight_of, part_nbytes_of
from dcp_hf_writer.save.rank_results import (
    begun_report,
    nbytes_of_items,
    report_result,
    stored_once_results,
    without_results,
)
from dcp_hf_writer.save.tensor_bytes import TensorSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan, WriteItem
    from torch.distributed.checkpoint.storage import WriteResult

    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_cells import ExportUpload
    from dcp_hf_writer.save.save_target import RankWrites
    from dcp_hf_writer.storage.object_contract import Abilities, ObjectStore, Patience

_log = logging.getLogger(__name__)

# What an archive adds to the data of a tensor, in bytes, at most; only the size of parts uses it.
_ARCHIVE_NBYTES = 4096


@dataclass(slots=True)
class ObjectWritePhase:
    """The write phase of one rank."""

    attempt: Attempt
    store: ObjectStore
    abilities: Abilities
    """What the store can do, as the coordinator found out."""
    url: str
    """URL of the checkpoint, without credentials."""
    save_id: str
    files: Sequence[ExportUpload]
    """Files of the export, in the order of the layout; empty without an export."""
    headers: Mapping[int, bytes]
    """Header of each file of the export; only the coordinator has them."""
    writes: RankWrites
    patience: Patience
    """Limits each request."""

    def run(self) -> list[WriteResult]:
        """Send everything, and report; see `SaveTarget.write`."""
        attempt, writes = self.attempt, self.writes
        report = begun_report(attempt)
        source = TensorSource(writes.planner)
        tensors = [i for i in writes.plan.items if i.type != WriteItemType.BYTE_IO]
        work = regions_by_file(tensors, writes.own.targets)
        left_out = stored_once_results(writes.own, tensors, subdir=writes.subdir)
        plan = without_results(writes.plan, left_out)
        sent: list[SentObject] = []
        hf_nbytes = sum(map(nbytes_of_blocks, work.values())) if self.files else 0
        attempt.byte_count.plan(hf_nbytes + self._dcp_nbytes(plan))
        try:
            results: list[WriteResult] = []
            if writes.half != "hf":
                results = self._write_dcp(plan, source, report, sent)
            if self.files:
                self._write_export(work, source, report)
            self._send_digests(report)
            reach("before fsync")
            with attempt.timed("sync"):
                for one in sent:
                    one.finish()
            reach("after fsync")
        except BaseException as error:
            self._give_up(sent)
            if isinstance(error, CheckpointError):
                error.rank = attempt.rank
            raise
        report.seconds = dict(attempt.seconds)
        report.nbytes["dcp"] = sum(result.size_in_bytes for result in results)
        report.nbytes.setdefault("hf", 0)
        return [*results, *left_out, report_result(report)]

    def _dcp_nbytes(self, plan: SavePlan) -> int:
        return 0 if self.writes.half == "hf" else nbytes_of_items(plan.items)

    def _send_digests(self, report: RankReport) -> None:
        """Put the digests of this rank; the report keeps what the coordinator needs.

        Raises:
            StorageError: If the store refuses. In a place of the export alone, the report says so.
        """
        data = pack_report(report, self.writes.own.targets)
        assert report.digests is not None
        name = report.digests.name
        try:
            self.store.put(name, [memoryview(data)], token=self.save_id, patience=self.patience)
        except (StorageError, SaveTimeoutError) as error:
            # The store of an export that lies apart must not cost the DCP half.
            if self.writes.half != "hf" or isinstance(error, SaveAbortedError):
                raise
            self.attempt.check()
            if report.export_error is None:
                report.export_error = export_error(
                    error,
                    rank=self.attempt.rank,
                    path=f"{self.url}/{name}",
                    nbytes=sum(size for _, size in self.writes.own.files),
                )

    def _give_up(self, sent: Sequence[SentObject]) -> None:
        for one in sent:
            try:
                one.discard(self.attempt.last_patience())
            except CheckpointError as error:
                _log.warning("could not abort the upload of %s: %s", one.key, error)

    def _write_dcp(
        self,
        plan: SavePlan,
        source: TensorSource,
        report: RankReport,
        sent: list[SentObject],
    ) -> list[WriteResult]:
        attempt = self.attempt
        # A bit more than the file; objects are counted as small.
        nbytes = nbytes_of_items(plan.items) + _ARCHIVE_NBYTES * len(plan.items)
        part_nbytes = part_nbytes_of(nbytes, self.abilities)

        def begin(name: str) -> SentObject:
            made = SentObject(
                self.store,
                name,
                token=self.save_id,
                patience=self.patience,
                part_nbytes=part_nbytes,
                in_flight=in_flight_of(self.abilities),
            )
            sent.append(made)
            return made

        writer = SlabFileSystemWriter(self.url, checkpoint_id=self.url)
        writer.set_up_storage_writer(
            attempt.member.is_coordinator, rank=attempt.rank, use_collectives=True
        )
        writer.source, writer.check = source, attempt.check
        writer.count = attempt.byte_count.add
        writer.copied_nbytes = bounce_nbytes_of(self.writes.host_budget_bytes)
        writer.send_to(begin)
        with attempt.timed("write dcp"):
            results: list[WriteResult] = writer.write_data(plan, self.writes.planner).value()
        check_results(plan.items, results, attempt.rank)
        report.dcp_files = writer.files
        return results

    def _write_export(
        self,
        work: Mapping[int, Sequence[tuple[WriteItem, Region]]],
        source: TensorSource,
        report: RankReport,
    ) -> None:
        attempt = self.attempt
        cells = ExportCells(
            self.store,
            self.files,
            abilities=self.abilities,
            token=self.save_id,
            patience=self.patience,
            count=attempt.byte_count.add,
        )
        with attempt.timed("write hf"):
            try:
                exchanged = self._exchange(work, source, cells)
                report.parts = cells.finish()
            except (SaveAbortedError, SlotTimeoutError):
                raise
            except Exception as error:
                if isinstance(error, SaveTimeoutError) and not self._has_time_left():
                    raise
                path = f"{self.url}/{self.writes.subdir}".rstrip("/")
                _log.warning("rank %d could not send the export: %s", attempt.rank, error)
                nbytes = sum(file.nbytes for file in self.files)
                report.export_error = report.export_error or export_error(
                    error, rank=attempt.rank, path=path, nbytes=nbytes
                )
                return
            finally:
                cells.discard(attempt.last_patience())
        report.blocks = exchanged.blocks
        report.nbytes["hf sent"] = exchanged.sent_nbytes
        report.nbytes["hf"] = sum(map(nbytes_of_blocks, work.values()))

    def _has_time_left(self) -> bool:
        """Whether the DCP half may go on: an export that lies apart has an earlier deadline."""
        self.attempt.check()
        return self.patience.deadline < self.attempt.context.deadline

    def _exchange(
        self,
        work: Mapping[int, Sequence[tuple[WriteItem, Region]]],
        source: TensorSource,
        cells: ExportCells,
    ) -> Exchanged:
        """Exchange the bytes of the export; raises an error of this rank when all rounds are over.

        Raises:
            Exception: What went wrong with this rank's tensors.
        """
        attempt, is_shared = self.attempt, self.abilities.shares_uploads
        files = [
            ExchangedFile(file.key, file.nbytes, file.part_nbytes, not is_shared)
            for file in self.files
        ]
        with joined_exchange(attempt, self.save_id) as group:
            done = ExchangedWrites(group, files).run(
                work,
                source,
                headers=self.headers,
                sink=cells,
                check=attempt.check,
                host_budget_bytes=self.writes.host_budget_bytes,
            )
        if done.error is not None:
            raise done.error
        return done
