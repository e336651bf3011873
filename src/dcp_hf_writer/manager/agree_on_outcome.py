"""How the ranks agree on the outcome of a save, so that all of them go on alike.

Each rank tells the coordinator how its part ended. The coordinator looks at the storage, which
alone decides whether the save is committed, and tells the verdict to all.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer.errors import (
    CheckpointError,
    ExportError,
    RankLostError,
    SaveAbortedError,
    SaveTimeoutError,
)
from dcp_hf_writer.manager.rank_messages import sendable_error
from dcp_hf_writer.torch_seam.future_guard import own_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.manager.rank_messages import Messages

_log = logging.getLogger(__name__)

SETTLE_S = 10.0
"""How long the other ranks may take to end a save after it ended on the coordinator."""
AFTER_DEADLINE_S = 10.0
"""How long after its deadline a save may take to end its future."""

_POLL_S = 0.02
_MAX_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one try at a save; the same on every rank."""

    save_id: str | None
    """Id of the committed save; `None` if nothing was committed."""
    error: BaseException | None = None
    """What went wrong; with a `save_id`, the DCP half is committed all the same."""
    pause_s: float | None = None
    """Seconds until the next try; `None` if there is none."""
    is_group_lost: bool = False
    """Whether the process group of the save cannot be used again."""
    nbytes: int = 0
    """Size of the checkpoint in bytes; 0 if nothing was committed."""

    @property
    def is_committed(self) -> bool:
        """Whether the DCP half is committed."""
        return self.save_id is not None


@dataclass(frozen=True, slots=True)
class Committed:
    """What the storage shows of a committed save."""

    save_id: str
    """Its id."""
    nbytes: int
    """Size of its files."""


def error_of(future: Future[Any]) -> BaseException | None:
    """Return what a finished save raised on this rank, unwrapped; `None` if it succeeded."""
    try:
        error = future.exception(timeout=0)
    except (CancelledError, NotDone) as problem:
        return problem
    if error is None:
        return None
    own = own_error(error)
    if own is None and isinstance(error, CheckpointException):
        # torch's wrapper is no Exception: `except Exception` in a trainer would not see it.
        rank, (inner, _) = min(error.failures.items())
        return _ours(inner, rank)
    return own or error


def _ours(error: BaseException, rank: int | None) -> CheckpointError:
    """Return an error of other code as one of this package."""
    if isinstance(error, CheckpointError):
        return error
    failed = CheckpointError(
        "the save failed", rank=rank, phase="write", found=f"{type(error).__name__}: {error}"
    )
    failed.__cause__ = error
    return failed


def breaks_group(error: BaseException | None) -> bool:
    """Whether a thread may still wait in the process group after this error."""
    if error is None:
        return False
    if isinstance(error, (SaveTimeoutError, SaveAbortedError)):
        return True
    # Errors of a broken collective are not ours; DCP passes on all others.
    return not isinstance(error, CheckpointError)


def agree(
    future: Future[Any],
    messages: Messages,
    *,
    key: str,
    deadline: float,
    look: Callable[[], Committed | None],
    pause: Callable[[BaseException], float | None],
    still_running: Callable[[], None],
) -> Verdict:
    """Wait until a save has ended, and agree on its outcome with the other ranks.

    Args:
        future: Future of the save.
        messages: Messages of the calling thread.
        key: Key of this try; the same on every rank.
        deadline: `time.monotonic()` by which the save ends.
        look: Asks the storage what this save committed; called on the coordinator.
        pause: Returns the seconds until the next try after an error; called on the coordinator.
        still_running: Called now and then while the save runs.
    """
    until = deadline + AFTER_DEADLINE_S
    verdict_key = f"{key}/verdict"
    try:
        if messages.world.is_coordinator:
            _wait(future, until, still_running)
            verdict = _decide(future, messages, key, look, pause)
            if not messages.world.is_alone:
                error = sendable_error(verdict.error, otherwise=RuntimeError)
                messages.put(verdict_key, replace(verdict, error=error))
        else:
            _wait(future, until, still_running, is_over=lambda: messages.has(verdict_key))
            if future.done():
                error = sendable_error(error_of(future), otherwise=RuntimeError)
                messages.put(f"{key}/result/{messages.world.rank}", error)
            left = max(until - time.monotonic(), 0) + SETTLE_S + AFTER_DEADLINE_S
            verdict = messages.take_from_coordinator(verdict_key, timeout_s=left, doing="finish")
    except RankLostError as lost:
        found, _ = _looked(look)
        return Verdict(
            None if found is None else found.save_id,
            lost,
            is_group_lost=True,
            nbytes=0 if found is None else found.nbytes,
        )
    return verdict


def _wait(
    future: Future[Any],
    until: float,
    still_running: Callable[[], None],
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    pause = _POLL_S
    while not future.done() and time.monotonic() < until and not is_over():
        try:
            future.exception(timeout=pause)
        except NotDone:
            still_running()
        except CancelledError:
            return
        pause = min(pause * 1.5, _MAX_POLL_S)


def _decide(
    future: Future[Any],
    messages: Messages,
    key: str,
    look: Callable[[], Committed | None],
    pause: Callable[[BaseException], float | None],
) -> Verdict:
    error = error_of(future)
    others, silent = _results(messages, key)
    error = error or next((one for one in others if one is not None), None)
    is_lost = bool(silent) or any(breaks_group(one) for one in (error, *others))
    found, refusal = _looked(look)
    error = error or refusal
    if found is not None and not isinstance(error, ExportError):
        if error is not None:
            _log.warning("the save is committed, although a rank reported: %s", error)
        error = None
    if silent:
        lost = _lost(silent, is_committed=found is not None)
        _log.warning("%s", lost)
        if found is None and not isinstance(error, CheckpointError):
            lost.__cause__, error = error, lost
    if found is None and error is None:
        error = SaveAbortedError(
            "the save reported success, but the checkpoint is not there",
            phase="finish",
            expected="a committed checkpoint",
            found="none",
            hint="someone removed it, or this rank sees another file system",
        )
    if found is not None:
        return Verdict(found.save_id, error, is_group_lost=is_lost, nbytes=found.nbytes)
    assert error is not None
    error = _ours(error, None)
    return Verdict(None, error, pause_s=None if is_lost else pause(error), is_group_lost=is_lost)


def _looked(look: Callable[[], Committed | None]) -> tuple[Committed | None, BaseException | None]:
    """Ask the storage; return why it does not answer, if it does not."""
    try:
        return look(), None
    except CheckpointError as error:
        return None, error


def _results(messages: Messages, key: str) -> tuple[list[BaseException | None], list[int]]:
    if messages.world.is_alone:
        return [], []
    ranks = range(1, messages.world.size)
    found = messages.collect(f"{key}/result", ranks, timeout_s=SETTLE_S)
    for rank in found:
        messages.drop(f"{key}/result/{rank}")
    silent = [rank for rank in ranks if rank not in found]
    return list(found.values()), silent


def _lost(silent: list[int], *, is_committed: bool) -> RankLostError:
    return RankLostError(
        "some ranks did not end the save",
        rank=0,
        phase="finish",
        expected="an answer from every rank",
        found=f"no answer from ranks {silent}; "
        + ("the checkpoint is committed" if is_committed else "not committed"),
        hint="look at the logs of these ranks",
    )
