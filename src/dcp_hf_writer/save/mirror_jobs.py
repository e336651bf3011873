"""Mirrors that this process uploads in the background, and those that a dead process left.

A mirror never slows or fails a save: it begins when the save is over, in a thread of its own. One
uploads at a time.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError, SaveAbortedError, SaveTimeoutError, StorageError
from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.mirror_record import MirrorRecord, mirror_records
from dcp_hf_writer.save.mirror_to import FinishedMirror, MirrorTo
from dcp_hf_writer.save.mirror_upload import MirrorUpload
from dcp_hf_writer.save.owner_process import Owner, mark_ended
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.paths_as_written import plain_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.save.attempt import Attempt

_log = logging.getLogger(__name__)

_HOST_BUDGET_NBYTES = 256 << 20
_LOOK_EVERY_S = 0.2


@dataclass(slots=True)
class MirrorJob:
    """The upload of one mirror, or one rank's part of it."""

    record: MirrorRecord
    to: MirrorTo
    host_budget_bytes: int = _HOST_BUDGET_NBYTES
    rank: int = 0
    world_size: int = 1
    error: BaseException | None = None
    """What went wrong; valid when `over` is set."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the upload has ended."""

    def run(self) -> FinishedMirror:
        """Upload, and report how it went. Raises nothing; see `error`."""
        began, upload = time.monotonic(), None
        try:
            patience = Patience(began + self.to.timeout_s)
            store = self.to.open()
            try:
                upload = MirrorUpload(
                    self.record,
                    store,
                    patience,
                    self.host_budget_bytes,
                    rank=self.rank,
                    world_size=self.world_size,
                )
                self._upload(upload)
            finally:
                store.close()
        except BaseException as error:  # noqa: BLE001 - of a thread, so it is kept and logged
            self.error = error
        finally:
            mark_ended(self.record.save_id)
        nbytes = 0 if upload is None else upload.sent_nbytes
        finished = self._finished(nbytes, time.monotonic() - began)
        self._tell(finished)
        self.over.set()
        return finished

    def _upload(self, upload: MirrorUpload) -> None:
        try:
            upload.run()
        except BaseException:
            if self.rank == 0:
                upload.give_up()
            raise
        if self.rank == 0:
            self.record.remove()

    def _finished(self, nbytes: int, total_s: float) -> FinishedMirror:
        error = self.error
        return FinishedMirror(
            path=self.record.target,
            url=self.record.url,
            outcome="published" if error is None else "failed",
            error=None if error is None else f"{type(error).__name__}: {error}",
            nbytes=nbytes,
            total_s=total_s,
        )

    def _tell(self, finished: FinishedMirror) -> None:
        if finished.error is not None:
            _log.error(
                "the mirror %s of %s is not published: %s; the local checkpoint is not affected, "
                "and the next process goes on with the mirror",
                *(finished.url, finished.path, finished.error),
            )
        elif self.rank == 0:
            _log.info(
                "published the mirror %s of %s: this process sent %d bytes in %.1f s",
                *(finished.url, finished.path, finished.nbytes, finished.total_s),
            )
        if self.rank != 0:
            return
        if finished.error is not None:
            self._note_error(finished.error)
        if self.to.report_to is not None:
            try:
                self.to.report_to(finished)
            except Exception:  # noqa: BLE001 - a dashboard must not cost a mirror
                _log.exception("report_to of the mirror raised an error for %s", finished.path)

    def _note_error(self, text: str) -> None:
        """Write the error into the record, for other ranks and processes."""
        record = self.record.read_again()
        # Another process may have gone on with it meanwhile.
        if record is None or record.owner != Owner.me():
            return
        try:
            MirrorRecord(record.save_id, record.target, record.url, record.owner, text).write()
        except StorageError as error:
            _log.warning("could not note the error of the mirror in %s: %s", record.path, error)


