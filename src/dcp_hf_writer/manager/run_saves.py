"""The saves of a run: one in flight, its waits, its failures, its callbacks."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from dcp_hf_writer.errors import (
    CallbackError,
    CheckpointError,
    ExportError,
    RankLostError,
    SaveTimeoutError,
)
from dcp_hf_writer.manager.failure_policy import FailureRules, SaveFailure, rules_of
from dcp_hf_writer.manager.kept_snapshot import KeptSnapshot
from dcp_hf_writer.manager.on_signal import stop_process_group
from dcp_hf_writer.manager.pending_save import PendingSave, SaveRequest, SaveTools
from dcp_hf_writer.manager.save_report import as_callbacks
from dcp_hf_writer.save.rank_progress import MEETING
from dcp_hf_writer.staging.staged_state_dict import failed_state_dict, staging_error
from dcp_hf_writer.torch_seam.checkpointer_process import end_checkpointer_process

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from torch.distributed.checkpoint.planner import SavePlanner

    from dcp_hf_writer.manager.agree_on_outcome import Verdict
    from dcp_hf_writer.manager.keep_house import Housekeeper
    from dcp_hf_writer.manager.own_group import OwnGroup
    from dcp_hf_writer.manager.rank_messages import Messages
    from dcp_hf_writer.manager.run_storage import RunStorage
    from dcp_hf_writer.manager.save_report import Callback, SaveReport
    from dcp_hf_writer.staging.stager import Copies

_log = logging.getLogger(__name__)

_SAY_AFTER_S = 1.0
"""A wait that is longer than this gets a line in the log."""


@dataclass(frozen=True)
class SaveOptions:
    """How a run saves."""

    look: Callable[..., None]
    """Raises what keeps this rank from saving; called with the state dict and `has_export`."""
    make_writer: Callable[..., Any]
    """Makes the writer of one save from path, `has_export`, `overwrite` and `group`."""
    timeout_s: float
    rules: FailureRules
    on_saved: tuple[Callback, ...]
    on_exported: tuple[Callback, ...]
    in_process: bool
    """Whether torch's checkpointer process runs the saves."""
    planner: SavePlanner | None
    late_after_s: float
    export_subdir: str

    @classmethod
    def of(
        cls,
        given: Mapping[str, Any],
        *,
        look: Callable[..., None],
        make_writer: Callable[..., Any],
        export_subdir: str,
    ) -> SaveOptions:
        """Take and check the options of a manager that only its saves need.

        Args:
            given: Each option of the manager by its name.
            look: As the field.
            make_writer: As the field.
            export_subdir: Directory of the export within a checkpoint.

        Raises:
            ConfigError: If an option cannot be used as given.
        """
        return cls(
            look,
            make_writer,
            given["timeout_s"],
            rules_of(given["on_failure"]),
            as_callbacks("on_saved", given["on_saved"]),
            as_callbacks("on_exported", given["on_exported"]),
            given["checkpointer"] == "process",
            given["planner"],
            given["late_after_s"],
            export_subdir,
        )


