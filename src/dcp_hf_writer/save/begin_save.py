"""The start of a save: find torch's planner, take over the staged copy, guard the future."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.save.attempt import LIVE, Attempt
from dcp_hf_writer.save.failure_explanations import guard_save
from dcp_hf_writer.save.save_context import SaveContext
from dcp_hf_writer.staging.staged_state_dict import failure_in
from dcp_hf_writer.staging.stager import STAGER
from dcp_hf_writer.torch_seam.caller_frames import find_save
from dcp_hf_writer.torch_seam.missing_group import check_group_is_there

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.utils import _DistWrapper

    from dcp_hf_writer.staging.slab import Handover, Lease


def begin_save(target: str, *, timeout_s: float, give_back: Callable[[], None]) -> Attempt:
    """Begin the save that the calling thread runs, and guard its future.

    If the save cannot go on, the reason becomes `SaveContext.refusal`. The writer raises it later,
    in a step where torch passes the error on to all ranks.

    Args:
        target: Path of the checkpoint.
        timeout_s: Seconds from now to the deadline, if staging did not set one.
        give_back: Releases what was staged if the save or its staged copy cannot be found.

    Raises:
        UnsupportedTorchError: If the save is asynchronous, and its future cannot be found.
    """
    anchor: _DistWrapper | None = None
    handover: Handover | None = None
    lease: Lease | None = None
    try:
        check_group_is_there()
        save = find_save()
        anchor, refusal = save.ranks, failure_in(save.given)
        handover, lease = STAGER.handover_of(save.given)
        if lease is not None:
            lease.take_up()
    except CheckpointError as error:
        lease, refusal = None, error
        give_back()
    context = SaveContext(
        target,
        time.monotonic() + timeout_s if handover is None else handover.deadline,
        staged=None if handover is None else handover.info,
        refusal=refusal,
    )
    attempt = Attempt(context, lease=lease)
    LIVE.add(attempt)
    is_async = lease is not None and lease.stager is not context.thread
    try:
        guard_save(attempt, anchor=anchor, is_async=is_async)
    except CheckpointError:
        attempt.end()
        raise
    return attempt