class MirrorJobs:
    """The mirrors of this process. Thread-safe; a forked child starts with none."""

    def __init__(self) -> None:
        """Start with none."""
        self.reset()

    def reset(self) -> None:
        """Forget all; the threads of the parent do not exist in a forked child."""
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._jobs: list[MirrorJob] = []
        self._threads: list[tuple[threading.Thread, float]] = []
        """Threads that upload, each with the seconds that the end of the process waits for it."""
        self._waits_at_exit = False

    def start(self, job: MirrorJob) -> None:
        """Upload in a thread of its own, after the mirrors that began before."""
        self._note(job)
        thread = threading.Thread(target=self._run, args=(job,), name="dcp-hf-mirror", daemon=True)
        with self._lock:
            self._threads = [one for one in self._threads if one[0].is_alive()]
            thread.start()
            self._threads.append((thread, job.to.exit_wait_s))
            if not self._waits_at_exit:
                self._waits_at_exit = True
                _before_exit(self._drain)

    def _note(self, job: MirrorJob) -> None:
        with self._lock:
            # Failed ones stay for `wait_for_mirrors`, until a newer try takes their place.
            self._jobs = [
                one
                for one in self._jobs
                if (one.error or not one.over.is_set()) and one.record.path != job.record.path
            ]
            self._jobs.append(job)

    def _run(self, job: MirrorJob) -> None:
        with self._turn:
            job.run()
            if job.rank == 0 and job.error is None:
                self._go_on_beside(job)

    def _go_on_beside(self, job: MirrorJob) -> None:
        """Upload what dead processes left unfinished beside a mirror, with its options."""
        parent = os.path.dirname(job.record.target)
        home = job.to.shown_url.rpartition("/")[0]
        for record in unfinished_mirrors(parent):
            if record.url.rpartition("/")[0] == home:
                left = job_for(record, job.to.beside(record.url.rpartition("/")[2]))
                self._note(left)
                left.run()

    def of(self, target: str) -> list[MirrorJob]:
        """Return the mirrors of a checkpoint that this process uploads, or has failed to."""
        with self._lock:
            return [one for one in self._jobs if one.record.target == target]

    def _drain(self) -> None:
        """Wait for the uploads as the process ends; say what is left."""
        with self._lock:
            threads = list(self._threads)
        began = time.monotonic()
        for thread, wait_s in threads:
            thread.join(max(0.0, began + wait_s - time.monotonic()))
        for job in self._jobs:
            if not job.over.is_set():
                _log.warning(
                    "the process ends before the mirror %s of %s is complete; resume_mirrors, or "
                    "the next writer with a mirror in that place, goes on with it",
                    *(job.record.url, job.record.target),
                )


MIRROR_JOBS = MirrorJobs()
"""The one object of this process."""

os.register_at_fork(after_in_child=MIRROR_JOBS.reset)


def _before_exit(act: Any) -> None:
    """Call a function as the interpreter ends, while executors still take work.

    At `atexit` they do not, and the client of a store needs them. `concurrent.futures` registers
    its own end by the same function, and the last one registered is called first.
    """
    register = getattr(threading, "_register_atexit", atexit.register)
    register(act)


def note_mirror(target: str, save_id: str, to: MirrorTo) -> None:
    """Write the record of a mirror, before the commit of its checkpoint (coordinator).

    A failure is logged: it costs the mirror the way to go on after a crash, and the save nothing.
    """
    record = MirrorRecord(save_id, target, to.shown_url, Owner.me())
    try:
        record.write()
    except StorageError as error:
        _log.warning("no process can go on with the mirror of %s after a crash: %s", target, error)


def start_mirror(attempt: Attempt, save_id: str, to: MirrorTo, *, host_budget_bytes: int) -> None:
    """Begin to upload the checkpoint of a save that has ended, if it was committed (all ranks).

    Args:
        attempt: The save.
        save_id: Its id.
        to: Where the mirror goes.
        host_budget_bytes: Memory for the parts on the way.
    """
    target = StagingDirectory.of(attempt.target, save_id).target
    record = MirrorRecord(save_id, target, to.shown_url, Owner.me())
    if not record.is_committed():
        if attempt.member.is_coordinator:
            record.remove()
        return
    rank = 0 if attempt.member.is_coordinator else attempt.rank
    if rank == 0 and not attempt.member.is_coordinator:
        # Another rank coordinates, and acts as rank 0 of the mirror.
        return
    job = MirrorJob(record, to, host_budget_bytes, rank, attempt.member.world_size)
    try:
        MIRROR_JOBS.start(job)
    except RuntimeError as error:
        # No thread can be started while the interpreter ends.
        _log.warning("the mirror of %s is left to the next process: %s", target, error)


