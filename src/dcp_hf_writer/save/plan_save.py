"""Plan what a save writes, or find the plan of an earlier save of the same layout (coordinator)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.plan import global_plan
from dcp_hf_writer.save.dcp_half import prepare_dcp
from dcp_hf_writer.save.kept_plans import KEPT_PLANS, key_of, parts_again
from dcp_hf_writer.storage.store_urls import is_url
from dcp_hf_writer.torch_seam.plan_cache import PLAN_CACHE

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.checkpoint.storage import StorageWriter

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_assets import Assets


def plan_save(
    attempt: Attempt,
    plans: list[SavePlan],
    export: HFExport | None,
    assets: Assets | None,
    *,
    dcp_writer: StorageWriter | None,
    weights: str,
) -> tuple[GlobalPlan, list[SavePlan] | None]:
    """Return the global plan and each rank's plan; `None` for these if torch's cache has them.

    Args:
        attempt: The save.
        plans: The whole plans of all ranks, by rank.
        export: Options of the export; `None` for the DCP half only.
        assets: Assets of the export.
        dcp_writer: The user's writer of the DCP half; `None` for ours.
        weights: The writer's option.

    Raises:
        PlanningError: If the state dict cannot be exported with these options.
    """
    with attempt.timed("plan"):
        file_of_key = None if assets is None else assets.file_of_key
        architecture = None if assets is None else assets.architecture
        options = global_plan.options_fingerprint(export, file_of_key, architecture)
        kind = "store" if is_url(attempt.target) else "files"
        options += f" {type(dcp_writer).__qualname__} {weights} {kind}"
        known = PLAN_CACHE.delivered(plans, options)
        if known is not None:
            return known, None
        key = key_of(plans, attempt.view.planned.planner, options)
        known = KEPT_PLANS.find(key, plans)
        if known is not None:
            return known, parts_again(known, prepare_dcp(plans, dcp_writer, attempt.target))
        known = global_plan.plan_globally(
            plans,
            export,
            options=options,
            file_of_key=file_of_key,
            architecture=architecture,
            once=weights == "once",
        )
        KEPT_PLANS.keep(key, known)
        prepared = prepare_dcp(plans, dcp_writer, attempt.target)
        return known, global_plan.rank_plans(known, prepared)
