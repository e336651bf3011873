"""What the future of a save is given when it fails: errors that name the rank and the cause."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer._coordinator import committed_save_id
from dcp_hf_writer._rendezvous import POST_MORTEM_S, Progress, lost_ranks_error
from dcp_hf_writer._watchdog import FutureGuard, current_future, own_error
from dcp_hf_writer.errors import SaveTimeoutError

if TYPE_CHECKING:
    from dcp_hf_writer._attempt import Attempt
    from dcp_hf_writer._slab import Lease


def guard_save(attempt: Attempt) -> None:
    """Guard the future of the save that the calling thread runs; a synchronous one has none."""
    future = current_future()
    if future is None:
        return

    FutureGuard(
        future,
        deadline=attempt.deadline,
        on_deadline=lambda: _at_deadline(attempt),
        translate=lambda error: _explain(attempt, error),
        on_end=attempt.end,
    )


def guard_process_save(lease: Lease | None, *, deadline: float, target: str) -> None:
    """Guard the future of a save that a checkpointer process does; called where it is sent."""
    future = current_future()
    if future is None:
        return

    def at_deadline() -> BaseException:
        msg = "the checkpointer process did not finish the save by its deadline"
        return SaveTimeoutError(
            msg,
            phase="write",
            path=target,
            expected="an answer by the deadline",
            found=_outcome(target, None),
            hint="the process may be stuck in the storage; training can go on",
        )

    FutureGuard(
        future,
        deadline=deadline,
        on_deadline=at_deadline,
        translate=lambda error: own_error(error) or error,
        on_end=lambda: None if lease is None else lease.release(),
    )


def _at_deadline(attempt: Attempt) -> BaseException:
    may_commit = not attempt.give_up()
    save_id = attempt.directory.save_id if attempt.directory is not None else None
    silent = _silent_ranks(attempt, wait_s=0.0)
    if silent and not may_commit:
        return lost_ranks_error(
            silent, rank=attempt.rank, phase=attempt.phase, target=attempt.target, save_id=save_id
        )
    msg = "the deadline of the save passed"
    return SaveTimeoutError(
        msg,
        rank=attempt.rank,
        phase=attempt.phase,
        path=attempt.target,
        expected=f"done within {attempt.deadline - attempt.began:.0f} s",
        found=_outcome(attempt.target, save_id) if may_commit else "not committed",
        hint="raise timeout_s, or find what slows the storage down",
    )


def _outcome(target: str, save_id: str | None) -> str:
    if save_id is not None and committed_save_id(target) == save_id:
        return "committed: the checkpoint is visible"
    return "outcome open: the path alone tells whether the checkpoint is there"


def _explain(attempt: Attempt, error: BaseException) -> BaseException:
    own = own_error(error)
    if own is not None:
        return own
    if attempt.rendezvous is None or isinstance(error, CheckpointException):
        return error
    # A broken collective names an address at best: ask the records who went silent.
    attempt.give_up()
    attempt.post("failed")
    silent = _silent_ranks(attempt, wait_s=min(POST_MORTEM_S, attempt.left_s()))
    if not silent:
        return error
    save_id = attempt.directory.save_id if attempt.directory is not None else None
    lost = lost_ranks_error(
        silent, rank=attempt.rank, phase=attempt.phase, target=attempt.target, save_id=save_id
    )
    lost.__cause__ = error
    return lost


def _silent_ranks(attempt: Attempt, *, wait_s: float) -> list[str]:
    if attempt.rendezvous is None:
        return []
    mine = Progress(attempt.count, attempt.phase, "", 0)
    try:
        return attempt.rendezvous.silent_ranks(mine, wait_s=wait_s)
    except RuntimeError as error:
        return [f"the host of the store, {type(error).__name__} at {time.strftime('%X')}"]