class RunSaves:
    """The saves of one run on one rank; the training thread calls every method.

    All ranks call each method in the same order, with the same arguments.
    """

    def __init__(
        self,
        directory: RunStorage,
        group: OwnGroup,
        house: Housekeeper,
        options: SaveOptions,
        messages: tuple[Messages, Messages],
    ) -> None:
        """Begin without a save.

        Args:
            directory: The storage of the run.
            group: The process group of the saves.
            house: Deletes what retention gives up.
            options: How to save.
            messages: The messages of the training thread, and of the threads that follow saves.
        """
        self._directory, self._group, self._house = directory, group, house
        self._options = options
        self._messages, thread_messages = messages
        self._world = self._messages.world
        self._tools = SaveTools(
            directory,
            thread_messages,
            options.timeout_s,
            pause=lambda error, n: options.rules.pause_before_retry(error, attempts=n),
            still_running=self._say_who_is_late,
            on_end=self._end,
            in_process=options.in_process,
        )
        self._count = 0
        self._pending: PendingSave | None = None
        self._kept: KeptSnapshot | None = None
        self._errors: list[BaseException] = []
        self._said_late_at = 0.0

    @property
    def copies(self) -> Copies | None:
        """The copies of the latest overlapped staging, for the guard of optimizers."""
        return None if self._kept is None else self._kept.copies

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight."""
        return self._pending is not None and not self._pending.is_over

    @property
    def report(self) -> SaveReport | None:
        """The report of the latest save; `None` if it failed or still runs."""
        return None if self._pending is None else self._pending.report

    def begin(
        self,
        request: Callable[[int], SaveRequest],
        state_dict: Callable[[], dict[str, Any]],
        *,
        refuse: Callable[[SaveRequest, dict[str, Any]], CheckpointError | None],
        overwrite: bool,
    ) -> None:
        """Begin a save: wait for the one before, stage, and return while it is written.

        Args:
            request: Makes the request from the number of the save.
            state_dict: Makes the state dict; called when the save before is over.
            refuse: Looks for a reason not to begin; called on the coordinator.
            overwrite: Whether an existing checkpoint of the step is replaced.

        Raises:
            CheckpointError: The failure of an earlier save, as the failure policy says.
        """
        waited_s = self.wait()
        self.raise_errors()
        self._count += 1
        wanted = request(self._count)
        try:
            self.renew_group(f"begin/{self._count}")
            content = self._made(state_dict, has_export=wanted.has_export)
            refusal = refuse(wanted, content) if self._world.is_coordinator else None
            self._permit(f"begin/{self._count}", refusal)
        except CheckpointError as error:
            self._fail(self._failure(wanted, error, is_committed=False, attempts=0))
            self.raise_errors()
            return
        writer = self._options.make_writer(
            wanted.path,
            has_export=wanted.has_export,
            overwrite=overwrite,
            group=self._group.current,
        )
        self._kept = kept = KeptSnapshot(writer)
        pending = PendingSave(wanted, self._tools, waited_s=waited_s)
        self._pending, self._said_late_at = pending, 0.0
        pending.begin(lambda: self._launch(writer, kept, content))

    def _made(
        self, state_dict: Callable[[], dict[str, Any]], *, has_export: bool
    ) -> dict[str, Any]:
        """Make the state dict. If that fails, return one whose save fails on every rank at once."""
        try:
            content = state_dict()
            self._options.look(content, has_export=has_export)
        except Exception as error:  # noqa: BLE001 - other ranks must not wait for this one
            return dict(failed_state_dict(staging_error(error)))
        return content

    def renew_group(self, key: str) -> None:
        """Replace the process group if it lost a rank, once all ranks are there.

        The checkpointer process is replaced with it: it may be dead, or wait for a dead one.

        Args:
            key: Key of the roll call; the same on every rank, and used once.

        Raises:
            RankLostError: If a rank does not answer.
            UnsupportedTorchError: If torch's checkpointer process cannot be replaced.
        """
        if not self._group.is_lost:
            return
        if not self._world.is_alone:
            self._call_the_roll(key)
        self.end_lost_process()
        self._group.renew()

    def _call_the_roll(self, key: str) -> None:
        self._group.answer_roll_call(self._messages, key)
        if self._world.is_coordinator:
            self._messages.put(f"{key}/roll", self._group.roll_call(self._messages, key))
        refusal = self._hear(f"{key}/roll")
        if refusal is not None:
            raise refusal

    def end_lost_process(self) -> None:
        """End the checkpointer process if the latest save lost it; else does nothing."""
        if self._options.in_process and self._group.is_lost:
            end_checkpointer_process()

    def _permit(self, key: str, refusal: CheckpointError | None) -> None:
        """Let all ranks begin, or none: the coordinator alone looks at the storage."""
        if self._world.is_coordinator and not self._world.is_alone:
            self._messages.put(f"{key}/go", refusal)
        if not self._world.is_coordinator:
            refusal = self._hear(f"{key}/go")
        if refusal is not None:
            raise refusal

    def _hear(self, key: str) -> CheckpointError | None:
        answer = self._messages.take_from_coordinator(
            key, timeout_s=self._options.timeout_s, doing="plan"
        )
        assert answer is None or isinstance(answer, CheckpointError)
        return answer

    def _launch(self, writer: Any, kept: KeptSnapshot, content: dict[str, Any]) -> Future[Any]:
        in_process = self._options.in_process
        kind = AsyncCheckpointerType.PROCESS if in_process else AsyncCheckpointerType.THREAD
        response: Any = async_save(
            content,
            storage_writer=writer,
            planner=self._options.planner,
            process_group=self._group.current,
            async_checkpointer_type=kind,
            async_stager=kept,
        )
        # What was staged is all that a further try needs; training may change the rest.
        content.clear()
        future: Future[Any] = getattr(response, "upload_completion", response)
        return future

    def wait(self, timeout_s: float | None = None) -> float:
        """Wait until no save is in flight; returns the seconds that it took.

        Raises:
            SaveTimeoutError: If the save is not over within `timeout_s`.
        """
        pending = self._pending
        if pending is None:
            return 0.0
        began = time.monotonic()
        if not pending.wait(timeout_s):
            raise SaveTimeoutError(
                "the save in flight did not end in time",
                rank=self._world.rank,
                path=pending.request.path,
                expected=f"done within {timeout_s} s",
                found=f"still running after {time.monotonic() - began:.1f} s",
                hint="the checkpoints before it are untouched",
            )
        if pending.error is not None:
            error, pending.error = pending.error, None
            raise error
        waited_s = time.monotonic() - began
        if waited_s > _SAY_AFTER_S:
            _log.info(
                "training waited %.1f s for the save of step %d", waited_s, pending.request.step
            )
        return waited_s

    def raise_errors(self) -> None:
        """Raise the first error that no caller has seen yet; the others are logged.

        Raises:
            CheckpointError: The failure of a save, or of a callback.
        """
        errors, self._errors = self._errors, []
        for other in errors[1:]:
            _log.error("another error of the manager: %s", other)
        if errors:
            raise errors[0]

    def _end(
        self, request: SaveRequest, verdict: Verdict, report: SaveReport | None, attempts: int
    ) -> None:
        if verdict.is_group_lost:
            self._group.give_up()
        if report is not None:
            self._committed(request, report)
        if verdict.error is not None:
            self._fail(
                self._failure(
                    request, verdict.error, is_committed=report is not None, attempts=attempts
                )
            )

    def _failure(
        self, request: SaveRequest, error: BaseException, *, is_committed: bool, attempts: int
    ) -> SaveFailure:
        rank = self._world.rank
        return SaveFailure(request.step, request.path, error, is_committed, attempts, rank)

    def _committed(self, request: SaveRequest, report: SaveReport) -> None:
        _log.info(
            "step %d is committed: %s (%d bytes, %.1f s)",
            report.step,
            report.path,
            report.nbytes,
            report.seconds,
        )
        if self._world.is_coordinator:
            try:
                stored = self._directory.look_at(request.step, is_snapshot=request.is_snapshot)
                self._directory.point_latest_to(stored)
                if request.metrics is not None:
                    self._directory.note(stored, metrics=request.metrics)
            except CheckpointError as error:
                self._errors.append(error)
        self._call(self._options.on_saved, report, report.path)
        if report.has_export:
            self._call(
                self._options.on_exported, report, f"{report.path}/{self._options.export_subdir}"
            )
        if self._world.is_coordinator:
            self._house.begin(protected=frozenset({request.step}))

    def _call(self, callbacks: tuple[Callback, ...], report: SaveReport, path: str) -> None:
        for callback in callbacks:
            try:
                callback(report.step, path, report)
            except Exception as error:  # noqa: BLE001 - kept, and raised in the training thread
                failed = CallbackError(
                    "a callback raised an error; the checkpoint is committed all the same",
                    rank=self._world.rank,
                    path=path,
                    found=f"{getattr(callback, '__name__', callback)}: "
                    f"{type(error).__name__}: {error}",
                )
                failed.__cause__ = error
                _log.error("%s", failed)
                self._errors.append(failed)

    def _fail(self, failure: SaveFailure) -> None:
        """Do what the failure policy says; in the thread that follows the save."""
        then = self._options.rules.then
        kind = "its export" if isinstance(failure.error, ExportError) else "the save"
        _log.error("step %d: %s failed: %s", failure.step, kind, failure.error)
        if then == "raise":
            self._errors.append(failure.error)
        elif then == "stop":
            _log.error("stopping the run, as on_failure says")
            stop_process_group()
        elif callable(then):
            try:
                then(failure)
            except Exception as error:  # noqa: BLE001 - raised in the training thread
                self._errors.append(error)

    def _say_who_is_late(self, request: SaveRequest, seconds: float) -> None:
        late_after_s = self._options.late_after_s
        if not self._world.is_coordinator or seconds < self._said_late_at + late_after_s:
            return
        self._said_late_at = seconds
        _log.warning(
            "the save of step %d runs for %.0f s; %s", request.step, seconds, self._progress()
        )

    def _progress(self) -> str:
        if self._world.is_alone or self._options.in_process:
            return "it may wait for the storage"
        rendezvous = MEETING.rendezvous_of(self._group.current)
        try:
            found = {} if rendezvous is None else rendezvous.progress()
        except (RuntimeError, RankLostError) as error:
            return f"the store does not answer ({type(error).__name__})"
        texts = (
            f"rank {rank} has not begun"
            if p is None
            else f"rank {rank} on {p.host} is in {p.phase}"
            for rank, p in sorted(found.items())
        )
        return ", ".join(texts)
