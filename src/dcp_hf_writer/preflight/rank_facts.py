"""What a rank finds out for its local plan: whether it can be right, and what to tell of itself."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import torch.distributed as dist

from dcp_hf_writer.plan.global_plan import LocalFacts
from dcp_hf_writer.preflight.detect_hand_sharded import check_samples, samples_of
from dcp_hf_writer.preflight.plan_check import check_plan
from dcp_hf_writer.save.owner_process import page_cache_id
from dcp_hf_writer.torch_seam.unsupported import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.checkpoint.planner import SavePlan

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.save.save_context import RankView


def local_facts(
    plan: SavePlan,
    view: RankView,
    *,
    target: str,
    is_coordinator: bool,
    export: HFExport | None,
    group: dist.ProcessGroup | None,
) -> LocalFacts:
    """Check a rank's plan, and return what it shall carry.

    Args:
        plan: What the planner made on this rank.
        view: What this rank is to save.
        target: Path of the checkpoint.
        is_coordinator: Whether this rank is the coordinator.
        export: Options of the export.
        group: Process group of the save.

    Raises:
        PlanningError: If the plan leaves out what this rank holds.
    """
    check_plan(plan, view.planned, export)
    return LocalFacts(
        host=page_cache_id(target),
        order=_order(plan, view) if is_coordinator else None,
        tied=view.tied(),
        samples=samples_of(
            view.planned,
            key=None if export is None else export.key,
            world_size=dist.get_world_size(group) if dist.is_initialized() else 1,
        ),
        stamp=uuid.uuid4().hex,
    )


def _order(plan: SavePlan, view: RankView) -> tuple[str, ...]:
    """Return FQNs in state-dict order."""
    # A plan has no item for a tensor that other ranks hold altogether, though it has its place.
    planned = (item.index.fqn for item in plan.items)
    return tuple(dict.fromkeys((*view.planned.state_dict, *planned)))


def check_facts(plans: Sequence[SavePlan]) -> None:
    """Check that what the ranks told of themselves goes together (coordinator).

    Args:
        plans: The global plan; facts that a writer of another kind made are refused elsewhere.

    Raises:
        PlanningError: If ranks hold different tensors under one name.
    """
    facts = [plan.storage_data for plan in plans]
    check_samples([fact.samples if isinstance(fact, LocalFacts) else b"" for fact in facts], plans)


def check_reported_facts(plans: Sequence[SavePlan], reports: Sequence[RankReport]) -> None:
    """Check what DCP's plan cache kept from the coordinator, now that the ranks have reported it.

    Args:
        plans: The global plan, with the facts of this save or of an earlier one.
        reports: One a rank, by rank.

    Raises:
        PlanningError: If ranks hold different tensors under one name.
        UnsupportedTorchError: If a rank's facts are not there.
    """
    samples = []
    for plan, report in zip(plans, reports, strict=True):
        facts, found = plan.storage_data, report.samples
        if isinstance(facts, LocalFacts) and facts.stamp == report.stamp:
            found = facts.samples
        if found is None:
            raise unsupported_torch(
                "what a rank sent along with its plan",
                rank=report.rank,
                phase="finish",
                expected="the storage_data of each plan of this save",
                hint="pass a planner with enable_plan_caching=False",
            )
        samples.append(found)
    check_samples(samples, plans)
