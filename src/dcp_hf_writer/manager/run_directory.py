"""The directory of a run: every access of the manager to storage goes through this module.

POSIX only. Another kind of storage needs one more class with the methods of `RunDirectory`.
The directory is listed anew for every answer; no file here says which step is the latest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError, ConfigError, ReadError, WriteError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.manager.quick_check import QuickCheck, StoredFacts
from dcp_hf_writer.manager.step_names import DELETED_PREFIX, HF_LATEST, LATEST, NOTES, StepNames
from dcp_hf_writer.plan.encode_manifest import without_export
from dcp_hf_writer.storage.posix_outputs import (
    make_directories,
    sync_directory,
    write_errors,
    write_file,
)
from dcp_hf_writer.storage.posix_trees import remove_tree

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A directory of a run that is named like a step or a snapshot."""

    step: int
    """Number of the step."""
    path: str
    """Absolute path of the directory."""
    is_snapshot: bool
    """Whether it is the snapshot slot."""
    facts: StoredFacts | None
    """What a quick look tells; `None` if there is no whole checkpoint."""
    problem: str | None = None
    """Why there is no whole checkpoint."""


@dataclass(frozen=True, slots=True)
class StepNotes:
    """What the manager notes about a step beside its checkpoint."""

    save_id: str | None = None
    """Save that the metrics belong to; notes of another save do not count."""
    is_pinned: bool = False
    """Whether the user asked to keep the step."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step."""
    export_leaves: str | None = None
    """Directory of an export that is being deleted."""


