"""torch's plan cache (`enable_plan_caching`), made whole for us and safe for saves that fail.

torch keeps plans on the class of the planner. A rank whose plan is as before sends an empty one,
the coordinator fills it in from what it kept, and only plans that changed travel back. Two things
are missing there: a storage writer is shown nothing but the changes; and what the coordinator kept
may belong to a save that failed before the ranks got it, or to another writer, in which case the
ranks would work from plans that do not fit, and tensors that are new would be left out.

Mechanism: the dicts `_cached_save_plan`, `_cached_final_save_plan` and `_cached_global_plan` on the
class `SavePlanner`, and the attributes `global_plan` and `_enable_plan_caching` of
`DefaultSavePlanner`.

Looked at: torch 2.9 to 2.13, `default_planner.py`. When torch changes: a plan that was not sent, or
not shown, is refused, with `enable_plan_caching=False` as the way out; saves without plan caching
need none of this.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dcp_hf_writer.plan.global_plan import RankPlan
from dcp_hf_writer.torch_seam.unsupported import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcp_hf_writer.errors import UnsupportedTorchError
    from dcp_hf_writer.plan.global_plan import GlobalPlan


class PlanCache:
    """What this process must remember beside torch's caches, which are the process's as well."""

    def __init__(self) -> None:
        """Start as torch does, with nothing kept."""
        self._delivered: list[GlobalPlan] = []
        """Global plans that the ranks have got, while torch keeps what they were made from."""
        self._is_settled = True
        """Whether all was written that the latest plan of this process says."""
        self._tied: tuple[tuple[str, ...], ...] = ()
        """Tensors of this rank that were the same memory in its latest plan."""

    def begin_plan(self, tied: tuple[tuple[str, ...], ...]) -> None:
        """Keep torch from reusing a plan that does not hold any more; before a rank makes its plan.

        A rank that finds nothing in its cache sends its plan whole, and one such rank makes the
        coordinator plan anew for all.

        Args:
            tied: Groups of FQNs that are the same memory, which torch does not see in a plan.
        """
        sent, final = torch_cache("_cached_save_plan"), torch_cache("_cached_final_save_plan")
        # Where torch keeps none of them, `check_sent` refuses a plan that is reused all the same.
        if sent is not None:
            if final is None or not self._is_settled or tied != self._tied:
                sent.clear()
            for key, plan in (final or {}).items():
                if not isinstance(plan.storage_data, RankPlan):
                    sent.pop(key, None)
        self._tied = tied
        self._is_settled = False

    def check_sent(self, plan: SavePlan) -> None:
        """Check that this rank's plan is sent, or reused by a cache that is known.

        Raises:
            UnsupportedTorchError: If it is reused, and torch's caches are not where they were.
        """
        names = ("_cached_save_plan", "_cached_final_save_plan", "_cached_global_plan")
        if not plan.usable and any(torch_cache(name) is None for name in names):
            raise _unknown_cache()

    def settle_plan(self, plan: GlobalPlan | None) -> None:
        """Note that this rank has written its part of a plan, which the coordinator gives whole."""
        self._is_settled = True
        if plan is not None:
            cached = (torch_cache("_cached_global_plan") or {}).values()
            kept = [known for known in self._delivered if known.plans is not plan.plans]
            self._delivered[:] = [
                known for known in (*kept, plan) if any(known.plans is plans for plans in cached)
            ]

    def delivered(self, plans: list[SavePlan], options: str) -> GlobalPlan | None:
        """Return what was made of these very plans and is with the ranks; `None` if nothing is.

        Args:
            plans: Of `whole_plans`; the same object while torch's cache is unchanged.
            options: Fingerprint of the export options.
        """
        return next(
            (
                known
                for known in self._delivered
                if known.plans is plans and known.options == options
            ),
            None,
        )


PLAN_CACHE = PlanCache()
"""That of this process."""


def torch_cache(name: str) -> dict[str, Any] | None:
    """Return one of the caches that torch keeps on the class; `None` if it is not there."""
    found = getattr(SavePlanner, name, None)
    return found if isinstance(found, dict) else None


def whole_plans(plans: list[SavePlan], planner: SavePlanner) -> list[SavePlan]:
    """Return the global plan, of which torch shows a writer only what changed.

    Args:
        plans: What torch hands to `prepare_global_plan`.
        planner: Planner of the save.

    Raises:
        UnsupportedTorchError: If there is nothing to fill it in from.
    """
    if all(plan.usable for plan in plans):
        return plans
    found = getattr(planner, "global_plan", None)
    if (
        not isinstance(found, list)
        or len(found) != len(plans)
        or not all(isinstance(plan, SavePlan) and plan.usable for plan in found)
    ):
        raise _unknown_cache()
    return found


def is_from_cache(plans: Iterable[SavePlan]) -> bool:
    """Whether torch keeps one of these plans, so that it may be that of an earlier save."""
    cached = torch_cache("_cached_global_plan") or {}
    kept = {id(plan) for plans in cached.values() for plan in plans}
    return any(id(plan) in kept for plan in plans)


def without_cache(planner: SavePlanner) -> SavePlanner:
    """Return a copy of a planner that neither fills torch's caches nor plans from them."""
    fresh = copy.copy(planner)
    if getattr(fresh, "_enable_plan_caching", False):
        fresh._enable_plan_caching = False  # type: ignore[attr-defined]  # noqa: SLF001
    return fresh


def _unknown_cache() -> UnsupportedTorchError:
    return unsupported_torch(
        "the plan of the save before, which DCP reuses",
        phase="plan",
        expected="the caches of SavePlanner, and the global_plan of DefaultSavePlanner",
        hint="pass a planner with enable_plan_caching=False",
    )
