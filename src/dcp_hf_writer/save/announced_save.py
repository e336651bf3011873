"""Find the save that a rank takes part in, and check that the rank's plan belongs to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.plan.global_plan import KeptPart, RankPlan
from dcp_hf_writer.save.kept_plans import KEPT_PLANS
from dcp_hf_writer.save.rank_progress import MEETING
from dcp_hf_writer.save.save_target import SaveTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.distributed.checkpoint.planner import SavePlan

    from dcp_hf_writer.save.attempt import Attempt

_FIND_S = 60.0
"""Longest wait for the coordinator's record, which is stored before any rank gets its plan."""


def own_part(plan: SavePlan, *, rank: int) -> RankPlan:
    """Return this rank's part of the global plan, from the plan that torch passes on.

    Raises:
        PlanningError: If the plan was made by another writer, or names a part that this rank has
            not kept.
    """
    own = plan.storage_data
    if not isinstance(own, (RankPlan, KeptPart)):
        msg = "DCP gave this rank a plan that HFDualWriter did not make"
        raise PlanningError(
            msg,
            rank=rank,
            phase="write",
            found=type(own).__name__,
            hint="with enable_plan_caching, use a planner that no other writer has used",
        )
    return KEPT_PLANS.take(own, rank=rank)


def planned_target(
    attempt: Attempt,
    own: RankPlan,
    choose: Callable[[str, Mapping[str, Any]], SaveTarget],
) -> SaveTarget:
    """Return where this save writes, as the coordinator made it.

    A rank other than the coordinator also records the target in `attempt`.

    Args:
        attempt: The save.
        own: What this rank is to write.
        choose: Makes the target on this rank, from the save's id and what the coordinator told.

    Raises:
        PlanningError: If the ranks share no store, or this rank's plan is part of another plan.
        RankLostError: If the coordinator announced no save to this path.
    """
    member = attempt.member
    if member.is_coordinator and isinstance(attempt.directory, SaveTarget):
        target = attempt.directory
        plan_id = "" if attempt.global_plan is None else attempt.global_plan.plan_id
    else:
        if member.rendezvous is None:
            msg = "this rank shares no store with the other ranks of the save"
            raise PlanningError(msg, rank=attempt.rank, phase="write", path=attempt.target)
        timeout_s = min(attempt.context.left_s(), _FIND_S)
        found = member.rendezvous.find(attempt.target, timeout_s=timeout_s, rank=attempt.rank)
        MEETING.fall_in(found.count)
        target = choose(found.save_id, found.told)
        plan_id = found.plan_id
        attempt.work_in(target, count=found.count)
    if plan_id != own.plan_id:
        msg = "the plan of this rank is not part of the coordinator's plan"
        raise PlanningError(
            msg,
            rank=attempt.rank,
            phase="write",
            expected=f"part of plan {plan_id[:12]}" if plan_id else "a plan of the coordinator",
            found=f"part of plan {own.plan_id[:12]}",
            hint="pass the same HFExport on every rank, and no planner of an earlier run",
        )
    return target
