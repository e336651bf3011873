"""The directory that a save writes into, and the one rename that publishes it.

A save writes into `.incomplete-<save id>` beside its target. The name contains no part of the
target's name, because trainers look for `step-<n>` anywhere in a name. A record inside the
directory names the target and the process that saves. By that record, the next save to the same
target finds and removes what a dead save left.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any

from dcp_hf_writer.errors import (
    CommitError,
    NodeLocalPathError,
    StorageError,
    TargetExistsError,
    WriteError,
)
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME
from dcp_hf_writer.save.owner_process import (
    Owner,
    is_abandoned,
    is_over_here,
    mark_active,
    mark_ended,
)
from dcp_hf_writer.storage.linux_calls import UnsupportedCallError, exchange
from dcp_hf_writer.storage.output_place import check_output_place
from dcp_hf_writer.storage.posix_outputs import (
    OutputFile,
    make_directories,
    publish_new,
    sync_directory,
    write_errors,
)

_log = logging.getLogger(__name__)

_RECORD_NAME = ".dcp-hf-save.json"
_INCOMPLETE = ".incomplete-"
_REPLACED = ".replaced-"

# A directory with one of these files is a checkpoint, so `overwrite=True` may replace it.
_CHECKPOINT_FILES = (MANIFEST_NAME, METADATA_NAME)

_probed: set[str] = set()

# Ids of this process's saves that are visible, but whose name may not be durable.
_kept: set[str] = set()


@dataclass(frozen=True, slots=True)
class StagingDirectory:
    """The directory of one save; the same values on every rank."""

    target: str
    """Absolute path of the checkpoint once it is published."""
    save_id: str
    """Id of the save."""

    @property
    def path(self) -> str:
        """Where the save writes until the commit."""
        return os.path.join(os.path.dirname(self.target), _INCOMPLETE + self.save_id)

    def create(self, *, overwrite: bool) -> OutputFile:
        """Make the directory (coordinator). If this raises, it leaves nothing behind.

        First finishes or removes what dead saves to this target left.

        Returns:
            The open record file of the save; the caller syncs it while it writes the rest.

        Raises:
            TargetExistsError: If the target exists and may not be replaced.
            WriteError: If the file system refuses an operation.
        """
        parent = os.path.dirname(self.target)
        check_output_place(self.target)
        make_directories(parent)
        _recover(self.target)
        check_target(self.target, overwrite=overwrite)
        mark_active(self.save_id)
        try:
            _probe_once(parent, self.save_id)
            _collect_leftovers(self.target)
            with write_errors(self.path):
                os.mkdir(self.path)
            record = {
                "save_id": self.save_id,
                "target": self.target,
                "owner": Owner.me().to_json(),
            }
            file = OutputFile(os.path.join(self.path, _RECORD_NAME), create=True)
            try:
                file.write(memoryview(json.dumps(record).encode()), 0)
            except BaseException:
                file.discard()
                raise
        except BaseException:
            self.remove()
            raise
        return file

    def check_visible(self, *, rank: int) -> None:
        """Check on any rank that this path leads to the directory that the coordinator made.

        Raises:
            NodeLocalPathError: If this rank sees no directory or another one.
        """
        record = _read_json(os.path.join(self.path, _RECORD_NAME))
        found = record.get("save_id") if record else None
        if found != self.save_id:
            msg = "this rank does not see the directory that the coordinator made"
            raise NodeLocalPathError(
                msg,
                rank=rank,
                phase="write",
                path=self.target,
                expected=f"save {self.save_id} in {self.path}",
                found="another save" if found else "no such directory",
                hint="the path seems to be local to each node; save to a shared file system",
            )

    def publish(self, *, overwrite: bool) -> None:
        """Make the checkpoint visible under its name, in one step; durable on return.

        The files in the directory must be durable already.

        Raises:
            TargetExistsError: If the target appeared in the meantime.
            CommitError: If the checkpoint could not be published, or its name may not be durable.
                The message says which.
        """
        parent = os.path.dirname(self.target)
        try:
            os.unlink(os.path.join(self.path, _RECORD_NAME))
            sync_directory(self.path)
            if overwrite and os.path.lexists(self.target):
                check_target(self.target, overwrite=True)
                self._replace()
            else:
                publish_new(self.path, self.target)
        except StorageError:
            raise
        except FileExistsError as error:
            raise _exists(self.target, "it appeared while the checkpoint was written") from error
        except OSError as error:
            msg = "the finished checkpoint could not be given its name"
            raise CommitError(
                msg,
                phase="commit",
                path=self.target,
                found=f"{errno.errorcode.get(error.errno or 0, '?')}: {error.strerror}",
                errno=error.errno,
                hint="earlier checkpoints are untouched; you may repeat the save",
            ) from error
        try:
            sync_directory(parent)
        except WriteError as error:
            # After an exchange, only the replaced checkpoint is known to be durable: keep it.
            self.keep()
            msg = "the checkpoint is visible, but its name may not survive a power cut"
            raise CommitError(
                msg, phase="commit", path=self.target, found=error.found, errno=error.errno
            ) from error
        # After an exchange, this path holds the checkpoint that the new one replaced.
        self.remove()

    def keep(self) -> None:
        """Keep what is left of the directory; the next save decides again whether to remove it."""
        _kept.add(self.save_id)
        mark_ended(self.save_id)

    def _replace(self) -> None:
        parent = os.path.dirname(self.target)
        try:
            exchange(self.path, self.target)
        except UnsupportedCallError:
            # Two renames instead. If a crash comes between them, `_recover` finishes or undoes it.
            aside = os.path.join(parent, _REPLACED + self.save_id)
            os.rename(self.target, aside)
            try:
                publish_new(self.path, self.target)
            except BaseException:
                os.rename(aside, self.target)
                raise
            sync_directory(parent)
            remove_tree(aside)
        except OSError:
            # As in `publish_new`: the exchange may have happened although it reports an error.
            new = _read_json(os.path.join(self.target, MANIFEST_NAME))
            if new is None or new.get("save_id") != self.save_id:
                raise

    def remove(self) -> None:
        """Remove what is left of the directory, unless `keep` was called; safe to call twice."""
        mark_ended(self.save_id)
        if self.save_id not in _kept:
            remove_tree(self.path)


def check_target(target: str, *, overwrite: bool) -> None:
    """Check that a checkpoint may take this name.

    Raises:
        TargetExistsError: If the target exists and may not be replaced.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise _exists(target, "pass overwrite=True to replace it, or save under another name")
    if os.path.islink(target) or not os.path.isdir(target):
        raise _exists(target, "it is not a directory, so it is not replaced; use another name")
    names = os.listdir(target)
    if names and not any(name in names for name in _CHECKPOINT_FILES):
        raise _exists(target, "it holds no checkpoint, so it is not replaced; use another name")


