"""One attempt at one save: how far it is, and what must be given back when it ends."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import (
    PlanningError,
    RankLostError,
    SaveAbortedError,
    SaveTimeoutError,
    StagingBusyError,
)
from dcp_hf_writer.save.commit_state import CommitState
from dcp_hf_writer.save.rendezvous import Progress
from dcp_hf_writer.save.save_context import Membership, SentFacts
from dcp_hf_writer.storage.output_fsync import OpenFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.plan.encode_manifest import WholeFile
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.save.save_context import RankView, SaveContext
    from dcp_hf_writer.staging.slab import Lease

_log = logging.getLogger(__name__)


_POLL_S = 0.01


class Attempt:
    """One save on one rank: what is fixed of it, how far it is, and what it holds.

    Each step of the save adds what it found, through a method; nothing is set from outside.
    """

    def __init__(self, context: SaveContext, *, lease: Lease | None = None) -> None:
        """Begin; `lease` is that of the staged copy, and ends with the save."""
        self.context = context
        self.member = Membership()
        """This rank's part; known from `enter` on."""
        self.sent = SentFacts()
        """Known when the local plan is sent."""
        self.phase = "plan"
        self.global_plan: GlobalPlan | None = None
        """What the coordinator planned."""
        self.are_facts_checked = False
        """Whether the coordinator has compared the facts of all ranks in the plan."""
        self.directory: StagingDirectory | None = None
        """Where the checkpoint is made; the coordinator's is removed at the end."""
        self.files: OpenFiles | None = None
        """Files of the save that are open."""
        self.whole_files: tuple[WholeFile, ...] = ()
        """Files of the export that the coordinator wrote in one piece."""
        self.export_error: ExportError | None = None
        """Why the export is left out, as far as this rank knows."""
        self.seconds: dict[str, float] = {}
        """Time spent by phase; `timed` adds to it."""
        self._view: RankView | None = None
        self._lease = lease
        self._state = CommitState()
        if context.staged is not None:
            self.seconds["stage"] = context.staged.stall_s
            self.seconds["stage wait"] = context.staged.waited_s

    @property
    def target(self) -> str:
        """Path of the checkpoint."""
        return self.context.target

    @property
    def rank(self) -> int:
        """Rank within the process group of the save."""
        return self.member.rank

    @property
    def view(self) -> RankView:
        """What this rank is to save.

        Raises:
            PlanningError: If torch did not set the save up, or it has ended.
        """
        if self._view is None:
            msg = "the save was not set up"
            raise PlanningError(msg, rank=self.rank, path=self.target)
        return self._view

    def enter(self, member: Membership) -> None:
        """Learn this rank's part, and tell the other ranks that it has come."""
        self.member = member
        self.post("plan")

    def see(self, view: RankView) -> None:
        """Note what this rank is to save."""
        self._view = view

    def send(self, facts: SentFacts) -> None:
        """Note what the local plan carries."""
        self.sent = facts

    def plan(self, plan: GlobalPlan, *, are_facts_checked: bool) -> None:
        """Note the global plan (coordinator)."""
        self.global_plan, self.are_facts_checked = plan, are_facts_checked

    def save_alone(self) -> None:
        """Note that no other rank takes part, whatever the group says."""
        self.member = replace(self.member, rendezvous=None)

    def work_in(self, directory: StagingDirectory, *, count: int | None = None) -> None:
        """Note where the checkpoint is made, and the coordinator's number of the save."""
        self.directory = directory
        if count is not None:
            self.member = replace(self.member, count=count)

    def open_files(self) -> OpenFiles:
        """Return the files of the save, which are abandoned if it does not close them."""
        if self.files is None:
            self.files = OpenFiles()
        return self.files

    def close_files(self) -> None:
        """Close the files of the save, all of which are durable."""
        if self.files is not None:
            self.files.close()
        self.files = None

    def begin_finish(self) -> None:
        """Enter the last phase, in which the coordinator alone works; it is not told to others."""
        self.phase = "finish"

    def add_whole_files(self, *files: WholeFile) -> None:
        """Note files of the export that were written in one piece."""
        self.whole_files += files

    def leave_out_export(self, error: ExportError) -> None:
        """Note why there is no export; the first reason counts."""
        self.export_error = self.export_error or error

    def wait_until_over(self) -> None:
        """Wait for a save of the same writer that another thread runs.

        Raises:
            StagingBusyError: If it is not over by its deadline.
        """
        while not self.is_over:
            if time.monotonic() > self.context.deadline:
                msg = "an earlier save of this writer is still in flight"
                raise StagingBusyError(
                    msg, path=self.target, hint="its process group may have lost a rank"
                )
            time.sleep(_POLL_S)

    @property
    def is_over(self) -> bool:
        """Whether nothing runs any more for this attempt."""
        return self._state.is_ended or not self.context.thread.is_alive()

    def post(self, phase: str) -> None:
        """Enter a phase and tell the other ranks.

        Raises:
            RankLostError: If the store that carries the records is gone.
        """
        self.phase = phase
        if self.member.rendezvous is None:
            return
        progress = Progress(self.member.count, phase, socket.gethostname(), os.getpid())
        try:
            self.member.rendezvous.post(progress)
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
        if self.member.rendezvous is None:
            return
        try:
            self.member.rendezvous.withdraw(self.target)
        except RuntimeError as error:
            _log.warning("the record of the save stays in the store: %s", error)

    def check(self) -> None:
        """Raise if the save was given up, or its deadline has passed.

        Raises:
            SaveAbortedError: If it was given up.
            SaveTimeoutError: If the deadline has passed.
        """
        if self._state.is_given_up:
            raise self._aborted()
        if time.monotonic() > self.context.deadline:
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
        self.check()
        if not self._state.begin_commit():
            raise self._aborted()
        yield

    def _aborted(self) -> SaveAbortedError:
        msg = "the save was given up; this rank stops writing"
        return SaveAbortedError(msg, rank=self.rank, phase=self.phase, path=self.target)

    def give_up(self) -> bool:
        """Keep the attempt from committing; returns `False` if it is doing so already."""
        return self._state.give_up()

    def end(self) -> None:
        """Close and remove what the attempt holds; safe to call twice.

        A published directory has another name by now, so there is nothing to remove then.
        """
        if not self._state.end():
            return
        if self.files is not None:
            self.files.abandon()
        if self.member.is_coordinator and self.directory is not None:
            self.directory.remove()
        if self._lease is not None:
            self._lease.release()
        # The slab may be replaced by a larger one now, and must not stay mapped through these.
        self._lease = self._view = None


class LiveAttempts:
    """The saves of this process that nothing has ended yet."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._attempts: list[Attempt] = []

    def add(self, attempt: Attempt) -> None:
        """Note an attempt, and end those of which no thread is left to do so.

        torch calls nothing on a storage writer when a save fails in planning or on another rank.
        """
        thread = attempt.context.thread
        with self._lock:
            over = [a for a in self._attempts if a.is_over or a.context.thread is thread]
            self._attempts = [a for a in self._attempts if a not in over] + [attempt]
        for old in over:
            old.end()


LIVE = LiveAttempts()
"""Those of this process: a thread that has ended may have served any writer."""
