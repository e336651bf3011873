"""The directory that a save writes into, and the step that publishes it.

A save writes into `.incomplete-<save id>` beside its target. The name contains no part of the
target's name, because trainers look for `step-<n>` anywhere in a name. A record inside the
directory names the target and the process that saves. By that record, the next save in the same
parent directory finds and removes what a dead save left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CommitError, NodeLocalPathError, StorageError, WriteError
from dcp_hf_writer.formats.names_on_disk import HEARTBEATS_NAME, INCOMPLETE, RECORD_NAME
from dcp_hf_writer.save.owner_process import Owner, mark_active, mark_ended, new_save_id
from dcp_hf_writer.save.progress_heartbeat import replace_file
from dcp_hf_writer.save.recover_targets import recover_parent
from dcp_hf_writer.save.replace_target import (
    DISCARDED_SUFFIX,
    FRESH_SUFFIX,
    RECORD_SUFFIX,
    TargetReplacement,
    discard,
    read_json,
    saved_id,
)
from dcp_hf_writer.save.target_contents import check_target, exists
from dcp_hf_writer.storage.output_place import check_output_place
from dcp_hf_writer.storage.posix_outputs import (
    OutputFile,
    make_directories,
    number_and_text,
    publish_new,
    sync_directory,
    write_errors,
)
from dcp_hf_writer.storage.posix_trees import locked_directories, remove_tree, unlink_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_log = logging.getLogger(__name__)

_probed: set[str] = set()

# Ids of this process's saves that are visible, but left something for the next save to tidy up.
_kept: set[str] = set()


@dataclass(frozen=True, slots=True)
class StagingDirectory:
    """The directory of one save; the same values on every rank."""

    target: str
    """Absolute path of the checkpoint once it is published."""
    save_id: str
    """Id of the save."""

    @classmethod
    def of(cls, target: str, save_id: str) -> StagingDirectory:
        """Return the directory of a save; a link to a directory stands for that directory."""
        is_link = os.path.islink(target) and os.path.isdir(target)
        return cls(os.path.realpath(target) if is_link else target, save_id)

    @property
    def path(self) -> str:
        """Where the save writes until the commit."""
        return os.path.join(os.path.dirname(self.target), INCOMPLETE + self.save_id)

    def create(
        self,
        *,
        overwrite: bool,
        new_files: Collection[str] = (),
        world_size: int | None = None,
    ) -> OutputFile:
        """Make the directory (coordinator). If this raises, it leaves nothing behind.

        First finishes, undoes or removes what dead saves left in the parent directory.

        Args:
            overwrite: Whether the save may replace a checkpoint.
            new_files: As in `check_target`.
            world_size: As in `check_target`.

        Returns:
            The open record file of the save; the caller syncs it while it writes the rest.

        Raises:
            TargetExistsError: If the target may not be taken.
            WriteError: If the file system refuses an operation.
        """
        parent = os.path.dirname(self.target)
        check_output_place(self.target)
        make_directories(parent)
        recover_parent(parent, self.target)
        check_target(self.target, overwrite=overwrite, new_files=new_files, world_size=world_size)
        mark_active(self.save_id, self.path)
        try:
            _probe_once(parent, self.save_id)
            with write_errors(self.path):
                os.mkdir(self.path)
            self._make_place_of_heartbeats()
            record = {
                "save_id": self.save_id,
                "target": self.target,
                "owner": Owner.me().to_json(),
            }
            file = OutputFile(os.path.join(self.path, RECORD_NAME), create=True)
            try:
                file.write(memoryview(json.dumps(record).encode()), 0)
            except BaseException:
                file.discard()
                raise
        except BaseException:
            self.remove()
            raise
        return file

    @property
    def _heartbeats(self) -> str:
        return os.path.join(self.path, HEARTBEATS_NAME)

    @property
    def _old_heartbeats(self) -> str:
        """Where the heartbeats go before the commit; the name allows anybody to remove them."""
        return f"{self.path}.live{DISCARDED_SUFFIX}"

    def _make_place_of_heartbeats(self) -> None:
        try:
            os.mkdir(self._heartbeats)
        except OSError as error:
            _log.warning("the save of %s has no live status: %s", self.target, error)

    def _take_heartbeats_out(self) -> None:
        """Move the heartbeats to a name of their own; a rank that writes one now fails to.

        Raises:
            OSError: If they stay where they are.
        """
        with contextlib.suppress(FileNotFoundError):
            try:
                # The usual case: the save was too short for a heartbeat.
                os.rmdir(self._heartbeats)
            except FileNotFoundError:
                raise
            except OSError:
                os.rename(self._heartbeats, self._old_heartbeats)

    def write_heartbeat_of(self, rank: int) -> Callable[[bytes], None]:
        """Return the function that replaces the heartbeat of a rank; it may raise `OSError`."""
        return partial(replace_file, os.path.join(self._heartbeats, f"{rank:05d}.json"))

    def check_visible(self, *, rank: int) -> None:
        """Check on any rank that this path leads to the directory that the coordinator made.

        Raises:
            NodeLocalPathError: If this rank sees no directory or another one.
        """
        record = read_json(os.path.join(self.path, RECORD_NAME))
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

        The files in the directory must be durable already. Files of others in the target stay.

        Raises:
            TargetExistsError: If the target may not be taken; it may have appeared meanwhile.
            CommitError: If the checkpoint could not be published, or its name may not be durable.
                The message says which.
        """
        with locked_directories(self.target, self.path):
            replacement = self._give_name(overwrite=overwrite)
            try:
                sync_directory(os.path.dirname(self.target))
            except WriteError as error:
                # After an exchange, only the replaced directory is known to be durable: keep it.
                self.keep()
                msg = "the checkpoint is visible, but its name may not survive a power cut"
                raise CommitError(
                    msg, phase="commit", path=self.target, found=error.found, errno=error.errno
                ) from error
            if replacement is not None and not replacement.finish():
                self.keep()
        self.remove()

    def _give_name(self, *, overwrite: bool) -> TargetReplacement | None:
        """Publish, not durably; returns what is still to do if the name was taken."""
        try:
            self._take_heartbeats_out()
            os.unlink(os.path.join(self.path, RECORD_NAME))
            sync_directory(self.path)
            if not os.path.lexists(self.target):
                with contextlib.suppress(FileExistsError):
                    publish_new(self.path, self.target)
                    return None
            check_target(self.target, overwrite=overwrite)
            replacement = TargetReplacement(self.path, self.target, self.save_id)
            replacement.give_name()
        except StorageError:
            raise
        except FileExistsError as error:
            raise exists(self.target, "it appeared while the checkpoint was written") from error
        except OSError as error:
            msg = "the finished checkpoint could not be given its name"
            raise CommitError(
                msg,
                phase="commit",
                path=self.target,
                found=number_and_text(error),
                errno=error.errno,
                hint="earlier checkpoints are untouched; you may repeat the save",
            ) from error
        return replacement

    def keep(self) -> None:
        """Keep what is left of the directory; the next save decides again whether to remove it."""
        _kept.add(self.save_id)
        mark_ended(self.save_id, self.path)

    def remove(self) -> None:
        """Remove what is left of the directory, unless `keep` was called; safe to call twice."""
        with contextlib.suppress(OSError):
            # Else a rank might add a heartbeat while its directory is removed.
            self._take_heartbeats_out()
        remove_tree(self._old_heartbeats)
        record = self.path + RECORD_SUFFIX
        if os.path.lexists(record) and saved_id(self.target) == self.save_id:
            # Published, but not tidied up: files of others may be left in the directory.
            self.keep()
        mark_ended(self.save_id, self.path)
        if self.save_id in _kept:
            return
        if not os.path.lexists(record):
            remove_tree(self.path)
            return
        try:
            discard(self.path)
            for path in (record + FRESH_SUFFIX, record):
                unlink_entry(path)
        except OSError as error:
            _log.warning("could not remove %s (%s); the next save tries again", self.path, error)


@contextlib.contextmanager
def new_checkpoint(
    target: str, *, overwrite: bool, new_files: Collection[str] = ()
) -> Iterator[StagingDirectory]:
    """Yield a new directory, which becomes the checkpoint at the end of the `with` statement.

    For one process that writes a whole checkpoint. If the body raises, nothing is left behind.

    Args:
        target: Absolute path of the checkpoint.
        overwrite: Whether it may replace a checkpoint.
        new_files: As in `check_target`.

    Raises:
        StorageError: If the target may not be taken, or the file system refuses an operation.
    """
    directory = StagingDirectory.of(target, new_save_id())
    record = directory.create(overwrite=overwrite, new_files=new_files)
    try:
        with record:
            record.sync()
        yield directory
        directory.publish(overwrite=overwrite)
    finally:
        directory.remove()


def _probe_once(parent: str, save_id: str) -> None:
    """Rename an empty directory in `parent`, to find out early whether the commit can do so.

    Equal device numbers prove nothing: two bind mounts of one file system refuse renames.
    """
    if parent in _probed:
        return
    before = os.path.join(parent, f"{INCOMPLETE}{save_id}.probe")
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
