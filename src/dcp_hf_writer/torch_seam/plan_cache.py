"""Work with torch's plan cache (`enable_plan_caching`): get whole plans, and survive failed saves.

torch keeps plans on the planner class. If a rank's plan has not changed, the rank sends an empty
plan. The coordinator fills it in from its cache, and sends back only the plans that changed. This
causes two problems. First, a storage writer sees only the changed plans. Second, the caches may
hold plans of a save that failed before the ranks got them, or of another writer. Then the ranks
would use plans that do not fit, and new tensors would be lost.

So a save of ours gives its planner a key of its own, and torch's caches hold plans under that key
only while the save plans. Before and after, this module keeps them. Other writers find neither our
plans nor our key.

Mechanism: the dicts `_cached_save_plan`, `_cached_final_save_plan`, `_cached_all_plans`,
`_cached_global_plan` and `_cached_metadata` on the class `SavePlanner`, and the attributes
`_cached_plans_key`, `global_plan` and `_enable_plan_caching` of `DefaultSavePlanner`.

Looked at: torch 2.10 to 2.15, `default_planner.py`. When torch changes: a save that reuses a cached
plan is refused, and the error says to pass `enable_plan_caching=False`. Saves without plan caching
do not need this module.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dcp_hf_writer.plan.global_plan import RankPlan
from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcp_hf_writer.errors import UnsupportedTorchError
    from dcp_hf_writer.plan.global_plan import GlobalPlan


_SENT, _FINAL, _GLOBAL = "_cached_save_plan", "_cached_final_save_plan", "_cached_global_plan"
_CACHES = (_SENT, _FINAL, _GLOBAL, "_cached_all_plans", "_cached_metadata")
_KEY = "_cached_plans_key"
_OURS = "\0dcp-hf-writer"
"""Ends the key of a planner while one of our saves uses it."""


class PlanCache:
    """What a process must remember in addition to torch's caches; there is one per process."""

    def __init__(self) -> None:
        """Start empty, as torch's caches do."""
        self._kept: dict[str, dict[str, Any]] = {}
        """By key of a planner, what torch's caches hold for our saves, by name of the cache."""
        self._planner: SavePlanner | None = None
        """The planner whose plans are in torch's caches now."""
        self._delivered: list[GlobalPlan] = []
        """Global plans that all ranks have; each stays while the caches have the same plans."""
        self._is_settled = True
        """Whether this process has written everything in its latest plan."""
        self._tied: tuple[tuple[str, ...], ...] = ()
        """Groups of FQNs that had the same memory when this rank made its latest plan."""

    def begin_plan(self, planner: SavePlanner, tied: tuple[tuple[str, ...], ...]) -> None:
        """Put our plans into torch's caches, except those that are no longer valid.

        Called before a rank makes its plan. A rank that finds no plan in its cache sends its whole
        plan. One such rank is enough: the coordinator then makes a new global plan for all ranks.

        Args:
            planner: Planner of the save.
            tied: Groups of FQNs that have the same memory. torch's plans do not show this.
        """
        # After a synchronous save that failed, the planner may still have our key.
        self.end_plan(planner)
        key = getattr(planner, _KEY, None)
        if isinstance(key, str):
            kept = self._kept.get(key, {})
            final = kept.get(_FINAL)
            is_ours = final is not None and isinstance(final.storage_data, RankPlan)
            if not self._is_settled or tied != self._tied or not is_ours:
                kept.pop(_SENT, None)
            ours = key + _OURS
            setattr(planner, _KEY, ours)
            for name in _CACHES:
                cache = torch_cache(name)
                if cache is not None:
                    cache.pop(ours, None)
                    if name in kept:
                        cache[ours] = kept[name]
        self._planner = planner
        self._tied = tied
        self._is_settled = False

    def end_plan(self, planner: SavePlanner) -> None:
        """Take our plans out of torch's caches, and give the planner its own key back.

        Called when a rank has its plan, and when a save has ended. Safe to call twice.
        """
        key = getattr(planner, _KEY, None)
        if not isinstance(key, str) or not key.endswith(_OURS):
            return
        own = key.removesuffix(_OURS)
        setattr(planner, _KEY, own)
        if self._planner is planner:
            found = {name: (torch_cache(name) or {}).pop(key, None) for name in _CACHES}
            self._kept[own] = {name: value for name, value in found.items() if value is not None}
            self._planner = None

    def check_sent(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Check that this rank sends its whole plan, or that torch reuses it from our caches.

        Raises:
            UnsupportedTorchError: If torch reuses the plan, but one of its caches cannot be found.
        """
        key = getattr(planner, _KEY, None)
        is_ours = isinstance(key, str) and key.endswith(_OURS)
        names = (_SENT, _FINAL, _GLOBAL)
        if not plan.usable and (not is_ours or any(torch_cache(name) is None for name in names)):
            raise _unknown_cache()

    def settle_plan(self, plan: GlobalPlan | None) -> None:
        """Note that this rank has written its part; `end_plan` comes first.

        Args:
            plan: The global plan; `None` except on the coordinator.
        """
        self._is_settled = True
        if plan is not None:
            cached = [one.get(_GLOBAL) for one in self._kept.values()]
            kept = [known for known in self._delivered if known.plans is not plan.plans]
            self._delivered[:] = [
                known for known in (*kept, plan) if any(known.plans is plans for plans in cached)
            ]

    def delivered(self, plans: list[SavePlan], options: str) -> GlobalPlan | None:
        """Return the global plan for `plans` if all ranks have it already; otherwise `None`.

        Args:
            plans: The list from `whole_plans`: the same object while torch's cache is unchanged.
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
"""The one object of this process."""


def torch_cache(name: str) -> dict[str, Any] | None:
    """Return a cache that torch keeps on the planner class; `None` if torch has no such cache."""
    found = getattr(SavePlanner, name, None)
    return found if isinstance(found, dict) else None


def whole_plans(plans: list[SavePlan], planner: SavePlanner) -> list[SavePlan]:
    """Return the whole plans of all ranks. With plan caching, torch shows only changed plans.

    Args:
        plans: The plans that torch passes to `prepare_global_plan`.
        planner: Planner of the save, which has the unchanged plans too.

    Raises:
        UnsupportedTorchError: If the planner does not show the unchanged plans.
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
    """Whether torch's cache holds one of these plans, which an earlier save may then have made."""
    cached = torch_cache(_GLOBAL) or {}
    kept = {id(plan) for plans in cached.values() for plan in plans}
    return any(id(plan) in kept for plan in plans)


def uses_cache(planner: SavePlanner) -> bool:
    """Whether a planner uses torch's plan caches."""
    return bool(getattr(planner, "_enable_plan_caching", False))


def without_cache(planner: SavePlanner) -> SavePlanner:
    """Return a copy of a planner that neither reads torch's caches nor writes to them."""
    fresh = copy.copy(planner)
    if uses_cache(fresh):
        fresh._enable_plan_caching = False  # type: ignore[attr-defined]  # noqa: SLF001
    return fresh


def _unknown_cache() -> UnsupportedTorchError:
    return unsupported_torch(
        "the plan of the previous save, which DCP reuses",
        phase="plan",
        expected="the plan caches on SavePlanner, and global_plan on DefaultSavePlanner",
        hint="pass a planner with enable_plan_caching=False",
    )
