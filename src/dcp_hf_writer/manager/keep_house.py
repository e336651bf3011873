"""Retention at work: apply the plan to the directory of a run, in a thread of its own."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError, SaveTimeoutError
from dcp_hf_writer.manager.retention import KnownStep, Retention, plan_retention
from dcp_hf_writer.storage.open_directory import open_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dcp_hf_writer.manager.quick_check import StoredFacts
    from dcp_hf_writer.manager.run_storage import RunStorage, StoredStep

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removals:
    """What a run gives up."""

    snapshots: tuple[StoredStep, ...]
    """Snapshots that a newer checkpoint replaces."""
    steps: tuple[StoredStep, ...]
    """Checkpoints that the retention gives up."""
    exports: tuple[StoredStep, ...]
    """Checkpoints of which only the export goes."""


class Housekeeper:
    """Deletes what the retention of a run gives up (coordinator only), off the training thread."""

    def __init__(self, directory: RunStorage, retention: Retention) -> None:
        """Work in a directory of a run; nothing begins."""
        self._directory = directory
        self._retention = retention
        self._executor: ThreadPoolExecutor | None = None
        self._latest: Future[None] | None = None
        self._metrics: dict[str, Mapping[str, float]] = {}
        """What checkpoints without noted metrics hold, by save id."""
        self._is_closed = False

    def begin(self, *, protected: frozenset[int] = frozenset()) -> None:
        """Delete in the background. Call it when a new checkpoint is durable.

        Args:
            protected: Steps that must stay, such as the one that was just saved.
        """
        if self._is_closed:
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="dcp-hf-retention")
        try:
            self._latest = self._executor.submit(self.run, protected=protected)
        except RuntimeError as error:
            # The interpreter is exiting. The next run deletes what is left.
            _log.debug("retention did not run: %s", error)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the deletions that were begun are over.

        Raises:
            SaveTimeoutError: If they are not over in time.
        """
        if self._latest is None:
            return
        try:
            self._latest.result(timeout_s)
        except NotDone as error:
            raise SaveTimeoutError(
                "deleting old checkpoints did not end in time",
                path=self._directory.root,
                expected=f"done within {timeout_s} s",
                found="still deleting",
                hint="the newest checkpoint is durable; wait longer, or go on",
            ) from error

    def close(self) -> None:
        """End the thread, after the deletions that were begun; none begins after that."""
        self._is_closed = True
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def run(self, *, protected: frozenset[int] = frozenset()) -> None:
        """Delete now, in the calling thread. What the storage refuses is logged and tried again."""
        try:
            self._directory.finish_deletions()
            self._delete(self.plan(protected=protected))
        except (CheckpointError, OSError) as error:
            _log.warning("retention could not run (%s); the next save tries again", error)

    def plan(self, *, protected: frozenset[int] = frozenset()) -> Removals:
        """Return what `run` would delete, by a fresh listing. Deletes nothing.

        Raises:
            ReadError: If the directory of the run cannot be listed.
        """
        whole = [stored for stored in self._directory.listing() if stored.facts is not None]
        # Only checkpoints that this package wrote: what others left here is theirs.
        ours = {
            one.step: one
            for one in whole
            if not one.is_snapshot and one.facts and one.facts.kind == "manifest"
        }
        plan = plan_retention(
            [self._known(stored) for stored in ours.values()], self._retention, protected=protected
        )
        return Removals(
            tuple(_replaced_snapshots(whole)),
            tuple(ours[step] for step in plan.delete),
            tuple(ours[step] for step in plan.delete_export),
        )

    def _delete(self, removals: Removals) -> None:
        for stored in removals.snapshots:
            self._directory.remove(stored)
        for stored in removals.steps:
            _log.info("deleting %s, which retention gives up", stored.path)
            self._directory.remove(stored)
        for stored in removals.exports:
            _log.info("deleting the export of %s, which retention gives up", stored.path)
            self._directory.remove_export(stored)

    def _known(self, stored: StoredStep) -> KnownStep:
        notes, facts = self._directory.notes_of(stored), stored.facts
        assert facts is not None
        metrics: Mapping[str, float] | None = notes.metrics
        if self._retention.keep_best is not None and not metrics:
            metrics = self._stored_metrics(stored, facts)
        return KnownStep(
            stored.step,
            notes.is_pinned or metrics is None,
            has_export=facts.export_subdir is not None,
            needs_export=facts.needs_export,
            metrics=metrics or {},
        )

    def _stored_metrics(self, stored: StoredStep, facts: StoredFacts) -> Mapping[str, float] | None:
        """Return the metrics in a checkpoint itself; `None` if they cannot be read."""
        known = self._metrics.get(facts.save_id or "")
        if known is not None:
            return known
        # Not at the top: it imports torch, which takes seconds.
        from dcp_hf_writer.manager.stored_metrics import stored_metrics  # noqa: PLC0415

        try:
            metrics = stored_metrics(open_directory(*self._directory.address(stored.path)))
        except CheckpointError as error:
            _log.warning("keeping %s, whose metrics cannot be read: %s", stored.path, error)
            return None
        self._metrics[facts.save_id or ""] = metrics
        return metrics


def _replaced_snapshots(whole: Sequence[StoredStep]) -> Iterator[StoredStep]:
    """Yield each snapshot that a newer checkpoint replaces."""
    newest = max((stored.step for stored in whole), default=-1)
    steps = {stored.step for stored in whole if not stored.is_snapshot}
    for stored in whole:
        if stored.is_snapshot and (stored.step < newest or stored.step in steps):
            yield stored
