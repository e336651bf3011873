"""One attempt at one save: how far it has come, and what it must give back when it ends."""

from __future__ import annotations

import logging
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
from dcp_hf_writer.save import save_log
from dcp_hf_writer.save.commit_state import CommitState
from dcp_hf_writer.save.finished_save import FinishedSave, SaveReports, outcome_of
from dcp_hf_writer.save.progress_heartbeat import ByteCount, HeartbeatWriter
from dcp_hf_writer.save.rank_progress import Progress
from dcp_hf_writer.save.save_context import Membership, SentFacts
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.output_fsync import OpenFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.plan.encode_manifest import WholeFile
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.save.save_context import PlaceOfSave, RankView, SaveContext
    from dcp_hf_writer.staging.slab import Lease

_log = logging.getLogger(__name__)


_POLL_S = 0.01

# Seconds for cleaning up a store after a failure, if the deadline leaves less.
_CLEAN_UP_S = 4.0
LONGEST_CLEAN_UP_S = 30.0
"""Most seconds for that."""


class Attempt:
    """One save on one rank: its fixed facts, its progress, and the resources it holds.

    Each step of the save records its results by calling a method; no caller sets an attribute.
    """

    def __init__(self, context: SaveContext, *, lease: Lease | None = None) -> None:
        """Begin the attempt.

        Args:
            context: The fixed facts of the save.
            lease: Lease of the staged copy; released when the save ends.
        """
        self.context = context
        self.member = Membership(rank=max(context.world.rank, 0))
        """This rank's part in the save; known after `enter`."""
        self.sent = SentFacts()
        """Facts that this rank sent with its local plan; known after `send`."""
        self.phase = "plan"
        self.global_plan: GlobalPlan | None = None
        """What the coordinator planned; `None` on the other ranks."""
        self.are_facts_checked = False
        """Whether the coordinator compared the facts of all ranks in the planning step."""
        self.directory: PlaceOfSave | None = None
        """Where the save writes the checkpoint; the coordinator cleans it up at the end."""
        self.cell_nbytes = 0
        """Size of the cells that ranks write for each other; 0 if each writes its own bytes."""
        self.gathers_rows = False
        """Whether the ranks of a host write whole rows of each other's column shards."""
        self.files: OpenFiles | None = None
        """Open files of the save."""
        self.whole_files: tuple[WholeFile, ...] = ()
        """Export files that the coordinator wrote whole, such as the index and the assets."""
        self.export_error: ExportError | None = None
        """Why the checkpoint will have no export, as far as this rank knows."""
        self.seconds: dict[str, float] = {}
        """Seconds spent in each phase; `timed` adds to them."""
        self.byte_count = ByteCount()
        """Bytes that this rank has written."""
        self._doing: str | None = None
        self._heartbeats: HeartbeatWriter | None = None
        self._reports = SaveReports(context.report_to)
        self._view: RankView | None = None
        self._lease = lease
        self._at_end: list[Callable[[], None]] = []
        self._phase_began = context.began
        # The parent of a checkpointer process tells what becomes of its save.
        self._is_told = context.is_sent
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
            PlanningError: If torch did not set the save up, or the save has ended.
        """
        if self._view is None:
            msg = "the save was not set up"
            raise PlanningError(msg, rank=self.rank, path=self.target)
        return self._view

    def enter(self, member: Membership) -> None:
        """Record this rank's part, and tell the other ranks that this rank has arrived."""
        self.member = member
        self.post("plan")

    def see(self, view: RankView) -> None:
        """Record what this rank is to save."""
        self._view = view

    def send(self, facts: SentFacts) -> None:
        """Record the facts that go out with the local plan."""
        self.sent = facts

    def plan(self, plan: GlobalPlan, *, are_facts_checked: bool) -> None:
        """Record the global plan (coordinator)."""
        self.global_plan, self.are_facts_checked = plan, are_facts_checked

    def save_alone(self) -> None:
        """Record that no other rank takes part, whatever the process group says."""
        self.member = replace(self.member, rendezvous=None)

    def work_in(self, directory: PlaceOfSave, *, count: int | None = None) -> None:
        """Record where the save writes and, if given, the coordinator's save count."""
        self.directory = directory
        if count is not None:
            self.member = replace(self.member, count=count)
        write = directory.heartbeat_of(self.rank)
        if write is None:
            return
        self._heartbeats = HeartbeatWriter(
            write,
            about={
                "save_id": directory.save_id,
                "target": directory.target,
                "rank": self.rank,
                "world_size": self.member.world_size,
            },
            phase=lambda: self._doing or self.phase,
            count=self.byte_count,
            is_alive=self.context.thread.is_alive,
            pace=directory.pace,
        )

    def end_heartbeats(self) -> None:
        """Tell nobody any more how far this rank has come."""
        if self._heartbeats is not None:
            self._heartbeats.stop()

    def exchange_cells(self, nbytes: int) -> None:
        """Record the size of the cells that ranks write for each other; 0 for no exchange."""
        self.cell_nbytes = nbytes

    def gather_rows(self, is_wanted: bool) -> None:  # noqa: FBT001 - one fact
        """Record whether the ranks of a host write whole rows of each other's column shards."""
        self.gathers_rows = is_wanted

    def open_files(self) -> OpenFiles:
        """Return the files of the save; `end` abandons them unless `close_files` comes first."""
        if self.files is None:
            self.files = OpenFiles()
        return self.files

    def close_files(self) -> None:
        """Close the files of the save; all of them must be durable."""
        if self.files is not None:
            self.files.close()
        self.files = None

    def begin_finish(self) -> None:
        """Enter the last phase, in which only the coordinator works; other ranks are not told."""
        self._enter_phase("finish")

    def _enter_phase(self, phase: str) -> None:
        now = time.monotonic()
        save_log.log_phase(self.target, self.rank, self.phase, now - self._phase_began)
        self.phase, self._phase_began = phase, now
        if self._heartbeats is not None:
            self._heartbeats.tell()

    def add_whole_files(self, *files: WholeFile) -> None:
        """Record export files that the coordinator wrote whole."""
        self.whole_files += files

    def leave_out_export(self, error: ExportError) -> None:
        """Record why the checkpoint will have no export; the first reason is kept."""
        self.export_error = self.export_error or error

    def wait_until_over(self) -> None:
        """Wait until this save is over; another thread runs it for the same writer.

        Raises:
            StagingBusyError: If the save is not over by its deadline.
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
        """Whether the attempt has ended, its thread has, or the thread has left the save.

        An error of a synchronous save keeps the attempt from ending for as long as it is held.
        """
        if self._state.is_ended or not self.context.thread.is_alive():
            return True
        running = self.context.running
        return running is not None and not running.is_running()

    def post(self, phase: str) -> None:
        """Enter a phase and tell the other ranks.

        Raises:
            RankLostError: If the store that carries the records is gone.
        """
        if phase != self.phase:
            self._enter_phase(phase)
        if self.member.rendezvous is None:
            return
        progress = Progress.mine(self.member.count, phase, self.target)
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
                hint="the process that hosts the store, usually rank 0, is gone; restart the run",
            ) from error

    def withdraw(self) -> None:
        """Remove the save's record from the store; a committed checkpoint does not need it."""
        if self.member.rendezvous is None:
            return
        try:
            self.member.rendezvous.withdraw(self.target)
        except RuntimeError as error:
            _log.warning("could not remove the record of the save from the store: %s", error)

    def check(self) -> None:
        """Raise if the save was given up, or its deadline has passed.

        Raises:
            SaveAbortedError: If the save was given up.
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
                hint="raise timeout_s, or find out what slows the storage down",
            )

    def patience(self) -> Patience:
        """Return the limits of the requests of this save to a store."""
        return Patience(self.context.deadline, self.check)

    def last_patience(self) -> Patience:
        """Return the limits of requests that clean up after a failure, maybe at the deadline."""
        left_s = min(max(self.context.left_s(), _CLEAN_UP_S), LONGEST_CLEAN_UP_S)
        return Patience(time.monotonic() + left_s)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time that the `with` block takes to a phase."""
        began, before, self._doing = time.monotonic(), self._doing, phase
        try:
            yield
        finally:
            self._doing = before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    def check_world(self) -> None:
        """Check that the process group of the save is still there.

        Raises:
            SaveAbortedError: If it was destroyed: torch may have gone on with another group.
        """
        if self.context.world.is_lost():
            raise self.context.world.lost(target=self.target, phase=self.phase)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Enter the step that publishes the checkpoint, unless the save was given up.

        Raises:
            SaveAbortedError: If the save was given up.
            SaveTimeoutError: If the deadline has passed.
        """
        self.check()
        self.check_world()
        if not self._state.begin_commit():
            raise self._aborted()
        yield

    def _aborted(self) -> SaveAbortedError:
        msg = "the save was given up; this rank stops writing"
        return SaveAbortedError(msg, rank=self.rank, phase=self.phase, path=self.target)

    def give_up(self) -> bool:
        """Keep the attempt from committing; returns `False` if the commit has already begun."""
        return self._state.give_up()

    def at_end(self, act: Callable[[], None]) -> None:
        """Call `act` when the save ends."""
        self._at_end.append(act)

    def watch(self, stop: Callable[[], None]) -> None:
        """Note that a guard watches the save and tells its errors; `stop` ends the watch."""
        self._is_told = True
        self.at_end(stop)

    def tell(self, error: BaseException) -> None:
        """Log the first error of a save that nobody watches: a synchronous one."""
        if not self._is_told:
            self._is_told = True
            save_log.log_failed(self.target, self.rank, error)
            self.note_outcome(error)

    def note_outcome(
        self, error: BaseException | None, *, nbytes: tuple[int, int] = (0, 0), now: bool = False
    ) -> None:
        """Note how the save ended, for the functions of the user; the first note on rank 0 counts.

        Args:
            error: What went wrong; `None` if the checkpoint is published with all that was asked.
            nbytes: Published bytes of the DCP half and of the export.
            now: Call the functions now, because the save may never end; else `end` calls them.
        """
        if self.rank == 0 and not self._reports.is_noted:
            context = self.context
            finished = FinishedSave(
                path=context.target,
                step=save_log.step_of(context.target),
                outcome=outcome_of(error),
                error=None if error is None else f"{type(error).__name__}: {error}",
                dcp_nbytes=nbytes[0],
                hf_nbytes=nbytes[1],
                stall_s=None if context.staged is None else context.staged.stall_s,
                total_s=time.monotonic() - context.staged_at,
                seconds=dict(self.seconds),
            )
            self._reports.note(finished)
        if now:
            self._reports.tell()

    def clean_up(self) -> None:
        """Close and remove the files of the save; safe to call twice.

        The save goes on: torch still has to tell the other ranks how it went. After a commit there
        is no directory to remove, because the rename gave it its final name.
        """
        self.end_heartbeats()
        files, self.files = self.files, None
        if files is not None:
            files.abandon()
        if self.member.is_coordinator and self.directory is not None:
            self.directory.remove()

    def end(self) -> None:
        """Give back what the attempt holds; safe to call twice.

        Only after the last collective of the save: the next save of this process begins then, and
        its collectives must not overtake those of this one.
        """
        if not self._state.end():
            return
        self.clean_up()
        self._enter_phase("ended")
        # After the last collective: a slow function must not hold the other ranks up.
        self.note_outcome(self.context.refusal or self._unexplained())
        self._reports.tell()
        if self._lease is not None:
            self._lease.release()
        # Another save may now replace the slab by a larger one. These references would keep the
        # old slab mapped.
        self._lease = self._view = None
        while self._at_end:
            self._at_end.pop()()

    def _unexplained(self) -> SaveAbortedError:
        """Return the error of a save that ended without a word on this rank."""
        msg = "the save ended without a checkpoint; the log of another rank tells why"
        return SaveAbortedError(msg, rank=self.rank, phase=self.phase, path=self.target)


class LiveAttempts:
    """The saves of this process that have not ended yet."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._attempts: list[Attempt] = []

    def add(self, attempt: Attempt) -> None:
        """Add an attempt, and end earlier attempts whose thread has ended or now runs this one.

        torch does not tell a storage writer that a save failed in planning or on another rank.
        """
        thread = attempt.context.thread
        with self._lock:
            over = [a for a in self._attempts if a.is_over or a.context.thread is thread]
            self._attempts = [a for a in self._attempts if a not in over] + [attempt]
        for old in over:
            old.end()


LIVE = LiveAttempts()
"""One list for the whole process: a thread that has ended may have served any writer."""
