"""The last phase of a save: the coordinator checks what the ranks wrote, and publishes it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import PlanningError, SaveAbortedError, SaveTimeoutError
from dcp_hf_writer.save import coordinator, save_log
from dcp_hf_writer.save.export_failures import (
    export_error,
    nbytes_of,
    published_without_export,
)
from dcp_hf_writer.save.rank_results import take_reports
from dcp_hf_writer.save.save_target import Publication, SaveTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.checkpoint.storage import WriteResult

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.save.attempt import Attempt


@dataclass(slots=True)
class FinishPhase:
    """The finish phase of a save; only the coordinator has one."""

    attempt: Attempt
    export: HFExport | None
    subdir: str
    overwrite: bool
    save_id: str
    """Id of the save, for the metadata."""
    check_facts: Callable[[Sequence[SavePlan], Sequence[RankReport]], None]
    """Compares the facts of the ranks if the planning step did not see them."""

    def run(self, metadata: Metadata, results: list[list[WriteResult]]) -> ExportError | None:
        """Check that the files are complete, and publish the checkpoint.

        Args:
            metadata: The planner's metadata.
            results: What the ranks returned from their write phases, by rank.

        Returns:
            Why the published checkpoint has no export; `None` if it has one, or if none was asked
            for.

        Raises:
            CoverageError: If the parts that the ranks wrote do not cover each file exactly once.
            StorageError: If the checkpoint could not be published.
        """
        attempt = self.attempt
        plan, target = _planned(attempt), attempt.directory
        if not isinstance(target, SaveTarget):
            msg = "the coordinator did not prepare this save"
            raise PlanningError(msg, rank=attempt.rank, phase="finish", path=attempt.target)
        began = time.monotonic()
        attempt.check()
        plain, reports = take_reports(results)
        if not attempt.are_facts_checked:
            self.check_facts(plan.plans, reports)
        error = self._export_error(target, plan, reports)
        coordinator.check_written(metadata, plain)
        with attempt.timed("metadata"):
            coordinator.share_text(plain)
            target.finish_dcp(metadata, plain, attempt, save_id=self.save_id)
        seconds = {"finish": time.monotonic() - began}
        what = Publication(plan, reports, self.subdir, self.overwrite, error, seconds)
        found = target.publish_export(attempt, what)
        if found is not None and found is not error:
            error = self._without_export(target, found)
            what = replace(what, error=error)
        target.publish(attempt, what)
        if not attempt.context.is_sent:
            published = _published(attempt, reports, error)
            save_log.log_published(published)
            attempt.note_outcome(error, nbytes=published.nbytes)
        return error

    def _export_error(
        self, target: SaveTarget, plan: GlobalPlan, reports: Sequence[RankReport]
    ) -> ExportError | None:
        """Return why there is no export, and remove what there is of a failed one."""
        errors = [r.export_error for r in reports if r.export_error is not None]
        error = self.attempt.export_error or (errors[0] if errors else None)
        if error is None:
            error = self._add_checksums(target, plan)
        if error is not None:
            coordinator.check_dcp_stands_alone(plan, error)
            target.drop_export(self.subdir, self.attempt)
            error = self._without_export(target, error)
        return error

    def _without_export(self, target: SaveTarget, error: ExportError) -> ExportError:
        return published_without_export(
            error,
            staging=target.path,
            target=target.target,
            place=target.export_path(self.subdir),
        )

    def _add_checksums(self, target: SaveTarget, plan: GlobalPlan) -> ExportError | None:
        """Add checksums if `export` asks for them; a failure costs the export, not the DCP half."""
        attempt = self.attempt
        if plan.layout is None or self.export is None:
            return None
        try:
            target.add_checksums(self.export, attempt, subdir=self.subdir)
        except (SaveAbortedError, SaveTimeoutError):
            raise
        except OSError as error:
            path = f"{target.path}/{self.subdir}".rstrip("/")
            nbytes = nbytes_of(plan.layout)
            return export_error(error, rank=attempt.rank, path=path, nbytes=nbytes)
        return None


def _planned(attempt: Attempt) -> GlobalPlan:
    if attempt.global_plan is None:
        msg = "the coordinator made no global plan"
        raise PlanningError(msg, rank=attempt.rank, path=attempt.target)
    return attempt.global_plan


def _published(
    attempt: Attempt, reports: Sequence[RankReport], error: ExportError | None
) -> save_log.Published:
    context = attempt.context
    dcp_nbytes, hf_nbytes = (sum(r.nbytes.get(half, 0) for r in reports) for half in ("dcp", "hf"))
    return save_log.Published(
        target=context.target,
        step=save_log.step_of(context.target),
        nbytes=(dcp_nbytes, hf_nbytes if error is None else 0),
        stall_s=None if context.staged is None else context.staged.stall_s,
        total_s=time.monotonic() - context.staged_at,
    )
