"""The start of a save: find torch's planner, take over the staged copy, guard the future."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.save.attempt import LIVE, Attempt
from dcp_hf_writer.save.failure_explanations import guard_save
from dcp_hf_writer.save.save_context import SaveContext
from dcp_hf_writer.staging.staged_state_dict import failure_in, staged_of
from dcp_hf_writer.staging.stager import STAGER
from dcp_hf_writer.torch_seam.caller_frames import RunningSave, find_save
from dcp_hf_writer.torch_seam.future_guard import current_future
from dcp_hf_writer.torch_seam.missing_group import check_group_is_there
from dcp_hf_writer.torch_seam.save_world import SaveWorld

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcp_hf_writer.save.finished_save import ReportHook
    from dcp_hf_writer.staging.slab import Handover, Lease
    from dcp_hf_writer.torch_seam.caller_frames import TorchSave


def begin_save(
    target: str,
    *,
    timeout_s: float,
    made_in: SaveWorld,
    pending: Callable[[], Lease | None],
    report_to: tuple[ReportHook, ...] = (),
) -> Attempt:
    """Begin the save that the calling thread runs, and guard its future.

    If the save cannot go on, the reason becomes `SaveContext.refusal`. The writer raises it later,
    in a step where torch passes the error on to all ranks.

    Args:
        target: Path of the checkpoint.
        timeout_s: Seconds from now to the deadline, if staging did not set one.
        made_in: The world in which the writer was made.
        pending: Returns the lease of what was staged for this save, as far as the writer can tell;
            called if the save or its staged copy cannot be found.
        report_to: Functions of the user that get the report of the save.

    Raises:
        UnsupportedTorchError: If the save is asynchronous, and its future cannot be found.
    """
    save: TorchSave | None = None
    handover: Handover | None = None
    lease: Lease | None = None
    world = SaveWorld.of(None, is_distributed=False)
    try:
        save = find_save()
        handover, lease = _staged(save.given)
        if lease is not None:
            lease.take_up()
        refusal = failure_in(save.given)
        is_sync = current_future() is None
        if handover is None and not save.is_distributed and not is_sync:
            made_in.check_unstaged(target=target)
        if handover is None and lease is None and save.is_distributed and is_sync:
            # An asynchronous save that is in flight uses the collectives of the same group.
            STAGER.wait_for_turn(what=target, deadline=time.monotonic() + timeout_s)
        if handover is not None and handover.world is not None:
            world = handover.world
            world.check(save.group, is_distributed=save.is_distributed, target=target, phase="plan")
        if not (save.is_distributed and world.is_certain and world.is_here):
            world = SaveWorld.of(save.group, is_distributed=save.is_distributed)
        if handover is None or handover.world is None or handover.world.is_alone:
            # What was staged in a process group was compared with it above.
            check_group_is_there(made_in.size)
    except CheckpointError as error:
        refusal = error
        if lease is None or not lease.is_taken_by_me:
            lease = _take(pending())
    now, thread = time.monotonic(), threading.current_thread()
    is_sent = handover is not None and lease is None
    is_async = lease is not None and lease.stager is not thread
    context = SaveContext(
        target,
        now + timeout_s if handover is None else handover.deadline,
        staged=None if handover is None else handover.info,
        staged_at=now if handover is None else handover.began,
        is_sent=is_sent,
        is_background=is_sent or is_async,
        refusal=refusal,
        world=world,
        report_to=report_to,
        running=None if save is None else RunningSave.of(save),
    )
    attempt = Attempt(context, lease=lease)
    LIVE.add(attempt)
    guard_save(attempt, anchor=None if save is None else save.ranks, is_async=is_async)
    return attempt


def _staged(given: Mapping[str, Any]) -> tuple[Handover | None, Lease | None]:
    """Return what staging passed to the save of a state dict, and its lease.

    Raises:
        StagingError: If tensors lie in the slab, but staging left nothing for a save.
    """
    handover, lease = STAGER.handover_of(given)
    staged = staged_of(given)
    if handover is not None or staged is None:
        return handover, lease
    # No tensor of it lies in the slab: it has none, or it could not be staged.
    lease = staged.lease
    return (staged.handover, None) if lease is None else (lease.handover, lease)


def _take(lease: Lease | None) -> Lease | None:
    if lease is not None:
        lease.take_up()
    return lease
