"""The steps of a run behind a URL, for reading only.

It reads whatever fsspec reads, also chains of file systems; `run_on_store` is for runs that change.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.formats.names_on_disk import INCOMPLETE
from dcp_hf_writer.manager.check_run_root import check_run_root
from dcp_hf_writer.manager.quick_check import QuickCheck
from dcp_hf_writer.manager.run_storage import Leftover, StepNotes, StoredStep, parse_notes
from dcp_hf_writer.manager.step_names import DELETED_PREFIX, NOTES
from dcp_hf_writer.storage.open_directory import open_directory

if TYPE_CHECKING:
    from dcp_hf_writer.manager.step_names import StepNames

_log = logging.getLogger(__name__)

_MAX_NOTES_NBYTES = 1 << 20


class RemoteRun:
    """The directory of a run behind a URL, as one listing of it showed it. One thread at a time."""

    def __init__(self, root: str, names: StepNames) -> None:
        """List the directory and everything below it.

        Args:
            root: URL that fsspec reads.
            names: How the run names the directories of its steps.

        Raises:
            ConfigError: If fsspec does not support the protocol, or if this is the place of a
                checkpoint, and not of a run.
            ReadError: If there is no such directory, or it cannot be listed.
        """
        self.root = root.rstrip("/")
        self._names = names
        self._files = open_directory(root)
        self._sizes: dict[str, dict[str, int]] = {}
        tree = self._files.tree()
        for name, nbytes in tree.items():
            directory, slash, within = name.partition("/")
            if slash:
                self._sizes.setdefault(directory, {})[within] = nbytes
        check_run_root(self.root, tree, has_steps=bool(self._named()))

    def listing(self, *, newest_only: bool = False) -> list[StoredStep]:
        """Return the step directories, by step; of one step, the snapshot comes first.

        Args:
            newest_only: Stop at the newest whole checkpoint: older ones are left out.
        """
        found: list[StoredStep] = []
        for step, is_step, name in sorted(self._named(), reverse=True):
            facts = QuickCheck().run_in(self._files.below(name), self._sizes[name])
            path = f"{self.root}/{name}"
            if isinstance(facts, str):
                found.append(StoredStep(step, path, not is_step, None, facts))
                continue
            found.append(StoredStep(step, path, not is_step, facts))
            if newest_only:
                break
        return found[::-1]

    def _named(self) -> list[tuple[int, bool, str]]:
        found = []
        for name in self._sizes:
            step, snapshot = self._names.step_of(name), self._names.snapshot_step_of(name)
            if step is not None:
                found.append((step, True, name))
            elif snapshot is not None:
                found.append((snapshot, False, name))
        return found

    def sizes_of(self, stored: StoredStep) -> dict[str, int]:
        """Return the size of every file of a step, by name."""
        return self._sizes[stored.path.rpartition("/")[2]]

    def notes_of(self, stored: StoredStep) -> StepNotes:
        """Return the notes about a checkpoint; empty if there are none."""
        name = f"{NOTES}/{stored.path.rpartition('/')[2]}.json"
        if name.partition("/")[2] not in self._sizes.get(NOTES, {}):
            return StepNotes()
        try:
            value = json.loads(self._files.read_whole(name, max_nbytes=_MAX_NOTES_NBYTES))
        except (CheckpointError, ValueError) as error:
            _log.warning("the notes about %s cannot be read: %s", stored.path, error)
            return StepNotes()
        return parse_notes(value, None if stored.facts is None else stored.facts.save_id)

    def leftovers(self) -> list[Leftover]:
        """Return the directories of saves in flight, dead saves and deletions, by name."""
        names = sorted(n for n in self._sizes if n.startswith((INCOMPLETE, DELETED_PREFIX)))
        return [Leftover(name, "unknown", sum(self._sizes[name].values())) for name in names]