class RunDirectory:
    """The directory of one run. Thread-safe."""

    def __init__(self, root: str, names: StepNames) -> None:
        """Work in `root`, an absolute path; touches nothing."""
        self.root = root
        self.names = names
        self._check = QuickCheck()
        self._lock = threading.RLock()

    def path_of(self, step: int, *, is_snapshot: bool = False) -> str:
        """Return the path of the directory of a step."""
        name = self.names.snapshot_name_of(step) if is_snapshot else self.names.name_of(step)
        return os.path.join(self.root, name)

    def listing(self, *, newest_only: bool = False) -> list[StoredStep]:
        """Return the step directories, by step; of one step, the snapshot comes first.

        Args:
            newest_only: Stop at the newest whole checkpoint: older ones are left out.

        Raises:
            ReadError: If the directory of the run exists and cannot be listed.
        """
        found: list[StoredStep] = []
        with self._lock:
            named = self._named()
            self._check.forget_all_but({os.path.join(self.root, name) for *_, name in named})
            for step, is_step, name in reversed(named):
                found.append(self._look(step, name, is_snapshot=not is_step))
                if newest_only and found[-1].facts is not None:
                    break
        return found[::-1]

    def _named(self) -> list[tuple[int, bool, str]]:
        found = []
        for name in self._list():
            step, snapshot = self.names.step_of(name), self.names.snapshot_step_of(name)
            if step is not None:
                found.append((step, True, name))
            elif snapshot is not None:
                found.append((snapshot, False, name))
        return sorted(found)

    def _list(self) -> list[str]:
        try:
            with os.scandir(self.root) as entries:
                return [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            msg = "the directory of the run cannot be listed"
            raise ReadError(
                msg, phase="read", path=self.root, found=error.strerror, errno=error.errno
            ) from error

    def _look(self, step: int, name: str, *, is_snapshot: bool) -> StoredStep:
        path = os.path.join(self.root, name)
        facts = self._check.run(path)
        if isinstance(facts, str):
            return StoredStep(step, path, is_snapshot, None, facts)
        return StoredStep(step, path, is_snapshot, facts)

    def look_at(self, step: int, *, is_snapshot: bool = False) -> StoredStep:
        """Look at one step directory; it need not exist."""
        path = self.path_of(step, is_snapshot=is_snapshot)
        with self._lock:
            return self._look(step, os.path.basename(path), is_snapshot=is_snapshot)

    def latest(self) -> int | None:
        """Return the newest step with a whole checkpoint; `None` if there is none."""
        whole = [one for one in self.listing(newest_only=True) if one.facts is not None]
        return whole[-1].step if whole else None

    def steps(self) -> list[int]:
        """Return the steps with a whole checkpoint, ascending."""
        return sorted({one.step for one in self.listing() if one.facts is not None})

    def find(self, step: int) -> str:
        """Return the path of the checkpoint of a step: of the snapshot if there is no other."""
        path, snapshot = self.path_of(step), self.path_of(step, is_snapshot=True)
        return snapshot if not os.path.isdir(path) and os.path.isdir(snapshot) else path

    def pin(self, step: int, *, is_pinned: bool, may_write: bool) -> None:
        """Pin a step, or undo it.

        Args:
            step: The step.
            is_pinned: Whether it is pinned from now on.
            may_write: Whether this rank writes the note; the others only check the step.

        Raises:
            ConfigError: If there is no whole checkpoint of the step.
            StorageError: If the note cannot be written.
        """
        stored = self.look_at(step)
        if stored.facts is None:
            msg = "there is no checkpoint of this step to pin"
            raise ConfigError(msg, path=stored.path, found=stored.problem)
        if may_write:
            self.note(stored, is_pinned=is_pinned)

    def prepare(self) -> None:
        """Create the directory of the run and its notes, and check that both can be written.

        Raises:
            WriteError: If the file system refuses.
        """
        make_directories(os.path.join(self.root, NOTES))
        probe = os.path.join(self.root, NOTES, f"probe-{uuid.uuid4().hex}")
        with write_errors(self.root):
            os.mkdir(probe)
            os.rename(probe, f"{probe}.renamed")
            os.rmdir(f"{probe}.renamed")

    def leave_token(self, token: str) -> None:
        """Write a small file by which other ranks see that they share this directory.

        Raises:
            WriteError: If the file system refuses.
        """
        write_file(self._token(token), b"")

    def has_token(self, token: str) -> bool:
        """Whether this rank sees the token that the coordinator left."""
        return os.path.exists(self._token(token))

    def remove_token(self, token: str) -> None:
        """Remove the token again."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._token(token))

    def _token(self, token: str) -> str:
        return os.path.join(self.root, NOTES, f"token-{token}")

    def free_nbytes(self) -> int:
        """Return the bytes that this user can still write.

        Raises:
            ReadError: If the file system cannot tell.
        """
        try:
            stat = os.statvfs(self.root)
        except OSError as error:
            msg = "the file system does not tell its free space"
            raise ReadError(msg, path=self.root, found=error.strerror, errno=error.errno) from error
        return stat.f_bavail * stat.f_frsize

    def remove(self, stored: StoredStep) -> bool:
        """Delete a checkpoint: first rename it, so that a half-deleted one is never taken for one.

        Returns:
            Whether it is gone. If the storage refuses, a warning says why; try again later.
        """
        aside = self._aside()
        try:
            os.rename(stored.path, aside)
            sync_directory(self.root)
        except (OSError, CheckpointError) as error:
            _log.warning("could not delete %s (%s); the next save tries again", stored.path, error)
            return False
        self._drop_notes(stored)
        return _is_removed(aside)

    def remove_export(self, stored: StoredStep) -> bool:
        """Delete the HuggingFace half of a checkpoint; the DCP half stays whole at every moment.

        A note tells what is going on, so that `finish_deletions` can end it after a crash.

        Returns:
            Whether it is gone. If the storage refuses, a warning says why; try again later.
        """
        facts = stored.facts
        if facts is None or facts.export_subdir is None or facts.needs_export:
            return False
        try:
            notes = self.notes_of(stored)
            leaving = StepNotes(
                facts.save_id, notes.is_pinned, notes.metrics, export_leaves=facts.export_subdir
            )
            self._write_notes(stored, leaving)
            self._replace_manifest(stored.path)
            return self._take_away_export(stored, leaving)
        except (OSError, CheckpointError) as error:
            _log.warning("could not delete the export of %s: %s", stored.path, error)
            return False

    def _replace_manifest(self, path: str) -> None:
        manifest = os.path.join(path, MANIFEST_NAME)
        with open(manifest, "rb") as file:
            data = without_export(file.read())
        self._replace_file(manifest, data)

    def _take_away_export(self, stored: StoredStep, notes: StepNotes) -> bool:
        assert notes.export_leaves is not None
        aside = self._aside()
        export = os.path.join(stored.path, notes.export_leaves)
        if os.path.lexists(export):
            os.rename(export, aside)
            sync_directory(stored.path)
        self._write_notes(stored, StepNotes(notes.save_id, notes.is_pinned, notes.metrics))
        return _is_removed(aside)

    def finish_deletions(self) -> None:
        """End the deletions that a crash or the storage interrupted."""
        for name in self._list():
            if name.startswith(DELETED_PREFIX):
                remove_tree(os.path.join(self.root, name))
        for stored in self.listing():
            notes = self.notes_of(stored)
            facts = stored.facts
            if notes.export_leaves is None or facts is None or facts.save_id != notes.save_id:
                continue
            try:
                if facts.export_subdir is not None:
                    self._replace_manifest(stored.path)
                self._take_away_export(stored, notes)
            except (OSError, CheckpointError) as error:
                _log.warning("could not delete the export of %s: %s", stored.path, error)

    def _aside(self) -> str:
        return os.path.join(self.root, DELETED_PREFIX + uuid.uuid4().hex)

    def point_latest_to(self, stored: StoredStep) -> None:
        """Make the links `latest` and, if there is an export, `hf-latest` lead to a checkpoint.

        The links are for people and shell scripts; the manager never reads them.
        """
        name = os.path.basename(stored.path)
        self._link(LATEST, name)
        if stored.facts is not None and stored.facts.export_subdir is not None:
            self._link(HF_LATEST, os.path.join(name, stored.facts.export_subdir))

    def _link(self, name: str, target: str) -> None:
        path = os.path.join(self.root, name)
        draft = os.path.join(self.root, NOTES, f"link-{uuid.uuid4().hex}")
        try:
            if os.path.lexists(path) and not os.path.islink(path):
                _log.warning("%s is not a link, so it is not replaced", path)
                return
            os.symlink(target, draft)
            os.replace(draft, path)
            sync_directory(self.root)
        except (OSError, WriteError) as error:
            _log.warning("could not make %s lead to %s: %s", path, target, error)

    def notes_of(self, stored: StoredStep) -> StepNotes:
        """Return the notes about a checkpoint; empty if there are none."""
        try:
            with open(self._notes_path(stored), "rb") as file:
                value = json.load(file)
        except FileNotFoundError:
            return StepNotes()
        except (OSError, ValueError) as error:
            _log.warning("the notes about %s cannot be read: %s", stored.path, error)
            return StepNotes()
        return parse_notes(value, None if stored.facts is None else stored.facts.save_id)

    def note(
        self,
        stored: StoredStep,
        *,
        is_pinned: bool | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Note a pin or metrics of a checkpoint; what is not given stays as it is.

        Raises:
            StorageError: If the notes cannot be written.
        """
        with self._lock:
            old = self.notes_of(stored)
            new = StepNotes(
                None if stored.facts is None else stored.facts.save_id,
                old.is_pinned if is_pinned is None else is_pinned,
                old.metrics if metrics is None else metrics,
                old.export_leaves,
            )
            self._write_notes(stored, new)

    def _write_notes(self, stored: StoredStep, notes: StepNotes) -> None:
        value = {
            "save_id": notes.save_id,
            "pinned": notes.is_pinned,
            "metrics": dict(notes.metrics),
            "export_leaves": notes.export_leaves,
        }
        self._replace_file(self._notes_path(stored), json.dumps(value).encode())

    def _replace_file(self, path: str, data: bytes) -> None:
        """Write a file whole or not at all. The draft lies outside of the checkpoint."""
        draft = os.path.join(self.root, NOTES, f"draft-{uuid.uuid4().hex}")
        write_file(draft, data)
        with write_errors(path):
            os.replace(draft, path)
        sync_directory(os.path.dirname(path))

    def _drop_notes(self, stored: StoredStep) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._notes_path(stored))

    def _notes_path(self, stored: StoredStep) -> str:
        return os.path.join(self.root, NOTES, f"{os.path.basename(stored.path)}.json")


def _is_removed(path: str) -> bool:
    """Remove a directory; returns whether it is gone."""
    remove_tree(path)
    # On NFS, a file that another client has open leaves a `.nfs*` file behind.
    return not os.path.lexists(path)


def parse_notes(value: Any, save_id: str | None) -> StepNotes:
    """Read notes. A pin counts for the step, metrics only for the save that they belong to.

    Args:
        value: What the file of the notes holds, as JSON.
        save_id: Save of the checkpoint beside the notes.
    """
    if not isinstance(value, dict):
        return StepNotes()
    is_pinned = value.get("pinned") is True
    if value.get("save_id") != save_id:
        return StepNotes(save_id, is_pinned)
    metrics = value.get("metrics")
    leaves = value.get("export_leaves")
    return StepNotes(
        save_id,
        is_pinned,
        {str(k): float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        if isinstance(metrics, dict)
        else {},
        leaves if isinstance(leaves, str) and "/" not in leaves and leaves[:1] != "." else None,
    )
