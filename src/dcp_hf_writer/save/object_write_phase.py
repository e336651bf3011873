"""The write phase of a rank in a save to an object store.

The rank sends its DCP file as one object. It sends the cells of the export that it owns as parts of
the objects of the export. Both come from the staged copy; nothing is written to a local disk.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.planner import WriteItemType

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.cells import ExchangedFile
from dcp_hf_writer.plan.rank_report import RankReport
from dcp_hf_writer.save.dcp_half import SlabFileSystemWriter, check_results
from dcp_hf_writer.save.exchange_group import joined_exchange
from dcp_hf_writer.save.exchange_writes import ExchangedWrites
from dcp_hf_writer.save.export_cells import ExportCells
from dcp_hf_writer.save.export_failures import FATAL, export_error
from dcp_hf_writer.save.hf_half import regions_by_file
from dcp_hf_writer.save.object_parts import SentObject, in_flight_of, part_nbytes_of
from dcp_hf_writer.save.tensor_bytes import TensorSource
from dcp_hf_writer.save.write_phase import report_result, stored_once_results
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem
    from torch.distributed.checkpoint.storage import WriteResult

    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_cells import ExportUpload
    from dcp_hf_writer.save.save_target import RankWrites
    from dcp_hf_writer.storage.object_contract import Abilities, ObjectStore

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

    def run(self) -> list[WriteResult]:
        """Send everything, and report; see `SaveTarget.write`."""
        attempt, writes = self.attempt, self.writes
        report = RankReport(attempt.rank, socket.gethostname())
        report.export_error = attempt.export_error
        report.stamp, report.samples = attempt.sent.stamp, attempt.sent.withheld_samples
        source = TensorSource(writes.planner)
        tensors = [i for i in writes.plan.items if i.type != WriteItemType.BYTE_IO]
        work = regions_by_file(tensors, writes.own.targets)
        left_out = stored_once_results(writes.own, tensors, subdir=writes.subdir)
        plan = _without(writes.plan, {result.index for result in left_out})
        sent: list[SentObject] = []
        try:
            results = self._write_dcp(plan, source, report, sent)
            if self.files:
                self._write_export(work, source, report)
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
        part_nbytes = part_nbytes_of(_nbytes_of(plan.items), self.abilities)

        def begin(name: str) -> SentObject:
            made = SentObject(
                self.store,
                name,
                token=self.save_id,
                patience=attempt.patience(),
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
        attempt, is_shared = self.attempt, self.abilities.shares_uploads
        files = [
            ExchangedFile(file.key, file.nbytes, file.part_nbytes, not is_shared)
            for file in self.files
        ]
        cells = ExportCells(
            self.store,
            self.files,
            abilities=self.abilities,
            token=self.save_id,
            patience=attempt.patience(),
        )
        with attempt.timed("write hf"):
            try:
                with joined_exchange(attempt, self.save_id) as group:
                    exchanged = ExchangedWrites(group, files).run(
                        work,
                        source,
                        headers=self.headers,
                        sink=cells,
                        check=attempt.check,
                        host_budget_bytes=self.writes.host_budget_bytes,
                    )
                report.parts = cells.finish()
            except FATAL:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
                path = f"{self.url}/{self.writes.subdir}"
                _log.warning("rank %d could not send the export: %s", attempt.rank, error)
                nbytes = sum(file.nbytes for file in self.files)
                report.export_error = report.export_error or export_error(
                    error, rank=attempt.rank, path=path, nbytes=nbytes
                )
                return
            finally:
                cells.discard(attempt.last_patience())
        report.blocks = exchanged.blocks
        report.nbytes["sent"] = exchanged.sent_nbytes
        report.nbytes["hf"] = sum(
            region.copy.numel * ITEMSIZE[region.target.dtype]
            for blocks in work.values()
            for _, region in blocks
        )


def _without(plan: SavePlan, indices: set[MetadataIndex]) -> SavePlan:
    return replace(plan, items=[item for item in plan.items if item.index not in indices])


def _nbytes_of(items: Sequence[WriteItem]) -> int:
    """Return the size of the DCP file, or a bit more; objects are counted as small."""
    nbytes = 0
    for item in items:
        nbytes += _ARCHIVE_NBYTES
        if item.tensor_data is not None:
            chunk = item.tensor_data.chunk
            nbytes += chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
    return nbytes
