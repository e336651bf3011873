"""Look whether a save may begin, on the coordinator, just before it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.manager.free_space import refusal_for_space

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.manager.keep_house import Housekeeper
    from dcp_hf_writer.manager.pending_save import SaveRequest
    from dcp_hf_writer.manager.restore_run import Restored
    from dcp_hf_writer.manager.run_mirror import RunMirror
    from dcp_hf_writer.manager.run_storage import RunStorage


def may_replace(
    run: RunStorage, restored: Restored | None, step: int, path: str, *, is_snapshot: bool
) -> bool:
    """Whether what is there may go: a snapshot, or a future that the run has left.

    Args:
        run: The storage of the run.
        restored: What the run resumed from; `None` if it did not.
        step: Step of the save.
        path: Where it goes.
        is_snapshot: Whether it goes into the snapshot slot.
    """
    if is_snapshot or not run.exists(path):
        return is_snapshot
    is_after = restored is not None and step > restored.step
    return is_after or run.look_at(step).facts is None


def refusal_of(
    run: RunStorage,
    house: Housekeeper,
    request: SaveRequest,
    *,
    may_replace: Callable[[], bool],
    needed: int,
    timeout_s: float,
    mirror: RunMirror | None = None,
) -> CheckpointError | None:
    """Return why a save must not begin; `None` if it may.

    On a store, this deletes the checkpoint that the save replaces, if it may.

    Args:
        run: The storage of the run.
        house: Deletes what retention gives up.
        request: The save.
        may_replace: Whether the save may replace a checkpoint of its step.
        needed: Size of the checkpoint in bytes.
        timeout_s: How long deletions may take, in seconds.
        mirror: The mirror of the run.
    """
    try:
        if mirror is not None and not request.is_snapshot:
            mirror.make_way(request.step)
        if not run.overwrites:
            # A deletion by the record of a dead save must not meet the save that takes its place.
            house.wait(timeout_s)
            if may_replace():
                run.make_way(request.step, is_snapshot=request.is_snapshot)
    except CheckpointError as error:
        return error
    return refusal_for_space(run, house, path=request.path, needed=needed, timeout_s=timeout_s)
