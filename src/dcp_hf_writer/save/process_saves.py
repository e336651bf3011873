"""Saves that torch's checkpointer process runs, as their parent process sees them."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import (
    CorruptCheckpointError,
    ExportError,
    SaveAbortedError,
    SaveTimeoutError,
)
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.save import save_log
from dcp_hf_writer.save.coordinator import nbytes_on_disk
from dcp_hf_writer.save.failure_explanations import OPEN
from dcp_hf_writer.save.finished_save import FinishedSave, SaveReports, outcome_of
from dcp_hf_writer.save.replace_target import read_json
from dcp_hf_writer.save.save_log import step_of
from dcp_hf_writer.storage.store_urls import is_url
from dcp_hf_writer.torch_seam.future_guard import FutureGuard, find_future, own_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.save.finished_save import ReportHook
    from dcp_hf_writer.save.store_access import StoreAccess
    from dcp_hf_writer.staging.slab import Handover, Lease

_log = logging.getLogger(__name__)


def guard_process_save(
    lease: Lease,
    handover: Handover,
    *,
    target: str,
    subdir: str,
    stores: StoreAccess,
    report_to: tuple[ReportHook, ...] = (),
) -> None:
    """Guard the future of a save that a checkpointer process runs; called as the save is sent.

    Args:
        lease: The turn of the save; released when the save ends.
        handover: What staging passes to the save.
        target: Path of the checkpoint.
        subdir: Directory of the export within the checkpoint.
        stores: How to reach the store of a checkpoint whose path is a URL.
        report_to: Functions of the user that get the report of the save, on rank 0.

    Raises:
        UnsupportedTorchError: If the future cannot be found.
    """
    future = find_future(is_async=True)
    assert future is not None
    rank = 0 if handover.world is None else handover.world.rank

    reports = SaveReports(report_to if rank == 0 else ())

    def told(error: BaseException) -> BaseException:
        if isinstance(error, ExportError) and rank == 0:
            published(error)
        save_log.log_failed(target, rank, error)
        reports.note(_finished(handover, target, error))
        reports.tell()
        return error

    def published(error: BaseException | None = None) -> None:
        found = _log_published(handover, target, subdir, stores)
        reports.note(_finished(handover, target, error, found))

    def end() -> None:
        lease.release()
        reports.tell()

    FutureGuard(
        future,
        deadline=handover.deadline,
        on_deadline=lambda: told(_at_deadline(target)),
        translate=lambda error: told(_explain(target, error)),
        on_end=end,
        on_result=lambda: published() if rank == 0 else None,
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
        hint="torch does not restart that process: a CheckpointManager does, at its next save; "
        "without one, restart the run, or save in a thread"
        if is_dead
        else None,
    )
    aborted.__cause__ = error
    return aborted


@dataclass(frozen=True, slots=True)
class _PublishedFacts:
    """What a published checkpoint tells about itself."""

    nbytes: tuple[int, int] = (0, 0)
    """Bytes of both halves; 0 if they cannot be read."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the coordinator spent in each phase."""


def _finished(
    handover: Handover,
    target: str,
    error: BaseException | None,
    found: _PublishedFacts | None = None,
) -> FinishedSave:
    """Make the report of a save; the seconds of its phases are in the manifest."""
    found = found or _PublishedFacts()
    return FinishedSave(
        path=target,
        step=step_of(target),
        outcome=outcome_of(error),
        error=None if error is None else f"{type(error).__name__}: {error}",
        dcp_nbytes=found.nbytes[0],
        hf_nbytes=found.nbytes[1],
        stall_s=handover.info.stall_s,
        total_s=time.monotonic() - handover.began,
        seconds={"stage": handover.info.stall_s, **found.seconds},
    )


def _log_published(
    handover: Handover, target: str, subdir: str, stores: StoreAccess
) -> _PublishedFacts:
    """Log a published save here: nobody configures the log of the checkpointer process."""
    try:
        found = _look(target, subdir, stores)
    except (OSError, SaveTimeoutError, CorruptCheckpointError) as error:
        _log.info("published %s; its size cannot be read: %s", target, error)
        return _PublishedFacts()
    stall_s, total_s = handover.info.stall_s, time.monotonic() - handover.began
    step = step_of(target)
    save_log.log_published(save_log.Published(target, step, found.nbytes, stall_s, total_s))
    return found


def _look(target: str, subdir: str, stores: StoreAccess) -> _PublishedFacts:
    """Look at a published checkpoint.

    Raises:
        OSError: If it cannot be listed or read.
        SaveTimeoutError: If its store does not answer.
        CorruptCheckpointError: If its manifest is not one.
    """
    if is_url(target):
        stored = stores.manifest_of(target)
        nbytes, seconds = _nbytes_listed(stored), dict(stored.seconds)
        apart = None if stored.other_half is None else stored.other_half.path
    else:
        manifest = read_json(os.path.join(target, MANIFEST_NAME)) or {}
        nbytes = nbytes_on_disk(target, subdir)
        seconds = manifest.get("timings", {}).get("coordinator", {})
        apart = (manifest.get("other_half") or {}).get("path")
    if apart is not None:
        nbytes = nbytes[0], _nbytes_of_export(apart, stores)
    return _PublishedFacts(nbytes, seconds)


def _nbytes_listed(stored: Manifest) -> tuple[int, int]:
    files = {} if stored.hf is None else stored.hf.files
    dcp_nbytes = sum(one.nbytes for one in stored.dcp.values())
    return dcp_nbytes, sum(one.nbytes for one in files.values())


def _nbytes_of_export(path: str, stores: StoreAccess) -> int:
    """Return the bytes of the weights of an export that lies apart from its DCP half."""
    if is_url(path):
        return _nbytes_listed((stores.of_export or stores).manifest_of(path))[1]
    return nbytes_on_disk(path, "")[1]
