"""torch's plan caches, and what this package keeps in their place between its saves."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import SavePlanner

from dcp_hf_writer.torch_seam.plan_cache import PLAN_CACHE

CACHES = (
    *("_cached_save_plan", "_cached_final_save_plan", "_cached_all_plans"),
    *("_cached_global_plan", "_cached_metadata"),
)


def clear_caches() -> None:
    """Forget every plan, torch's and ours."""
    for name in CACHES:
        getattr(SavePlanner, name).clear()
    PLAN_CACHE._kept.clear()


def is_cached() -> bool:
    """Whether plans of our saves are kept for the next save."""
    return any("_cached_save_plan" in kept for kept in PLAN_CACHE._kept.values())


def held_by_torch() -> dict[str, Any]:
    """Return what torch's caches hold, by name of the cache."""
    return {name: dict(getattr(SavePlanner, name)) for name in CACHES if getattr(SavePlanner, name)}
