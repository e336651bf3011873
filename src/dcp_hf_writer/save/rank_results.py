"""The results that a rank hands to DCP: of its items, and one more that carries its report."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from dcp_hf_writer.formats.weights_once_places import NOTICE, encode_stored_once
from dcp_hf_writer.plan.rank_report import RankReport
from dcp_hf_writer.plan.regions import TargetTable
from dcp_hf_writer.plan.weights_once import stored_once
from dcp_hf_writer.save.tensor_bytes import chunk_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

    from dcp_hf_writer.plan.global_plan import RankPlan
    from dcp_hf_writer.save.attempt import Attempt

# FQN of the extra result that carries a rank's report. `take_reports` removes the result before DCP
# sees it.
_REPORT_FQN = "\0dcp-hf-report"


def stored_once_results(
    own: RankPlan, items: Iterable[WriteItem], *, subdir: str
) -> list[WriteResult]:
    """Return a result for each item that only the export stores; it tells where they are.

    Args:
        own: This rank's part of the global plan.
        items: Tensor items of its plan.
        subdir: Directory of the export within the checkpoint.
    """
    tables = {fqn: TargetTable(parts) for fqn, parts in own.once.items()}
    paths = [f"{subdir}/{name}" for name, _ in own.files]
    results = []
    for item in items:
        table = tables.get(item.index.fqn)
        if table is not None:
            chunk = chunk_of(item)
            once = stored_once(chunk, table.near(chunk), paths=paths)
            info = _StorageInfo(NOTICE, 0, once.nbytes, encode_stored_once(once))
            results.append(WriteResult(item.index, once.nbytes, info))
    return results


def begun_report(attempt: Attempt) -> RankReport:
    """Return the report of a rank that has written nothing yet."""
    report = RankReport(attempt.rank, socket.gethostname())
    report.export_error = attempt.export_error
    report.stamp, report.samples = attempt.sent.stamp, attempt.sent.withheld_samples
    return report


def without_results(plan: SavePlan, results: Iterable[WriteResult]) -> SavePlan:
    """Return a plan without the items that have results already."""
    there = {result.index for result in results}
    return replace(plan, items=[item for item in plan.items if item.index not in there])


def nbytes_of_items(items: Iterable[WriteItem]) -> int:
    """Return the bytes of the tensors among the items of a plan."""
    data = (item.tensor_data for item in items)
    return sum(math.prod(one.chunk.sizes) * one.properties.dtype.itemsize for one in data if one)


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
