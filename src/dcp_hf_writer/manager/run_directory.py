"""The storage of a run in a directory of a POSIX file system."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid

from dcp_hf_writer.errors import CheckpointError, ReadError, WriteError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.manager.check_run_root import check_run_root
from dcp_hf_writer.manager.local_leftovers import local_leftovers
from dcp_hf_writer.manager.quick_check import QuickCheck
from dcp_hf_writer.manager.run_storage import (
    Address,
    Leftover,
    RunStorage,
    StepNotes,
    StoredStep,
    parse_notes,
)
from dcp_hf_writer.manager.step_names import DELETED_PREFIX, HF_LATEST, LATEST, NOTES, StepNames
from dcp_hf_writer.plan.encode_manifest import without_export
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.posix_outputs import (
    make_directories,
    replace_durably,
    sync_directory,
    write_errors,
    write_file,
)
from dcp_hf_writer.storage.posix_trees import remove_tree

_log = logging.getLogger(__name__)


class RunDirectory(RunStorage):
    """The directory of one run. Thread-safe."""

    overwrites = True

    def __init__(self, root: str, names: StepNames) -> None:
        """Work in `root`, an absolute path; touches nothing."""
        super().__init__(root, names)
        self._check = QuickCheck()

    def address(self, path: str) -> Address:
        """Return the path itself; see `RunStorage.address`."""
        return Address(path, None)

    def listing(self, *, newest_only: bool = False) -> list[StoredStep]:
        """Return the step directories, by step; of one step, the snapshot comes first.

        Args:
            newest_only: Stop at the newest whole checkpoint: older ones are left out.

        Raises:
            ConfigError: If this is the directory of a checkpoint, and not of a run.
            ReadError: If the directory of the run exists and cannot be listed.
        """
        found: list[StoredStep] = []
        with self.lock:
            named = self.named(self._list())
            self._check.forget_all_but({os.path.join(self.root, name) for *_, name in named})
            for step, is_step, name in reversed(named):
                found.append(self._look(step, name, is_snapshot=not is_step))
                if newest_only and found[-1].facts is not None:
                    break
        return found[::-1]

    def _list(self) -> list[str]:
        try:
            with os.scandir(self.root) as entries:
                is_directory = {e.name: e.is_dir(follow_symlinks=False) for e in entries}
        except FileNotFoundError:
            return []
        except OSError as error:
            msg = "the directory of the run cannot be listed"
            raise ReadError(
                msg, phase="read", path=self.root, found=error.strerror, errno=error.errno
            ) from error
        names = [name for name, is_one in is_directory.items() if is_one]
        check_run_root(self.root, is_directory, has_steps=bool(self.named(names)))
        return names

    def _look(self, step: int, name: str, *, is_snapshot: bool) -> StoredStep:
        path = os.path.join(self.root, name)
        facts = self._check.run(path)
        if isinstance(facts, str):
            return StoredStep(step, path, is_snapshot, None, facts)
        return StoredStep(step, path, is_snapshot, facts)

    def look_at(self, step: int, *, is_snapshot: bool = False) -> StoredStep:
        """Look at one step directory; it need not exist."""
        path = self.path_of(step, is_snapshot=is_snapshot)
        with self.lock:
            return self._look(step, os.path.basename(path), is_snapshot=is_snapshot)

    def exists(self, path: str) -> bool:
        """Whether anything is there; see `RunStorage.exists`."""
        return os.path.lexists(path)

    def make_way(self, step: int, *, is_snapshot: bool) -> None:
        """Do nothing: the save replaces the directory; see `RunStorage.make_way`."""
        del step, is_snapshot

    def prepare(self) -> None:
        """Create the directory of the run and its notes, and check that both can be written.

        Raises:
            ConfigError: If this is the directory of a checkpoint, and not of a run.
            WriteError: If the file system refuses.
        """
        self._list()
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
            self.write_notes(stored, leaving)
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
        self.write_notes(stored, StepNotes(notes.save_id, notes.is_pinned, notes.metrics))
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

    def remove_dead_saves(self) -> None:
        """Delete what dead saves left; see `RunStorage.remove_dead_saves`."""
        # Not at the top: it imports torch, which takes seconds.
        from dcp_hf_writer.save.recover_targets import recover_parent  # noqa: PLC0415

        recover_parent(self.root, "")

    def leftovers(self) -> list[Leftover]:
        """Return what saves and deletions have here; see `RunStorage.leftovers`."""
        return local_leftovers(self.root)

    def sizes_of(self, stored: StoredStep) -> dict[str, int]:
        """Return the size of every file of a step; see `RunStorage.sizes_of`."""
        return open_directory(stored.path).tree()

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

    def write_notes(self, stored: StoredStep, notes: StepNotes) -> None:
        """Replace the notes; see `RunStorage.write_notes`."""
        self._replace_file(self._notes_path(stored), json.dumps(notes.to_json()).encode())

    def _replace_file(self, path: str, data: bytes) -> None:
        """Write a file whole or not at all. The draft lies outside of the checkpoint."""
        draft = os.path.join(self.root, NOTES, f"draft-{uuid.uuid4().hex}")
        replace_durably(path, data, draft=draft)

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
