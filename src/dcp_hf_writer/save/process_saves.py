"""Saves that torch's checkpointer process runs, as their parent process sees them."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ExportError, SaveAbortedError, SaveTimeoutError
from dcp_hf_writer.save import save_log
from dcp_hf_writer.save.coordinator import nbytes_on_disk, step_of
from dcp_hf_writer.save.failure_explanations import OPEN
from dcp_hf_writer.torch_seam.future_guard import FutureGuard, find_future, own_error

if TYPE_CHECKING:
    from dcp_hf_writer.staging.slab import Handover, Lease

_log = logging.getLogger(__name__)


def guard_process_save(lease: Lease, handover: Handover, *, target: str, subdir: str) -> None:
    """Guard the future of a save that a checkpointer process runs; called as the save is sent.

    Args:
        lease: The turn of the save; released when the save ends.
        handover: What staging passes to the save.
        target: Path of the checkpoint.
        subdir: Directory of the export within the checkpoint.

    Raises:
        UnsupportedTorchError: If the future cannot be found.
    """
    future = find_future(is_async=True)
    assert future is not None
    rank = 0 if handover.world is None else handover.world.rank

    def told(error: BaseException) -> BaseException:
        if isinstance(error, ExportError) and rank == 0:
            _log_published(handover, target, subdir)
        save_log.log_failed(target, rank, error)
        return error

    FutureGuard(
        future,
        deadline=handover.deadline,
        on_deadline=lambda: told(_at_deadline(target)),
        translate=lambda error: told(_explain(target, error)),
        on_end=lease.release,
        on_result=lambda: _log_published(handover, target, subdir) if rank == 0 else None,
    )


def _at_deadline(target: str) -> SaveTimeoutError:
    msg = "the checkpointer process did not finish the save by its deadline"
    return SaveTimeoutError(
        msg,
        phase="write",
        path=target,
        expected="an answer by the deadline",
        found=OPEN,
        hint="the process may be waiting for the storage; training can go on",
    )


def _explain(target: str, error: BaseException) -> BaseException:
    own = own_error(error)
    if own is not None or not isinstance(error, RuntimeError):
        return own or error
    is_dead = "process is dead" in str(error)
    msg = "the checkpointer process did not finish the save"
    aborted = SaveAbortedError(
        msg,
        phase="write",
        path=target,
        found=f"{error}; {OPEN}",
        hint="torch does not restart that process: restart the run, or save in a thread"
        if is_dead
        else None,
    )
    aborted.__cause__ = error
    return aborted


def _log_published(handover: Handover, target: str, subdir: str) -> None:
    """Log a published save here: nobody configures the log of the checkpointer process."""
    try:
        nbytes = nbytes_on_disk(target, subdir)
    except OSError as error:
        _log.info("published %s; its size cannot be read: %s", target, error)
        return
    stall_s, total_s = handover.info.stall_s, time.monotonic() - handover.began
    save_log.log_published(save_log.Published(target, step_of(target), nbytes, stall_s, total_s))
