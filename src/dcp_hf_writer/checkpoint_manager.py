"""CheckpointManager: the life of a run in three calls: restore, step, close. Wiring only."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.errors import CheckpointError, ConfigError
from dcp_hf_writer.manager.check_host import check_save, check_start
from dcp_hf_writer.manager.on_signal import OnSignal, SignalHandlers
from dcp_hf_writer.manager.open_run import open_run
from dcp_hf_writer.manager.own_group import OwnGroup
from dcp_hf_writer.manager.pending_save import SaveRequest
from dcp_hf_writer.manager.rank_messages import ANSWER_S, Messages, World
from dcp_hf_writer.manager.refuse_save import may_replace, refusal_of
from dcp_hf_writer.manager.restore_run import Restore, Restored, RestoreOptions, RestoreTools
from dcp_hf_writer.manager.retention import KeepBest, Retention, as_keep_best
from dcp_hf_writer.manager.run_content import RunContent
from dcp_hf_writer.manager.run_mirror import RunMirror, housekeeper_of
from dcp_hf_writer.manager.run_saves import RunSaves, SaveOptions
from dcp_hf_writer.manager.save_calls import SaveCalls
from dcp_hf_writer.manager.save_schedule import DueSave, schedule_of
from dcp_hf_writer.manager.shared_root import prepare_shared_root
from dcp_hf_writer.manager.step_names import StepNames
from dcp_hf_writer.manager.step_to_reuse import reuse_of
from dcp_hf_writer.manager.trainer_state import checked_metrics, skipped_names
from dcp_hf_writer.mapping.option_values import check_flag, check_seconds, check_whole, check_word
from dcp_hf_writer.run_writers import RunWriters, writer_options
from dcp_hf_writer.staging.stager import wait_before_step
from dcp_hf_writer.storage.write_slots import WriteSlots

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
    from typing_extensions import Self

    from dcp_hf_writer.manager.save_report import SaveReport
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.save.mirror_to import MirrorTo
    from dcp_hf_writer.staging.stager import StagingMode

_log = logging.getLogger(__name__)

_managers = 0
"""Managers that this process has made; all ranks make them in the same order."""


class CheckpointManager:
    """Saves a run when it is due, keeps what is worth keeping, and resumes it.

        manager = CheckpointManager("runs/a", save_every=500, export_every=2000, keep_last=3)
        start = manager.restore(state_dict)  # newest good step, or None
        for step in range((start or 0) + 1, last + 1):
            ...
            manager.step(step, state_dict)  # saves when due
        manager.close()

    `state_dict` is a state dict, or a function that makes it; a function is called only when a save
    is due. All ranks make the manager, and all ranks make the same calls in the same order.

    One save is in flight; the next one waits for it. Every answer comes from a fresh listing.

    Thread safety: call it from the training thread only. Callbacks run in another thread.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save_every: Any = None,
        export_every: Any = None,
        snapshot_every: Any = None,
        export: HFExport | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: KeepBest | tuple[str, Literal["min", "max"]] | None = None,
        export_keep_last: int | None = None,
        trainer_state: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        rank_state: Mapping[str, Any] | None = None,
        save_rng: bool = True,
        on_failure: Any = "raise",
        on_saved: Any = None,
        on_exported: Any = None,
        report_to: Any = None,
        on_signal: OnSignal | None = None,
        names: StepNames = StepNames(),  # noqa: B008 - frozen
        checkpointer: Literal["thread", "process"] = "thread",
        weights: Literal["both", "once"] = "both",
        reuse: Literal["auto"] | None = None,
        staging: StagingMode = "blocking",
        optimizers: Sequence[torch.optim.Optimizer] = (),
        planner: SavePlanner | None = None,
        slots: WriteSlots = WriteSlots(),  # noqa: B008 - frozen
        strategy: Literal["auto", "direct", "exchange"] = "auto",
        host_budget_bytes: int = 256 << 20,
        timeout_s: float = 1800,
        late_after_s: float = 60,
        allow_pickled_objects: bool = False,
        storage_options: dict[str, Any] | None = None,
        mirror: str | MirrorTo | None = None,
        page_cache: Literal["newest", "all"] = "newest",
    ) -> None:
        """Prepare a run: make its directory and its process group, and check that they work.

        Args:
            root: Directory of the run, or a URL such as `s3://bucket/run`; `step-100` goes there.
            save_every: When to save: a number of steps, a `timedelta`, or cadences joined with `|`.
            export_every: When a save also writes the HuggingFace half; `None` means every save, if
                `export` is given. A step that is due for an export is saved in any case.
            snapshot_every: When to save into the snapshot slot, which keeps only its newest: the
                DCP half, for resuming after a crash. The next newer checkpoint replaces it.
            export: Options of the HuggingFace half; `None` writes none.
            keep_last: Number of newest steps to keep; `None` keeps all.
            keep_every: Also keep the steps that are multiples of this number.
            keep_best: Also keep the best steps: `KeepBest(metric, mode, count)`, or
                `(metric, mode)`. `step` and `save` take the `metrics`.
            export_keep_last: Number of newest exports to keep. Of older steps only the DCP half
                stays. An export that holds the only copy of weights goes only with its step.
            trainer_state: JSON value of rank 0 to save with each step, or a function that makes it.
            rank_state: Objects of each rank with `state_dict` and `load_state_dict`, by name, such
                as `{"dataloader": loader, "scheduler": scheduler}`. Every rank gets its own back.
            save_rng: Save and restore the random number generators of each rank.
            on_failure: What happens when a save fails: `"raise"` at the next call, `"warn"`,
                `"retry"` or `Retry(...)` from the same snapshot, `"stop"` (SIGTERM to the own
                process group), or a function of a `SaveFailure`.
            on_saved: Function or functions `(step, path, report)`, called on every rank after the
                commit, in another thread. They must not use collectives.
            on_exported: The same, after the commit of a save with an export; `path` is the export.
            report_to: As in `HFDualWriter`; a save that is tried again reports each time.
            on_signal: What SIGTERM and SIGUSR1 do; `None` leaves signals alone.
            names: Names of the step directories.
            checkpointer: `"thread"` saves in a thread, `"process"` in torch's checkpointer process.
            weights: As in `HFDualWriter`; a save without an export always stores the weights.
            reuse: `"auto"`: link or clone what the newest step holds too, instead of writing it.
            staging: As in `HFDualWriter`; `"overlap"` guards `optimizers`.
            optimizers: Optimizers that wait for overlapped copies before they step.
            planner: Planner of the saves.
            slots: As in `HFDualWriter`.
            strategy: As in `HFDualWriter`.
            host_budget_bytes: As in `HFDualWriter`.
            timeout_s: Deadline in seconds of a save, and of a collective of the run's own group.
            late_after_s: A save that runs longer gets a line in the log that names the late ranks.
            allow_pickled_objects: Let `restore` load any class; this runs code of the checkpoint.
            storage_options: Options for a URL, as fsspec takes them, such as credentials.
            mirror: URL of a store, or `MirrorTo(url, ...)`: where to upload each step of a local
                run once it is committed, in the background. `restore` looks there too.
            page_cache: As in `HFDualWriter`.

        Raises:
            ConfigError: If an option cannot be used as given.
            StorageError: If the run cannot be written to, or ranks do not share it.
            SaveTimeoutError: If a store does not answer.
            RankLostError: If a rank does not make its manager.
        """
        global _managers  # noqa: PLW0603 - one counter per process
        given = dict(locals())
        shared = writer_options(given)
        check_word("checkpointer", checkpointer, ("thread", "process"))
        check_seconds("late_after_s", late_after_s)
        check_flag("save_rng", save_rng)
        own_options = None if isinstance(mirror, str) else storage_options
        self._directory = open_run(root, names, own_options)
        self.root = self._directory.root
        self._schedule = schedule_of(
            save_every, export_every, snapshot_every, has_export=export is not None
        )
        self._timeout_s, self._allow_pickled_objects = timeout_s, allow_pickled_objects
        retention = Retention(keep_last, keep_every, as_keep_best(keep_best), export_keep_last)
        self._mirror = RunMirror.of(mirror, self._directory, retention, storage_options)
        self._writers = RunWriters(
            export,
            address=(self._mirror or self._directory).address,
            weights=weights,
            allow_pickled_objects=allow_pickled_objects,
            step_to_reuse=reuse_of(reuse, self._directory),
            options=shared,
            mirror=self._mirror,
        )
        self._world = World.current()
        options = SaveOptions.of(
            given,
            look=partial(check_save, self._world, self._writers.export_files),
            make_writer=self._writers.writer,
            export_subdir=self._writers.subdir,
        )
        self._writers.writer(self._directory.path_of(0), has_export=True)
        _managers += 1
        self._content = RunContent(
            trainer_state, rank_state, save_rng=save_rng, rank=self._world.rank
        )
        key = f"dcp-hf-manager/{_managers}"
        connect = partial(Messages, self._world, key, answer_s=min(timeout_s, ANSWER_S))
        self._messages = connect()
        self._restores = 0
        self._restored: Restored | None = None
        self._first_step: int | None = None
        self._last: tuple[int, Any, Mapping[str, float] | None] | None = None
        self._saved_step: int | None = None
        self._is_closed = False
        look = partial(check_start, self._world, in_process=options.in_process)
        prepare_shared_root(self._directory, self._messages, timeout_s=timeout_s, look=look)
        if self._mirror is not None and self._world.is_coordinator:
            self._mirror.go_on()
        self._group = OwnGroup(self._world, timeout_s=timeout_s)
        self._house = housekeeper_of(self._mirror, self._directory, retention)
        self._saves = RunSaves(
            self._directory, self._group, self._house, options, (self._messages, connect())
        )
        self._hooks = [wait_before_step(one, lambda: self._saves.copies) for one in optimizers]
        self._calls = SaveCalls(
            self._world, self._schedule.save_every, connect, listens=on_signal is not None
        )
        self._on_signal = on_signal
        self._signals = None if on_signal is None else SignalHandlers(on_signal, self._calls.wish)

    def step(
        self,
        step: int,
        state_dict: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Report that a step has ended; save it if a save is due.

        Args:
            step: Number of the step; higher than the one before.
            state_dict: What to save, or a function that makes it.
            metrics: Numbers to save with the step, for `keep_best`; others raise `ConfigError`.

        Returns:
            Whether a save began.

        Raises:
            CheckpointError: The failure of an earlier save or callback, as `on_failure` says.
            SystemExit: After a stop signal, when the last save is over.
        """
        self._check_open()
        self._saves.raise_errors()
        is_first, self._first_step = self._first_step is None, self._first_step or step
        self._last = (step, state_dict, metrics)
        call = self._calls.due_at(step)
        due = self._schedule.due_at(step, is_first=is_first, is_called=call is not None)
        if call is not None and call.stop_signal is not None:
            self._stop(call.stop_signal)
        if due is None:
            return False
        self._save(step, state_dict, due, metrics)
        return True

    def save(
        self,
        step: int,
        state_dict: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        *,
        export: bool | None = None,
        wait: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveReport | None:
        """Save a step now, whether it is due or not.

        Args:
            step: Number of the step.
            state_dict: What to save, or a function that makes it.
            export: Whether to write the HuggingFace half; `None` does what the cadence says.
            wait: Return only after the commit, and raise if the save fails.
            metrics: Numbers to note with the step, for `keep_best`.

        Returns:
            With `wait`, the report; `None` if the save failed and `on_failure` does not raise.

        Raises:
            ConfigError: If the manager has no export to write, or a metric is no number.
            CheckpointError: As `step`; with `wait`, also the failure of this save.
        """
        self._check_open()
        if export and self._writers.export is None:
            raise ConfigError("this manager writes no export", expected="export=HFExport(...)")
        self._save(step, state_dict, self._schedule.by_hand(step, export=export), metrics)
        if not wait:
            return None
        self.wait()
        return self._saves.report

    def _save(
        self, step: int, state_dict: Any, due: DueSave, metrics: Mapping[str, float] | None
    ) -> None:
        check_whole("step", step, least=0)
        run, has_export, metrics = self._directory, due.has_export, checked_metrics(metrics)
        path = run.path_of(step, is_snapshot=due.is_snapshot)
        may_go = partial(may_replace, run, self._restored, step, path, is_snapshot=due.is_snapshot)
        self._calls.note_save()
        self._saves.begin(
            lambda number: SaveRequest(number, step, path, due.is_snapshot, has_export, metrics),
            lambda: self._content.at(step, state_dict, metrics),
            refuse=lambda request, content: refusal_of(
                run,
                self._house,
                request,
                may_replace=may_go,
                needed=self._writers.planned_nbytes(content, has_export=has_export),
                timeout_s=self._timeout_s,
                mirror=self._mirror,
            ),
            overwrite=run.overwrites and may_go(),
        )
        self._saved_step = step

    def restore(
        self,
        state_dict: dict[str, Any] | Callable[[], dict[str, Any]],
        *,
        step: int | None = None,
        load_optimizer: bool = True,
        load_scheduler: bool = True,
        load_dataset: bool = True,
        strict: bool = True,
        verify: bool = False,
        merge: Mapping[str, Callable[[Sequence[Any], int, int], Any]] | None = None,
        planner: LoadPlanner | None = None,
    ) -> int | None:
        """Load the newest checkpoint that is good into a state dict, in place.

        A checkpoint that is damaged is passed over, with a warning that says what is wrong. If all
        are damaged, that is an error. Also reads what others left under the names of steps: DCP
        checkpoints, also saved apart into `model/` and `optimizer/`, and HuggingFace directories.

        Args:
            state_dict: A state dict to load into, or a function that makes it. What `dcp.load`
                cannot load in place, such as a number, is replaced in the dict.
            step: Load this step; `None` means the newest.
            load_optimizer: Whether to load the entries of the optimizer.
            load_scheduler: Whether to restore the scheduler of `rank_state`.
            load_dataset: Whether to restore the dataloader of `rank_state`.
            strict: Whether everything in the state dict must be stored.
            verify: Compare every byte that is read with the digests of the manifest.
            merge: For another number of ranks than saved: by name of an object in `rank_state`, a
                function `(states of all old ranks, rank, ranks)` that returns this rank's state.
            planner: Planner of the load.

        Returns:
            The step that was loaded; `None` if there is no checkpoint. `restored` tells more.

        Raises:
            CorruptCheckpointError: If there are checkpoints, and none can be loaded.
            MismatchError: If the checkpoint does not fit the state dict.
            ConfigError: If objects of the ranks cannot be given back to another number of ranks.
            RankLostError: If a rank does not answer.
        """
        self._check_open()
        self.wait()
        self._restores += 1
        given = state_dict() if callable(state_dict) else state_dict
        options = RestoreOptions(
            load_optimizer,
            strict,
            skipped_names(load_dataset=load_dataset, load_scheduler=load_scheduler),
            merge or {},
            self._allow_pickled_objects,
            planner,
        )
        self._saves.renew_group(f"restore/{self._restores}")
        tools = RestoreTools(
            self._messages,
            self._group.current,
            lambda path, source: self._writers.reader(path, source, verify=verify),
            self._timeout_s,
            (self._mirror or self._directory).address,
        )
        run = Restore(f"restore/{self._restores}", tools, options)
        self._restored = run.run(
            partial((self._mirror or self._directory).candidates, step),
            given,
            self._content.objects,
        )
        if self._mirror is not None and self._restored is not None:
            self._mirror.note_restored(self._restored.step)
        return None if self._restored is None else self._restored.step

    @property
    def restored(self) -> Restored | None:
        """What the latest `restore` loaded: step, path, trainer state, and what it passed over."""
        return self._restored

    def warm_up(self, state_dict: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> int:
        """Allocate the staging memory and read the assets; return the bytes of the staged copy."""
        content = self._content.at(0, state_dict)
        return self._writers.writer(self._directory.path_of(0), has_export=True).warm_up(content)

    def latest(self) -> int | None:
        """Return the newest step with a whole checkpoint, by a fresh listing; `None` if none."""
        return self._directory.latest()

    def steps(self) -> list[int]:
        """Return the steps with a whole checkpoint, ascending, by a fresh listing."""
        return self._directory.steps()

    def path_of(self, step: int) -> str:
        """Return the path of the checkpoint of a step; of the snapshot if there is no other."""
        return self._directory.find(step)

    def pin(self, step: int, *, keep: bool = True) -> None:
        """Keep a step whatever the retention says; `keep=False` leaves it to the retention again.

        Raises:
            ConfigError: If there is no whole checkpoint of the step.
        """
        self._directory.pin(step, is_pinned=keep, may_write=self._world.is_coordinator)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until no save is in flight, and raise what went wrong.

        On rank 0, which deletes for all ranks, also wait until retention is done.

        Raises:
            SaveTimeoutError: If the save is not over within `timeout_s` seconds.
            CheckpointError: The failure of a save or a callback, as `on_failure` says.
        """
        self._saves.wait(timeout_s)
        self._house.wait(timeout_s)
        self._saves.raise_errors()

    def close(self, timeout_s: float | None = None) -> None:
        """End the run: take the last save if one is due, wait for it, and raise what went wrong.

        Safe to call twice. Without it, the interpreter waits at exit, but nobody sees the errors.

        Args:
            timeout_s: How long to wait for the save, in seconds; `None` waits until its deadline.

        Raises:
            SaveTimeoutError: If the save is not over in time.
            CheckpointError: The failure of a save or a callback, as `on_failure` says.
        """
        if self._is_closed:
            return
        try:
            if self._schedule.save_every.is_due_at_close():
                self._save_last()
            self.wait(timeout_s)
        finally:
            self._release()

    def _release(self) -> None:
        self._is_closed = True
        self._last = None
        self._calls.close()
        if self._signals is not None:
            self._signals.close()
        for hook in self._hooks:
            hook.remove()
        self._house.close()
        if not self._saves.is_busy:
            self._saves.end_lost_process()
            self._group.close()
            self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # The error of the training is the one to show; the save in flight ends by itself.
        with suppress(CheckpointError):
            self._saves.wait()
        self._release()

    def _save_last(self) -> None:
        """Save the last step that was reported, unless it is saved."""
        if self._last is not None and self._saved_step != self._last[0]:
            step, state_dict, metrics = self._last
            self._save(step, state_dict, self._schedule.by_hand(step, export=None), metrics)

    def _stop(self, number: int) -> None:
        """Take the last save after a stop signal, and end the process as the signal asks."""
        if self._signals is not None:
            self._signals.start_budget(number)
        try:
            if self._on_signal is None or self._on_signal.last_save:
                self._save_last()
            self.wait()
        except CheckpointError as error:
            _log.error("the last save before the end failed: %s", error)
        self._release()
        raise SystemExit(128 + number)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this manager was closed", hint="make a new one")
