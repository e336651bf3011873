"""Which save a rank takes part in, and whether what it holds belongs to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.rendezvous import MEETING

if TYPE_CHECKING:
    from dcp_hf_writer.plan.global_plan import RankPlan
    from dcp_hf_writer.save.attempt import Attempt

_FIND_S = 60.0
"""Longest wait for the coordinator's record, which is there before the plan is."""


def planned_directory(attempt: Attempt, own: RankPlan) -> StagingDirectory:
    """Return the directory that the coordinator has made for the save of a plan; notes it.

    Args:
        attempt: The save.
        own: What this rank is to write.

    Raises:
        PlanningError: If there is no such save, or this rank holds a part of another plan.
        RankLostError: If the coordinator announced none.
    """
    member = attempt.member
    if member.is_coordinator and attempt.directory is not None:
        directory = attempt.directory
        plan_id = "" if attempt.global_plan is None else attempt.global_plan.plan_id
    else:
        if member.rendezvous is None:
            msg = "the ranks of the save have no store in common"
            raise PlanningError(msg, rank=attempt.rank, phase="write", path=attempt.target)
        timeout_s = min(attempt.context.left_s(), _FIND_S)
        found = member.rendezvous.find(attempt.target, timeout_s=timeout_s, rank=attempt.rank)
        MEETING.fall_in(found.count)
        directory, plan_id = StagingDirectory(attempt.target, found.save_id), found.plan_id
        attempt.work_in(directory, count=found.count)
    if plan_id != own.plan_id:
        msg = "this rank holds a part of another plan"
        raise PlanningError(
            msg,
            rank=attempt.rank,
            phase="write",
            expected=f"plan {plan_id[:12]}" if plan_id else "a plan of the coordinator",
            found=f"plan {own.plan_id[:12]}",
            hint="pass the same HFExport and a planner of one run on every rank",
        )
    return directory
