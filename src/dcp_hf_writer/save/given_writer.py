"""A storage writer of the user, which writes the DCP half into the directory of a save."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import StorageWriter, WriteResult


def run_given_writer(
    writer: StorageWriter,
    plan: SavePlan,
    planner: SavePlanner,
    *,
    path: str,
    is_coordinator: bool,
    rank: int,
) -> list[WriteResult]:
    """Let the user's storage writer write the DCP half into the directory of the save.

    The writer's `prepare_local_plan` runs here, because the directory is known only now. So its
    `prepare_global_plan` does not see what `prepare_local_plan` attaches to the plan; torch's own
    writers attach nothing.
    """
    storage_data = plan.storage_data
    writer.reset(path)
    writer.set_up_storage_writer(is_coordinator, rank=rank, use_collectives=True)
    plan = writer.prepare_local_plan(plan)
    if plan.storage_data is None:
        plan = type(plan)(plan.items, storage_data, plan.planner_data, plan.usable)
    future = writer.write_data(plan, planner)
    future.wait()
    results: list[WriteResult] = future.value()
    return results


def finish_given_writer(
    writer: StorageWriter,
    metadata: Metadata,
    results: list[list[WriteResult]],
    *,
    target: str,
    save_id: str,
) -> None:
    """Let the user's storage writer write `.metadata`, which names the final path and our save id.

    The writer works in the directory of the save, so its own `storage_meta` would name that. While
    it finishes, its `storage_meta` returns the other names.

    Args:
        writer: The writer.
        metadata: The planner's metadata.
        results: What the ranks wrote, by rank.
        target: The checkpoint, after the commit.
        save_id: Id of the save.
    """
    of_class = writer.storage_meta

    def storage_meta() -> StorageMeta | None:
        meta = of_class()
        return None if meta is None else replace(meta, checkpoint_id=target, save_id=save_id)

    # An attribute of the instance hides the method of its class. The writer may be used again.
    hidden = vars(writer).get("storage_meta")
    vars(writer)["storage_meta"] = storage_meta
    try:
        writer.finish(metadata, results)
    finally:
        if hidden is None:
            del vars(writer)["storage_meta"]
        else:
            vars(writer)["storage_meta"] = hidden
