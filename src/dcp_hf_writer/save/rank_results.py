"""How the report of a rank travels to the coordinator: as one extra result among those of DCP."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from dcp_hf_writer.plan.rank_report import RankReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.save.attempt import Attempt

# FQN of the extra result that carries a rank's report. `take_reports` removes the result before DCP
# sees it.
_REPORT_FQN = "\0dcp-hf-report"


def begun_report(attempt: Attempt) -> RankReport:
    """Return the report of a rank that has written nothing yet."""
    report = RankReport(attempt.rank, socket.gethostname())
    report.export_error = attempt.export_error
    report.stamp, report.samples = attempt.sent.stamp, attempt.sent.withheld_samples
    return report


def report_result(report: RankReport) -> WriteResult:
    """Return the extra result that carries a rank's report; `take_reports` takes it out again."""
    return WriteResult(MetadataIndex(_REPORT_FQN), 0, report)


def take_reports(
    results: Sequence[Sequence[WriteResult]],
) -> tuple[list[list[WriteResult]], list[RankReport]]:
    """Separate DCP's results from the ranks' reports.

    Returns:
        DCP's results of each rank, and the reports.
    """
    plain: list[list[WriteResult]] = []
    reports: list[RankReport] = []
    for rank_results in results:
        plain.append([r for r in rank_results if r.index.fqn != _REPORT_FQN])
        reports += [r.storage_data for r in rank_results if r.index.fqn == _REPORT_FQN]
    return plain, reports
