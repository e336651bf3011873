"""What a rank finds out for its local plan: whether it can be right, and what to tell of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from dcp_hf_writer.plan.global_plan import LocalFacts
from dcp_hf_writer.preflight.drifted_ties import untrue_tie
from dcp_hf_writer.preflight.hand_sharded import check_samples, samples_of
from dcp_hf_writer.preflight.plan_check import check_plan
from dcp_hf_writer.save.save_owner import page_cache_id
from dcp_hf_writer.staging.memory_identity import memory_of, tied_groups
from dcp_hf_writer.torch_seam.frames import planned_state_dict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.save.attempt import Attempt


def note_memory(attempt: Attempt, planner: SavePlanner | None) -> tuple[tuple[str, ...], ...]:
    """Note the memory of this rank's tensors; returns the groups of FQNs that are the same."""
    if attempt.staged is not None:
        attempt.memory = attempt.staged.memory
    else:
        attempt.memory = memory_of(planned_state_dict(planner))
    return tied_groups(attempt.memory)


def local_facts(
    plan: SavePlan,
    planner: SavePlanner | None,
    *,
    attempt: Attempt,
    export: HFExport | None,
    group: dist.ProcessGroup | None,
) -> LocalFacts:
    """Check a rank's plan, and return what it shall carry.

    Notes why the export would be wrong if it would.

    Raises:
        PlanningError: If the plan leaves out what this rank holds.
    """
    check_plan(plan, planner, export)
    if export is not None:
        attempt.export_error = untrue_tie(planner, export, attempt.memory, rank=attempt.rank)
    return LocalFacts(
        host=page_cache_id(attempt.target),
        order=_order(plan, planner) if attempt.is_coordinator else None,
        tied=tied_groups(attempt.memory),
        samples=samples_of(
            planner,
            key=None if export is None else export.key,
            world_size=dist.get_world_size(group) if dist.is_initialized() else 1,
        ),
    )


def _order(plan: SavePlan, planner: SavePlanner | None) -> tuple[str, ...]:
    """Return FQNs in state-dict order."""
    # A plan has no item for a tensor that other ranks hold altogether, though it has its place.
    planned = (item.index.fqn for item in plan.items)
    return tuple(dict.fromkeys((*planned_state_dict(planner), *planned)))


def check_facts(plans: Sequence[SavePlan], whole: Sequence[SavePlan]) -> None:
    """Check that what the ranks told of themselves goes together (coordinator).

    Args:
        plans: As the ranks sent them.
        whole: The global plan.

    Raises:
        PlanningError: If ranks hold different tensors under one name.
    """
    facts = [plan.storage_data for plan in plans]
    check_samples([fact.samples if isinstance(fact, LocalFacts) else b"" for fact in facts], whole)