def unfinished_mirrors(parent: str) -> list[MirrorRecord]:
    """Return the mirrors beside the checkpoints of a directory that no process uploads any more.

    Removes the records of checkpoints that are gone, or were never committed.
    """
    found = []
    try:
        records = mirror_records(parent)
    except OSError as error:
        _log.warning("cannot look for unfinished mirrors in %s: %s", parent, error.strerror)
        return []
    for record in records:
        # A record with an error has an owner that has given up. A record of this process without
        # one belongs to a save that is not over, or to an upload that runs or waits for its turn.
        is_mine = record.owner == Owner.me()
        if record.error is None and (is_mine or record.has_dead_owner() is False):
            continue
        if record.is_committed():
            found.append(record)
        else:
            _log.warning("%s has no checkpoint any more, so its mirror is dropped", record.target)
            record.remove()
    return found


def job_for(record: MirrorRecord, to: MirrorTo) -> MirrorJob:
    """Make the job that goes on with an unfinished mirror, and note that this process does."""
    mine = record.mine()
    try:
        mine.write()
    except StorageError as error:
        _log.warning("could not note who goes on with the mirror of %s: %s", mine.target, error)
    return MirrorJob(mine, to)


def resume_mirrors(
    root: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float = 7200,
) -> list[FinishedMirror]:
    """Upload the mirrors that dead processes left unfinished, and those that failed.

    Call it in one process, for instance when a job starts again; it returns when all are over. A
    writer with a mirror does the same for its own place, after its first save.

    Args:
        root: Directory that holds the local checkpoints.
        storage_options: Options of the URLs, as fsspec takes them: a record holds no credentials.
        timeout_s: Deadline of each upload in seconds.

    Returns:
        What became of each; empty if there was nothing to do. Failures are in the list and the log.

    Raises:
        ConfigError: If an option cannot be used as given.
    """
    parent = os.path.realpath(plain_path(root))
    return [
        job_for(record, MirrorTo(record.url, storage_options, timeout_s=timeout_s)).run()
        for record in unfinished_mirrors(parent)
    ]


def wait_for_mirrors(path: str, *, timeout_s: float) -> None:
    """Wait until the mirror of a checkpoint is published; returns at once if none is unfinished.

    Args:
        path: The local checkpoint, whose save is over.
        timeout_s: How long to wait, in seconds.

    Raises:
        CheckpointError: What kept the mirror from being published.
        SaveAbortedError: If the process that uploaded it is dead, or another process failed.
        SaveTimeoutError: If it is not published in time.
    """
    until = time.monotonic() + timeout_s
    target = StagingDirectory.of(path, "").target
    while True:
        for job in MIRROR_JOBS.of(target):
            if not job.over.wait(max(0.0, until - time.monotonic())):
                raise _not_in_time(target)
            if job.error is not None:
                raise _explained(job)
        record = _record_of(target)
        if record is None:
            return
        # This process may begin its upload a moment after the end of the save.
        is_dead = record.owner != Owner.me() and record.has_dead_owner()
        if record.error is not None or is_dead:
            raise _left(record)
        if time.monotonic() > until:
            raise _not_in_time(target)
        time.sleep(_LOOK_EVERY_S)


def _record_of(target: str) -> MirrorRecord | None:
    try:
        records = mirror_records(os.path.dirname(target))
    except FileNotFoundError:
        return None
    return next((one for one in records if one.target == target), None)


def _explained(job: MirrorJob) -> BaseException:
    if isinstance(job.error, CheckpointError):
        return job.error
    return SaveAbortedError(
        "the mirror was not published",
        path=job.record.url,
        found=f"{type(job.error).__name__}: {job.error}",
    )


def _left(record: MirrorRecord) -> SaveAbortedError:
    return SaveAbortedError(
        "the mirror was not published",
        path=record.url,
        found=record.error or f"process {record.owner.pid} on {record.owner.host} is gone",
        hint=f"resume_mirrors({os.path.dirname(record.target)!r}) goes on with it",
    )


def _not_in_time(target: str) -> SaveTimeoutError:
    return SaveTimeoutError(
        "the mirror was not published in time",
        path=target,
        hint="its upload goes on; wait again, or raise timeout_s",
    )
