"""torch's plan cache (`enable_plan_caching`), made whole for us and safe for saves that fail.

torch keeps plans on the class of the planner. A rank whose plan is as before sends an empty one,
the coordinator fills it in from what it kept, and only plans that changed travel back. Two things
are missing there: a storage writer is shown nothing but the changes; and what the coordinator kept
may belong to a save that failed before the ranks got it, or to another writer, in which case the
ranks would work from plans that do not fit, and tensors that are new would be left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.plan.global_plan import RankPlan

if TYPE_CHECKING:
    from dcp_hf_writer.plan.global_plan import GlobalPlan

# Global plans that the ranks have got, as long as a planner's cache holds what they were made from.
_delivered: list[GlobalPlan] = []

_is_settled = True
"""Whether all was written that the latest plan of this process says."""


_tied: tuple[tuple[str, ...], ...] = ()
"""Tensors of this rank that were the same memory in its latest plan."""


def begin_plan(tied: tuple[tuple[str, ...], ...]) -> None:
    """Keep torch from reusing a plan that does not hold any more; before a rank makes its plan.

    A rank that finds nothing in its cache sends its plan whole, and one such rank makes the
    coordinator plan anew for all.

    Args:
        tied: Groups of FQNs that are the same memory, which torch does not see in a plan.
    """
    global _is_settled, _tied  # noqa: PLW0603 - the caches are the process's as well
    sent = SavePlanner._cached_save_plan  # noqa: SLF001 - the cache has no other face
    if not _is_settled or tied != _tied:
        sent.clear()
    _tied = tied
    for key, final in SavePlanner._cached_final_save_plan.items():  # noqa: SLF001
        if not isinstance(final.storage_data, RankPlan):
            sent.pop(key, None)
    _is_settled = False


def settle_plan(plan: GlobalPlan | None) -> None:
    """Note that this rank has written its part of a plan, which the coordinator gives whole."""
    global _is_settled  # noqa: PLW0603 - as above
    _is_settled = True
    if plan is not None:
        cached = SavePlanner._cached_global_plan.values()  # noqa: SLF001
        kept = [known for known in _delivered if known.plans is not plan.plans]
        _delivered[:] = [
            known for known in (*kept, plan) if any(known.plans is plans for plans in cached)
        ]


def whole_plans(plans: list[SavePlan], planner: SavePlanner | None) -> list[SavePlan]:
    """Return the global plan, of which torch shows a writer only what changed.

    Args:
        plans: What torch hands to `prepare_global_plan`.
        planner: Planner of the save.

    Raises:
        PlanningError: If there is nothing to fill it in from.
    """
    if all(plan.usable for plan in plans):
        return plans
    found = getattr(planner, "global_plan", None)
    if not isinstance(found, list) or len(found) != len(plans):
        msg = "DCP reuses a plan that its planner does not show"
        raise PlanningError(
            msg,
            phase="plan",
            expected="a planner with the global_plan of DefaultSavePlanner",
            found=type(planner).__name__,
            hint="pass a planner with enable_plan_caching=False",
        )
    return found


def delivered(plans: list[SavePlan], options: str) -> GlobalPlan | None:
    """Return what was made of these very plans and is with the ranks; `None` if nothing is.

    Args:
        plans: Of `whole_plans`; the same object while torch's cache is unchanged.
        options: Fingerprint of the export options.
    """
    return next(
        (known for known in _delivered if known.plans is plans and known.options == options), None
    )