def _exists(target: str, hint: str) -> TargetExistsError:
    kind = "a symbolic link" if os.path.islink(target) else "a file"
    if os.path.isdir(target) and not os.path.islink(target):
        kind = "a directory" if os.listdir(target) else "an empty directory"
    return TargetExistsError(
        "the target of the save already exists",
        phase="plan",
        path=target,
        expected="a free name",
        found=kind,
        hint=hint,
        errno=errno.EEXIST,
    )


def remove_tree(path: str) -> None:
    """Remove a directory tree; if that fails, log it and leave the rest to the next save."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("could not remove %s (%s); the next save tries again", path, error)


def _probe_once(parent: str, save_id: str) -> None:
    """Rename an empty directory in `parent`, to find out early whether the commit can do so.

    Equal device numbers prove nothing: two bind mounts of one file system refuse renames.
    """
    if parent in _probed:
        return
    before = os.path.join(parent, f"{_INCOMPLETE}{save_id}.probe")
    after = before + "d"
    with write_errors(parent):
        os.mkdir(before)
        try:
            os.rename(before, after)
        except BaseException:
            os.rmdir(before)
            raise
        os.rmdir(after)
    sync_directory(parent)
    _probed.add(parent)


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _recover(target: str) -> None:
    """Finish or undo an overwrite that a crash interrupted between its two renames."""
    parent = os.path.dirname(target)
    for entry in _entries(parent, _REPLACED):
        save_id = entry.name[len(_REPLACED) :]
        manifest = _read_json(os.path.join(entry.path, MANIFEST_NAME))
        staged = StagingDirectory(target, save_id)
        new = _read_json(os.path.join(staged.path, MANIFEST_NAME))
        current = _read_json(os.path.join(target, MANIFEST_NAME))
        if current is not None and current.get("save_id") == save_id:
            remove_tree(entry.path)
        elif not os.path.lexists(target) and new is not None and new.get("target") == target:
            publish_new(staged.path, target)
            sync_directory(parent)
            remove_tree(entry.path)
        elif not os.path.lexists(target) and manifest and manifest.get("target") == target:
            os.rename(entry.path, target)
            sync_directory(parent)


def _collect_leftovers(target: str) -> None:
    """Remove what dead saves to this target left; age does not count, and live saves are safe."""
    parent = os.path.dirname(target)
    committed = _read_json(os.path.join(target, MANIFEST_NAME)) or {}
    if os.path.isdir(StagingDirectory(target, str(committed.get("save_id"))).path):
        # An earlier exchange may not be durable yet. Make it so before the loop below removes the
        # checkpoint that it replaced.
        sync_directory(parent)
    for entry in _entries(parent, _INCOMPLETE):
        save_id = entry.name[len(_INCOMPLETE) :]
        if committed.get("save_id") == save_id:
            # That save was exchanged with the target: this is the checkpoint that it replaced.
            remove_tree(entry.path)
            continue
        record = _read_json(os.path.join(entry.path, _RECORD_NAME)) or _read_json(
            os.path.join(entry.path, MANIFEST_NAME)
        )
        if record is None:
            _remove_unclaimed(entry.path, save_id)
            continue
        owner = Owner.from_json(record.get("owner"))
        if owner is None or record.get("target") != target:
            continue
        abandoned = is_abandoned(save_id, owner)
        if abandoned:
            _log.info("removing what a dead save left in %s", entry.path)
            remove_tree(entry.path)
        elif abandoned is None:
            _log.warning(
                "%s belongs to process %d on %s, which cannot be seen from here; remove the "
                "directory by hand if that job is gone",
                entry.path,
                owner.pid,
                owner.host,
            )


def _remove_unclaimed(path: str, save_id: str) -> None:
    """Remove a directory without a record, if its name tells that its save is over on this host.

    The process of that save was killed before the record was complete or while it removed the
    directory, or it could not remove the directory.
    """
    if is_over_here(save_id.partition(".")[0]):
        remove_tree(path)


def _entries(parent: str, prefix: str) -> list[os.DirEntry[str]]:
    with os.scandir(parent) as entries:
        found = [
            e for e in entries if e.name.startswith(prefix) and e.is_dir(follow_symlinks=False)
        ]
    return sorted(found, key=lambda e: e.name)
