"""The errors that the future of a failed save raises: they name the rank and the cause."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer.errors import CheckpointError, SaveAbortedError, SaveTimeoutError
from dcp_hf_writer.save import save_log
from dcp_hf_writer.save.rank_progress import MEETING, POST_MORTEM_S, Progress, lost_ranks_error
from dcp_hf_writer.torch_seam.calls_in_time import call_in_time
from dcp_hf_writer.torch_seam.failed_steps import call_when_a_step_fails
from dcp_hf_writer.torch_seam.future_guard import FutureGuard, find_future, own_error
from dcp_hf_writer.torch_seam.save_world import PROBLEM, WAIT_HINT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.checkpoint.utils import _DistWrapper

    from dcp_hf_writer.errors import RankLostError
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.save_context import PlaceOfSave
    from dcp_hf_writer.staging.slab import Lease
    from dcp_hf_writer.torch_seam.save_world import SaveWorld

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


def guard_save(attempt: Attempt, *, anchor: _DistWrapper | None, is_async: bool) -> None:
    """Guard the future of the save that the calling thread runs.

    A synchronous save has no future. Its resources are released when a step of it fails, or when
    `anchor` is freed with torch's stack frames, or at interpreter exit.

    Args:
        attempt: The save.
        anchor: The ranks of the save, an object that lives as long as the save; `None` if the save
            is refused.
        is_async: Whether the save must have a future.

    Raises:
        UnsupportedTorchError: If the save must have a future, and none can be found.
    """
    future = find_future(is_async=is_async)
    if anchor is not None:
        weakref.finalize(anchor, attempt.end)
    if future is None:
        if anchor is None:
            attempt.end()
        else:
            call_when_a_step_fails(anchor, attempt.end)
        return
    running = attempt.context.running
    guard = FutureGuard(
        future,
        deadline=attempt.context.deadline,
        on_deadline=lambda: _seen(attempt, _at_deadline(attempt)),
        translate=lambda error: _seen(attempt, _explain(attempt, error)),
        on_end=attempt.end,
        look=lambda: _seen_or_none(attempt, _while_running(attempt)),
        is_running=(lambda: True) if running is None else running.is_running,
        has_raised=(lambda _: True) if running is None else running.has_raised,
    )
    attempt.watch(guard.stop)


def explain_broken_exchange(attempt: Attempt, error: BaseException) -> CheckpointError:
    """Return the error for a save whose ranks could not exchange bytes; the save is given up.

    Args:
        attempt: The save.
        error: What gloo, the store or the wait raised.
    """
    is_late = attempt.context.left_s() < _SKEW_S
    found = _at_deadline(attempt) if is_late else _explain(attempt, error)
    attempt.give_up()
    if isinstance(found, CheckpointError):
        return found
    return SaveAbortedError(
        "another rank failed while the ranks exchanged bytes",
        rank=attempt.rank,
        phase=attempt.phase,
        path=attempt.target,
        found=f"{type(error).__name__}: {error}",
        hint="look at the errors of the other ranks",
    )


def explain_failed_ranks(
    attempt: Attempt, failed: Sequence[str], gone: Sequence[str], *, round_name: str
) -> CheckpointError:
    """Return the error for a save in which ranks ended that this one waits for.

    The save is given up. Nobody asks the other ranks: some of them may not take part in the round.

    Args:
        attempt: The save.
        failed: Ranks that have failed, as text.
        gone: Ranks whose process is gone, as text.
        round_name: What follows "failed before" in the error; see `wait_for_ranks`.
    """
    attempt.give_up()
    outcome = _outcome_at(attempt, attempt.phase)
    if not failed:
        return _lost(attempt, gone, phase=attempt.phase, outcome=outcome)
    return SaveAbortedError(
        "another rank failed while this one waited for it",
        rank=attempt.rank,
        phase=attempt.phase,
        path=attempt.target,
        found=f"{', '.join((*failed, *gone))} failed before {round_name}; {outcome}",
        hint="look at the errors of the other ranks",
    )


def check_world(lease: Lease, world: SaveWorld, *, target: str) -> None:
    """Check that the process group of a save is still there; called when the save begins.

    If it is not, the save ends here, before it uses another group. The other ranks may still have
    theirs: a record in the store tells them why this rank is missing.

    Raises:
        SaveAbortedError: If the process group was destroyed.
    """
    try:
        world.check_before(target=target)
    except SaveAbortedError as error:
        _leave_unbegun(lease, world, error, target=target)
        raise


def watch_pending(lease: Lease, world: SaveWorld, *, target: str) -> None:
    """Watch a save that has a group of its own until it begins.

    If that group is gone, torch raises an error of its own before it calls any method of ours.
    Then this rank still has to tell the others, and the save has to end.
    """

    def watch() -> None:
        until = time.monotonic() + _PENDING_S
        while lease.is_pending and time.monotonic() < until:
            # Nearly all saves begin at once. Then this thread ends, too.
            time.sleep(_BEGUN_S)
        while lease.is_pending:
            if world.is_lost():
                error = world.lost(target=target, phase="plan", outcome="not committed")
                _leave_unbegun(lease, world, error, target=target)
                return
            time.sleep(_PENDING_S)

    threading.Thread(target=watch, name="dcp-hf-pending", daemon=True).start()


def _leave_unbegun(lease: Lease, world: SaveWorld, error: Exception, *, target: str) -> None:
    """End a save that never began, because this process destroyed its group."""
    lease.release()
    save_log.log_failed(target, world.rank, error)
    MEETING.next_count()
    _tell_left(world)


def _tell_left(world: SaveWorld) -> None:
    """Tell the ranks that still have the process group why this rank is missing."""
    _ask(lambda: MEETING.leave(world, PROBLEM), otherwise=None)


# Seconds between two looks at a save that has not begun; nearly all begin before the first.
_PENDING_S = 1.0
_BEGUN_S = 0.02
# The store or the storage itself may hang: how long to wait for an answer of either.
_ASK_S = 2.0
# The other ranks began a little later, so their deadlines pass up to this much later.
_SKEW_S = 1.0

OPEN = "outcome open: only the path tells whether the checkpoint is there"
_STORE_IS_SILENT: Sequence[str] = ("the host of the store, usually rank 0",)


def _seen(attempt: Attempt, error: BaseException) -> BaseException:
    """Log the error of a save, for callers that never look at the future; return it."""
    save_log.log_failed(attempt.target, attempt.rank, error)
    attempt.note_outcome(error, now=True)
    return error


def _seen_or_none(attempt: Attempt, error: BaseException | None) -> BaseException | None:
    return None if error is None else _seen(attempt, error)


def _at_deadline(attempt: Attempt) -> BaseException:
    may_commit = not attempt.give_up()
    phase = attempt.phase
    # One question, because a store that hangs takes the whole time limit of each.
    nothing: tuple[str | None, Sequence[str]] = (None, _STORE_IS_SILENT)
    left, silent = _ask(lambda: _at_deadline_of(attempt, phase), otherwise=nothing)
    if left is not None:
        return _left_error(attempt, phase, left)
    # The coordinator cannot commit before every rank has reported what it wrote ("written").
    is_open = may_commit or (not attempt.member.is_coordinator and phase == "written")
    outcome = _outcome_of(attempt) if is_open else "not committed"
    if silent:
        return _lost(attempt, silent, phase=phase, outcome=outcome)
    msg = "the deadline of the save passed"
    return SaveTimeoutError(
        msg,
        rank=attempt.rank,
        phase=phase,
        path=attempt.target,
        expected=f"done within {attempt.context.deadline - attempt.context.began:.0f} s",
        found=outcome,
        hint="raise timeout_s, or find out what slows the storage down",
    )


def _explain(attempt: Attempt, error: BaseException) -> BaseException:
    phase = attempt.phase
    own, is_lost = own_error(error), attempt.context.world.is_lost()
    if is_lost:
        _tell_left(attempt.context.world)
        own = own or attempt.context.refusal
    if own is not None:
        return own
    if is_lost:
        return _group_destroyed(attempt, phase, error)
    if attempt.member.rendezvous is None or isinstance(error, CheckpointException):
        return error
    # The error of a broken collective names an address at best. The records in the store tell which
    # ranks went silent.
    attempt.give_up()
    wait_s = min(POST_MORTEM_S, attempt.context.left_s())
    silent = _ask(
        lambda: _silent_after_failure(attempt, wait_s=wait_s),
        otherwise=_STORE_IS_SILENT,
        limit_s=wait_s + _ASK_S,
    )
    told = _left_by_others(attempt, phase)
    if told is not None:
        told.__cause__ = error
        return told
    if not silent:
        return error
    lost = _lost(attempt, silent, phase=phase, outcome=_outcome_at(attempt, phase))
    lost.__cause__ = error
    return lost


def _group_destroyed(attempt: Attempt, phase: str, error: BaseException) -> BaseException:
    """Return the error for a process group that this process destroyed."""
    attempt.give_up()
    outcome = _outcome_at(attempt, phase)
    lost = attempt.context.world.lost(target=attempt.target, phase=phase, outcome=outcome)
    lost.__cause__ = error
    return lost


def _while_running(attempt: Attempt) -> BaseException | None:
    """Return the error for a save that another rank has left; `None` if it may go on.

    A collective may wait for that rank until the timeout of the process group: gloo keeps the
    connections of a destroyed group for as long as someone holds the group.
    """
    left = _left_by_others(attempt, attempt.phase)
    if left is not None:
        attempt.give_up()
    return left


def _left_by_others(attempt: Attempt, phase: str) -> SaveAbortedError | None:
    """Return the error for a save that another rank has left; `None` if none said so."""
    found = _ask(lambda: _left_record(attempt), otherwise=None)
    return None if found is None else _left_error(attempt, phase, found)


def _left_record(attempt: Attempt) -> str | None:
    """Return what a rank that left the save wrote to the store; `None` if none did."""
    records = attempt.member.rendezvous
    return None if records is None else records.left(attempt.member.count)


def _left_error(attempt: Attempt, phase: str, found: str) -> SaveAbortedError:
    return SaveAbortedError(
        "another rank left the save",
        rank=attempt.rank,
        phase=phase,
        path=attempt.target,
        found=f"{found}; {_outcome_at(attempt, phase)}",
        hint=WAIT_HINT,
    )


def _lost(attempt: Attempt, silent: Sequence[str], *, phase: str, outcome: str) -> RankLostError:
    save_id = attempt.directory.save_id if attempt.directory is not None else None
    return lost_ranks_error(
        silent,
        rank=attempt.rank,
        phase=phase,
        target=attempt.target,
        save_id=save_id,
        outcome=outcome,
    )


def _at_deadline_of(attempt: Attempt, phase: str) -> tuple[str | None, Sequence[str]]:
    """Return what a rank that left the save wrote, and the silent ranks if none left."""
    left = _left_record(attempt)
    return left, () if left is not None else _silent_at_deadline(attempt, phase)


def _silent_at_deadline(attempt: Attempt, phase: str) -> Sequence[str]:
    if attempt.member.rendezvous is None:
        return ()
    behind = attempt.member.rendezvous.silent_ranks(
        Progress(attempt.member.count, phase, "", 0), wait_s=0.0
    )
    # If all ranks are in the same phase, the lost ranks are those that do not report the deadline.
    return behind or _silent_after_failure(attempt, wait_s=_SKEW_S)


def _silent_after_failure(attempt: Attempt, *, wait_s: float) -> Sequence[str]:
    if attempt.member.rendezvous is None:
        return ()
    attempt.post("failed")
    mine = Progress(attempt.member.count, "failed", "", 0)
    return attempt.member.rendezvous.silent_ranks(mine, wait_s=wait_s)


def _outcome_at(attempt: Attempt, phase: str) -> str:
    # The coordinator cannot commit before every rank has reported what it wrote.
    if attempt.member.is_coordinator and attempt.give_up():
        return "not committed"
    return _outcome_of(attempt) if phase in {"written", "finish"} else "not committed"


def _outcome_of(attempt: Attempt) -> str:
    return _ask(lambda: _outcome(attempt.directory), otherwise=OPEN)


def _outcome(place: PlaceOfSave | None) -> str:
    if place is not None and place.is_committed():
        return "committed: the checkpoint is visible"
    return OPEN


def _ask(
    question: Callable[[], _Answer], *, otherwise: _Answer, limit_s: float = _ASK_S
) -> _Answer:
    """Return the answer to a question, or `otherwise` if the store or the storage hangs or fails.

    Args:
        question: Asks the store or the storage; runs in a thread of its own.
        otherwise: Returned when there is no answer.
        limit_s: How long to wait for the answer, in seconds.
    """
    try:
        return call_in_time(question, limit_s=limit_s)
    except (RuntimeError, TimeoutError) as error:
        # torch raises these when the store fails; `Attempt.post` raises a TimeoutError then.
        _log.debug("no answer: %s", error)
        return otherwise
