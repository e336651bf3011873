"""The mirror of a local run on a store: every published step is uploaded there.

The steps of the mirror have the names of the local steps. A local step stays until its mirror is
published. The same retention applies to both, and `restore` looks at both.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError, ReadError
from dcp_hf_writer.manager.keep_house import Housekeeper, Removals
from dcp_hf_writer.manager.open_run import open_run
from dcp_hf_writer.save.mirror_jobs import MIRROR_JOBS, job_for, unfinished_mirrors
from dcp_hf_writer.save.mirror_record import mirror_records
from dcp_hf_writer.save.mirror_to import MirrorTo, as_mirror

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.manager.retention import Retention
    from dcp_hf_writer.manager.run_storage import Address, RunStorage, StoredStep
    from dcp_hf_writer.save.mirror_to import FinishedMirror

_log = logging.getLogger(__name__)


class MirroredHousekeeper(Housekeeper):
    """Deletes what the retention gives up, locally and on the mirror."""

    def __init__(self, mirror: RunMirror, local: RunStorage, retention: Retention) -> None:
        """Work in a local run and in its mirror; nothing begins."""
        super().__init__(local, retention)
        self._mirror = mirror
        self._there = _MirrorHousekeeper(local, mirror.run, retention)

    def begin(self, *, protected: frozenset[int] = frozenset()) -> None:
        """Delete in both places, in the background; see `Housekeeper.begin`."""
        super().begin(protected=protected)
        self._there.begin()

    def plan(self, *, protected: frozenset[int] = frozenset()) -> Removals:
        """Return what `run` would delete locally: nothing whose mirror is not published."""
        return super().plan(protected=protected | self._mirror.unfinished_steps())

    def close(self) -> None:
        """End both threads, without a wait for the mirror: its store may not answer."""
        super().close()
        self._there.stop()


class _MirrorHousekeeper(Housekeeper):
    """Applies the retention to the mirror, after it has copied the notes of the local steps."""

    def __init__(self, local: RunStorage, there: RunStorage, retention: Retention) -> None:
        super().__init__(there, retention)
        self._local, self._mirror = local, there

    def stop(self) -> None:
        """Begin no more deletions; what runs goes on, and the interpreter waits for it at exit."""
        self._is_closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def run(self, *, protected: frozenset[int] = frozenset()) -> None:
        """Delete now; what a store refuses is logged and tried again."""
        try:
            self._copy_notes()
        except (CheckpointError, OSError) as error:
            _log.warning("retention of the mirror could not run (%s)", error)
            return
        super().run(protected=protected)

    def _copy_notes(self) -> None:
        """Copy pins and metrics, which decide what stays."""
        here = {one.step: one for one in self._local.listing() if not one.is_snapshot and one.facts}
        for stored in self._mirror.listing():
            of_step = here.get(stored.step)
            if of_step is None or stored.facts is None or stored.is_snapshot:
                continue
            assert of_step.facts is not None
            notes = self._local.notes_of(of_step)
            is_same = of_step.facts.save_id == stored.facts.save_id
            if is_same and notes.export_leaves is None and notes != self._mirror.notes_of(stored):
                self._mirror.write_notes(stored, notes)


class RunMirror:
    """The mirror of one run on one rank."""

    def __init__(self, to: MirrorTo, local: RunStorage, retention: Retention) -> None:
        """Begin without a request.

        Args:
            to: URL of the mirror of the whole run.
            local: The local run.
            retention: What the mirror keeps.

        Raises:
            ConfigError: If the URL cannot be used.
        """
        self._to, self._local = to, local
        self.run = open_run(to.url, local.names, to.storage_options)
        """The storage of the mirror."""
        self._listed: frozenset[int] = frozenset()
        """Steps of the mirror, when `candidates` looked."""
        self._left: frozenset[int] = frozenset()
        """Those that may be replaced."""
        self.house = MirroredHousekeeper(self, local, retention)
        """Applies the retention to both places."""

    @classmethod
    def of(
        cls,
        mirror: str | MirrorTo | None,
        local: RunStorage,
        retention: Retention,
        storage_options: Mapping[str, Any] | None,
    ) -> RunMirror | None:
        """Return what `mirror=` of a manager stands for; `None` without one.

        Raises:
            ConfigError: If it cannot be used as given, or the run itself is on a store.
        """
        to = as_mirror(mirror, path=local.root, storage_options=storage_options)
        return None if to is None else cls(to, local, retention)

    def of_path(self, path: str) -> MirrorTo | None:
        """Return where a step goes; `None` for a snapshot, which is not mirrored."""
        name = os.path.basename(path)
        if self._local.names.step_of(name) is None:
            return None
        url, question, query = self._to.url.partition("?")
        step = f"{url.rstrip('/')}/{name}{question}{query}"
        return replace(self._to, url=step, report_to=self._report_and_tidy)

    def _report_and_tidy(self, finished: FinishedMirror) -> None:
        self.house.begin()
        if self._to.report_to is not None:
            self._to.report_to(finished)

    def note_restored(self, step: int) -> None:
        """Note that the run goes on from a step: what is newer on the mirror may be replaced."""
        self._left = frozenset(one for one in self._listed if one > step)

    def make_way(self, step: int) -> None:
        """Delete a step of a future that the run has left; a save follows (coordinator)."""
        if step not in self._left:
            return
        self._left -= {step}
        try:
            self.run.make_way(step, is_snapshot=False)
        except CheckpointError as error:
            _log.warning("step %d of the mirror stays, so it will not be replaced: %s", step, error)

    def go_on(self) -> None:
        """Upload in the background what dead processes left unfinished (coordinator)."""
        for record in unfinished_mirrors(self._local.root):
            to = self.of_path(record.target)
            if to is not None and to.shown_url == record.url:
                MIRROR_JOBS.start(job_for(record, to))
            else:
                _log.warning(
                    "the mirror %s of %s is unfinished and lies elsewhere; resume_mirrors goes on "
                    "with it",
                    *(record.url, record.target),
                )

    def unfinished_steps(self) -> frozenset[int]:
        """Return the local steps whose mirror is not published: they must not be deleted.

        Raises:
            ReadError: If the run cannot be listed.
        """
        names = self._local.names
        try:
            records = mirror_records(self._root)
        except OSError as error:
            msg = "the directory of the run cannot be listed"
            raise ReadError(
                msg, phase="read", path=self._root, found=error.strerror, errno=error.errno
            ) from error
        found = [names.step_of(os.path.basename(one.target)) for one in records]
        return frozenset(step for step in found if step is not None)

    @property
    def _root(self) -> str:
        return self._local.root

    def candidates(self, step: int | None) -> list[StoredStep]:
        """Return what a restore may load, oldest first; of one step, the local one comes last.

        Args:
            step: The step that is asked for; `None` for all.

        Raises:
            CheckpointError: If the mirror cannot be listed and there is no local checkpoint.
        """
        here = self._local.candidates(step)
        try:
            there = self.run.listing()
        except CheckpointError as error:
            if not any(one.facts for one in here):
                raise
            _log.warning("the mirror %s cannot be listed: %s", self.run.root, error)
            there = []
        # What is broken on the mirror is an upload that is not over.
        whole = [one for one in there if one.facts is not None]
        self._listed = frozenset(one.step for one in whole)
        wanted = [one for one in whole if step in {None, one.step}]
        return sorted([*wanted, *here], key=lambda one: one.step)

    def address(self, path: str) -> Address:
        """Return how to reach a path of the run or of its mirror."""
        is_here = path == self._root or path.startswith(f"{self._root}/")
        return (self._local if is_here else self.run).address(path)


def housekeeper_of(
    mirror: RunMirror | None, local: RunStorage, retention: Retention
) -> Housekeeper:
    """Return who applies the retention to a run, and to its mirror if it has one."""
    return Housekeeper(local, retention) if mirror is None else mirror.house
