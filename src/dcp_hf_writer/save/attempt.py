"""One attempt at one save: its deadline, its directory, and whether it may still commit."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import (
    RankLostError,
    SaveAbortedError,
    SaveTimeoutError,
    StagingBusyError,
)
from dcp_hf_writer.save.rendezvous import Progress, Rendezvous

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.errors import CheckpointError, ExportError
    from dcp_hf_writer.plan.encode_manifest import WholeFile
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.staging.slab import Lease
    from dcp_hf_writer.staging.stager import StagedInfo
    from dcp_hf_writer.storage.open_outputs import OpenFiles

_log = logging.getLogger(__name__)


_POLL_S = 0.01


class Attempt:
    """State of one save on one rank.

    The thread of the save works; a watchdog may give the save up from another thread. What decides
    is the lock in here: after `give_up` nothing is committed, and once `committing` began the
    watchdog can only say that the outcome is open.
    """

    def __init__(
        self,
        target: str,
        *,
        deadline: float,
        staged: StagedInfo | None,
        lease: Lease | None,
    ) -> None:
        """Begin; `staged` and `lease` are `None` for a synchronous save."""
        self.target = target
        self.deadline = deadline
        self.staged = staged
        self.lease = lease
        self.thread = threading.current_thread()
        self.began = time.monotonic()
        self.staging_error: CheckpointError | None = None
        self.rank = 0
        self.is_coordinator = True
        self.phase = "plan"
        self.rendezvous: Rendezvous | None = None
        self.count = 0
        self.directory: StagingDirectory | None = None
        self.global_plan: GlobalPlan | None = None
        self.files: OpenFiles | None = None
        self.whole_files: list[WholeFile] = []
        """Files of the export that the coordinator wrote in one piece."""
        self.export_error: ExportError | None = None
        """Why the export is left out, as far as the coordinator knows."""
        self.memory: dict[str, int] = {}
        """Number of the memory that each tensor of this rank is, by FQN."""
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._given_up = False
        self._committing = False
        self._ended = False

    def wait_until_over(self) -> None:
        """Wait for a save of the same writer that another thread runs.

        Raises:
            StagingBusyError: If it is not over by its deadline.
        """
        while not self.is_over:
            if time.monotonic() > self.deadline:
                msg = "an earlier save of this writer is still in flight"
                raise StagingBusyError(
                    msg, path=self.target, hint="its process group may have lost a rank"
                )
            time.sleep(_POLL_S)

    @property
    def is_over(self) -> bool:
        """Whether nothing runs any more for this attempt."""
        return self._ended or not self.thread.is_alive()

    def post(self, phase: str) -> None:
        """Enter a phase and tell the other ranks.

        Raises:
            RankLostError: If the store that carries the records is gone.
        """
        self.phase = phase
        if self.rendezvous is None:
            return
        progress = Progress(self.count, phase, socket.gethostname(), os.getpid())
        try:
            self.rendezvous.post(progress)
        except RuntimeError as error:
            msg = "the store of the process group does not answer"
            raise RankLostError(
                msg,
                rank=self.rank,
                phase=phase,
                path=self.target,
                found=f"{type(error).__name__}",
                hint="the process that hosts it, mostly rank 0, is gone; restart the run",
            ) from error

    def withdraw(self) -> None:
        """Take back the record of the save; what is committed does not hang on it."""
        if self.rendezvous is None:
            return
        try:
            self.rendezvous.withdraw(self.target)
        except RuntimeError as error:
            _log.warning("the record of the save stays in the store: %s", error)

    def left_s(self) -> float:
        """Return the seconds to the deadline, not below zero."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Raise if the save was given up, or its deadline has passed.

        Raises:
            SaveAbortedError: If it was given up.
            SaveTimeoutError: If the deadline has passed.
        """
        if self._given_up:
            msg = "the save was given up; this rank stops writing"
            raise SaveAbortedError(msg, rank=self.rank, phase=self.phase, path=self.target)
        if time.monotonic() > self.deadline:
            msg = "the deadline of the save passed"
            raise SaveTimeoutError(
                msg,
                rank=self.rank,
                phase=self.phase,
                path=self.target,
                hint="raise timeout_s, or find what slows the storage down",
            )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Enter the step that publishes; a save that was given up does not enter.

        Raises:
            SaveAbortedError: If it was given up.
            SaveTimeoutError: If the deadline has passed.
        """
        with self._lock:
            self.check()
            self._committing = True
        yield

    def give_up(self) -> bool:
        """Keep the attempt from committing; returns `False` if it is doing so already."""
        with self._lock:
            self._given_up = True
            return not self._committing

    def end(self) -> None:
        """Close and remove what the attempt holds; safe to call twice.

        A published directory has another name by now, so there is nothing to remove then.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if self.files is not None:
            self.files.abandon()
        if self.is_coordinator and self.directory is not None:
            self.directory.remove()
        if self.lease is not None:
            self.lease.release()
            # The slab may be replaced by a larger one now, and must not stay mapped through this.
            self.lease = None


_live: list[Attempt] = []
_live_lock = threading.Lock()


def register(attempt: Attempt) -> None:
    """Note an attempt, and end those of which no thread is left to do so.

    torch calls nothing on a storage writer when a save fails in planning or on another rank.
    """
    with _live_lock:
        over = [a for a in _live if a.is_over or a.thread is attempt.thread]
        _live[:] = [a for a in _live if a not in over] + [attempt]
    for old in over:
        old.end()
