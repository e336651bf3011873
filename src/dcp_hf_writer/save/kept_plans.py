"""Plans of earlier saves: while a layout stays the same, it is planned and sent once.

The coordinator keeps its global plan, and each rank keeps its part of it. Every later save compares
digests of the ranks' local plans. If none has changed, and each rank still has its part, then the
coordinator sends the id of the plan instead of the parts.

With torch's plan caching, torch sends nothing for an unchanged layout: `torch_seam/plan_cache`.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.plan.global_plan import KeptPart, LocalFacts, RankPlan
from dcp_hf_writer.torch_seam.plan_cache import uses_cache
from dcp_hf_writer.torch_seam.plan_digest import digest_of_plan, digests_of_global_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    from dcp_hf_writer.plan.global_plan import GlobalPlan

    Key = tuple[str, ...]

# A run may save two or three kinds of state dict in turn, for instance with and without optimizer.
_MOST_PLANS = 4


class KeptPlans:
    """The plans that a process keeps. Thread-safe."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, str], RankPlan] = {}
        self._plans: dict[Key, GlobalPlan] = {}

    def with_digest(
        self, facts: LocalFacts, plan: SavePlan, planner: SavePlanner, *, rank: int
    ) -> LocalFacts:
        """Return the facts of a rank with the digest of its plan and the ids of what it keeps.

        Args:
            facts: The facts that the rank sends with its plan.
            plan: Its local plan.
            planner: Its planner. With torch's plan caching, torch keeps the plans.
            rank: This rank. After a restart, a process may have another one.
        """
        if uses_cache(planner) or not plan.usable:
            return facts
        digest = digest_of_plan(plan, facts.host, facts.order, facts.tied)
        with self._lock:
            kept = tuple(plan_id for of_rank, plan_id in self._parts if of_rank == rank)
        return replace(facts, digest=digest, kept=kept)

    def take(self, own: RankPlan | KeptPart, *, rank: int) -> RankPlan:
        """Return a rank's part of the global plan, and keep it.

        Raises:
            PlanningError: If the coordinator sent only the id of a plan, and this rank has not kept
                its part.
        """
        with self._lock:
            at = rank, own.plan_id
            part = self._parts.pop(at, None)
            if isinstance(own, RankPlan):
                part = own
            if part is None:
                msg = "this rank has not kept its part of the plan that the coordinator names"
                raise PlanningError(
                    msg,
                    rank=rank,
                    phase="write",
                    expected="a part from an earlier save of this process",
                    found=f"none of plan {own.plan_id[:12]}",
                    hint="this is a bug in dcp-hf-writer, please report it",
                )
            self._parts[at] = part
            _drop_first(self._parts)
        return replace(part, dcp=own.dcp)

    def find(self, key: Key | None, plans: Sequence[SavePlan]) -> GlobalPlan | None:
        """Return the kept plan of this layout; `None` if there is none, or a rank lacks its part.

        Args:
            key: What `key_of` returned.
            plans: The plans of this save, by rank.
        """
        if key is None:
            return None
        with self._lock:
            known = self._plans.pop(key, None)
            if known is None:
                return None
            # Last again: the plan that was used least recently is dropped first.
            self._plans[key] = known
        if not all(known.plan_id in plan.storage_data.kept for plan in plans):
            return None
        return replace(known, plans=list(plans))

    def keep(self, key: Key | None, plan: GlobalPlan) -> None:
        """Keep a new global plan (coordinator)."""
        if key is not None:
            with self._lock:
                self._plans.pop(key, None)
                self._plans[key] = plan.without_chunks()
                _drop_first(self._plans)


def key_of(plans: Sequence[SavePlan], planner: SavePlanner, options: str) -> Key | None:
    """Return what a global plan depends on: equal keys mean equal plans (coordinator).

    Args:
        plans: The plans of all ranks after torch's global planning, with `LocalFacts`.
        planner: The planner of the coordinator.
        options: Fingerprint of all options that the plan depends on.

    Returns:
        The key; `None` if the plan must not be kept.
    """
    facts = [plan.storage_data for plan in plans]
    sent = [fact.digest if isinstance(fact, LocalFacts) else "" for fact in facts]
    digests = digests_of_global_plan(plans, planner, sent)
    return None if digests is None else (options, *digests)


def parts_again(plan: GlobalPlan, dcp: Sequence[SavePlan]) -> list[SavePlan]:
    """Return for each rank a plan that names the part which the rank has kept.

    Args:
        plan: The global plan that `KeptPlans.find` returned.
        dcp: The plans of this save, after the DCP writer prepared them.
    """
    return [
        replace(prepared, storage_data=KeptPart(prepared.storage_data, plan.plan_id))
        for prepared in dcp
    ]


def _drop_first(kept: dict[Any, Any]) -> None:
    while len(kept) > _MOST_PLANS:
        del kept[next(iter(kept))]


KEPT_PLANS = KeptPlans()
"""The one object of this process: a trainer may make a new writer for each save."""
