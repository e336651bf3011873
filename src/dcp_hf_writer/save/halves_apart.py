"""A save whose halves lie apart: the DCP half in one place, the export in another one.

Each half has a manifest of its own, which names the place of the other half. The export is
published first, and the DCP half commits the save: so a committed DCP half never names an export
that is not there. A failure of the export never costs the DCP half.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError, SaveAbortedError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.encode_manifest import OtherHalf
from dcp_hf_writer.save.export_failures import export_error, nbytes_of
from dcp_hf_writer.save.export_half import ExportDirectory, ExportPrefix
from dcp_hf_writer.save.rank_results import report_result, take_reports
from dcp_hf_writer.save.save_target import SaveTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.storage import WriteResult

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_assets import Assets
    from dcp_hf_writer.save.progress_heartbeat import Pace
    from dcp_hf_writer.save.save_target import Publication, RankWrites

_log = logging.getLogger(__name__)


class HalvesApart(SaveTarget):
    """A place for the DCP half, and another one for the export."""

    def __init__(
        self,
        dcp: SaveTarget,
        export: ExportDirectory | ExportPrefix,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the target on one rank; sends no request.

        Args:
            dcp: Place of the DCP half.
            export: Place of the export.
            told: What the coordinator told; `None` on the coordinator.
        """
        self.target, self.save_id, self._dcp = dcp.target, dcp.save_id, dcp
        self._place = export.target
        has_export = told is None or told["hf"] is not None
        self._export = export if has_export else None
        """`None` once it is known that there is no export."""
        self._dropped: ExportDirectory | ExportPrefix | None = None
        """An export that was given up, until it is removed."""
        dcp.part_of = export.part_of = self
        export.dcp = dcp.target
        self._new_files: Collection[str] = ()
        self._is_settled = False

    @property
    def path(self) -> str:
        """Where the DCP half is written."""
        return self._dcp.path

    @property
    def pace(self) -> Pace:
        """That of the DCP half."""
        return self._dcp.pace

    def heartbeat_of(self, rank: int) -> Callable[[bytes], None] | None:
        """Return that of the DCP half; see `SaveTarget.heartbeat_of`."""
        return self._dcp.heartbeat_of(rank)

    def make(self, attempt: Attempt, *, overwrite: bool, new_files: Collection[str]) -> None:
        """Take the place of the DCP half; see `SaveTarget.make`."""
        self._new_files = new_files
        self._dcp.make(attempt, overwrite=overwrite, new_files=())

    def make_export(
        self, plan: GlobalPlan, assets: Assets | None, attempt: Attempt, *, subdir: str
    ) -> bool:
        """Take the place of the export and prepare it; see `SaveTarget.make_export`."""
        export = self._export
        if plan.layout is None or assets is None or export is None:
            self._export = None
            return True
        try:
            export.make(attempt, overwrite=False, new_files=self._new_files)
            if export.make_export(plan, assets, attempt, subdir=subdir):
                return True
        except SaveAbortedError:
            raise
        except CheckpointError as error:
            attempt.check()
            attempt.leave_out_export(self._error(error, attempt, nbytes_of(plan.layout)))
        self._drop()
        return False

    def _error(self, error: Exception, attempt: Attempt, nbytes: int) -> ExportError:
        return export_error(error, rank=attempt.rank, path=self._place, nbytes=nbytes)

    def _drop(self) -> None:
        """Give the export up; what it left is removed at the end, because its store may hang."""
        self._dropped, self._export = self._export or self._dropped, None

    def _clean(self) -> None:
        dropped, self._dropped = self._dropped, None
        if dropped is not None:
            dropped.remove()

    def told(self) -> Mapping[str, Any]:
        """Return what each half tells; see `SaveTarget.told`."""
        hf = None if self._export is None else self._export.told()
        return {"dcp": self._dcp.told(), "hf": hf}

    def check_visible(self, attempt: Attempt) -> None:
        """Look for both places; only that of the DCP half is needed. See `SaveTarget`."""
        self._dcp.check_visible(attempt)
        if self._export is None:
            return
        try:
            self._export.check_visible(attempt)
        except SaveAbortedError:
            raise
        except CheckpointError as error:
            attempt.check()
            # This rank still takes part in the exchange of the export: the others wait for it.
            attempt.leave_out_export(self._error(error, attempt, 0))

    def write(self, attempt: Attempt, writes: RankWrites) -> list[WriteResult]:
        """Write both halves; see `SaveTarget.write`."""
        export, exported = self._export, []
        # A store may not answer for long. The files of an export in a directory are open already,
        # and the DCP half closes all files.
        is_last = isinstance(export, ExportPrefix)
        written = self._write_dcp(attempt, writes) if is_last or export is None else []
        if export is not None:
            exported = export.write(attempt, replace(writes, half="hf"))
            attempt.exchange_cells(0)
        written = written or self._write_dcp(attempt, writes)
        (results,), (report,) = take_reports([written])
        for of_export in take_reports([exported])[1]:
            report.columns, report.export_digests = of_export.columns, of_export.digests
            report.parts = of_export.parts
            report.export_error = report.export_error or of_export.export_error
            report.nbytes = {**of_export.nbytes, "dcp": report.nbytes["dcp"]}
        return [*results, report_result(report)]

    def _write_dcp(self, attempt: Attempt, writes: RankWrites) -> list[WriteResult]:
        return self._dcp.write(attempt, replace(writes, half="dcp"))

    def drop_export(self, subdir: str, attempt: Attempt) -> None:
        """Give the failed export up; what cannot be removed keeps nobody from committing."""
        del subdir, attempt
        self._drop()

    def export_path(self, subdir: str) -> str:
        """Return the place of the export; see `SaveTarget.export_path`."""
        del subdir
        return self._place

    def add_checksums(self, export: HFExport, attempt: Attempt, *, subdir: str) -> None:
        """Let the place of the export add them; see `SaveTarget.add_checksums`."""
        if self._export is not None:
            self._export.add_checksums(export, attempt, subdir=subdir)

    def finish_dcp(
        self,
        metadata: Metadata,
        results: list[list[WriteResult]],
        attempt: Attempt,
        *,
        save_id: str,
    ) -> None:
        """Make `.metadata` in the place of the DCP half; see `SaveTarget.finish_dcp`."""
        self._dcp.finish_dcp(metadata, results, attempt, save_id=save_id)

    def publish_export(self, attempt: Attempt, what: Publication) -> ExportError | None:
        """Publish the export with a manifest of its own; see `SaveTarget.publish_export`."""
        if self._export is None or what.layout is None:
            return what.error
        part = replace(
            what,
            reports=[_of_export(report) for report in what.reports],
            half="hf",
            other_half=OtherHalf("dcp", self.target),
        )
        try:
            self._export.publish(attempt, part)
        except SaveAbortedError:
            raise
        except CheckpointError as error:
            attempt.check()
            _log.warning("the export could not be published in %s: %s", self._place, error)
            found = self._error(error, attempt, nbytes_of(what.layout))
            self._drop()
            return found
        reach("export published")
        return what.error

    def publish(self, attempt: Attempt, what: Publication) -> None:
        """Publish the DCP half, which commits the save; see `SaveTarget.publish`."""
        has_export = self._export is not None and what.layout is not None
        part = replace(
            what,
            reports=[_of_dcp(report) for report in what.reports],
            half="dcp",
            other_half=OtherHalf("hf", self._place) if has_export else None,
        )
        self._dcp.publish(attempt, part)
        self._is_settled = True
        if self._export is not None:
            self._export.settle(attempt)

    def is_committed(self) -> bool:
        """Whether the DCP half is visible; see `SaveTarget.is_committed`."""
        return self._dcp.is_committed()

    def remove(self) -> None:
        """Remove both halves, unless the DCP half is committed; see `SaveTarget.remove`."""
        if self._is_settled:
            self._dcp.remove()
            self._clean()
            return
        try:
            is_committed = self._dcp.is_committed()
        except CheckpointError as error:
            # The next save finds the export by its manifest or record.
            _log.warning(
                "%s stays, as it cannot be told how the save ended: %s", self._place, error
            )
            is_committed = True
        self._dcp.remove()
        if not is_committed:
            self._drop()
        self._clean()


def _of_export(report: RankReport) -> RankReport:
    nbytes = {half: count for half, count in report.nbytes.items() if half != "dcp"}
    return replace(report, dcp_files=[], digests=report.export_digests, nbytes=nbytes)


def _of_dcp(report: RankReport) -> RankReport:
    nbytes = {"dcp": report.nbytes.get("dcp", 0)}
    return replace(report, columns=None, parts={}, nbytes=nbytes)
