"""Publish a finished directory under a name that another directory has.

The files of others in the old directory are carried into the new one, and the name goes from one to
the other in one step. Where two names can be exchanged (`RENAME_EXCHANGE`), the steps are:

1. Link the files of others into the new directory, and record what was linked (`TargetRecord`).
2. Exchange the names. This is the commit: before it the old checkpoint is there, after it the new
   one, each with the files of others.
3. Give the old directory its place back: remove the old checkpoint's files from it, link the new
   ones into it, and exchange the names again. A process that works in the directory, or holds it
   open, then finds the new checkpoint there.
4. Repeat what others changed in between (`carry_files.bring_changes`), and remove the rest.

Where names cannot be exchanged, a directory without a checkpoint stays where it is, and the files
of the new checkpoint move into it one after another, the manifest last. A directory with a
checkpoint is renamed aside first.

If the process dies, the next save in the same parent directory finishes or undoes the work by the
record (`recover_targets`).
"""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from dcp_hf_writer.errors import CommitError, StorageError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME, REPLACED
from dcp_hf_writer.save.carry_files import bring_changes, carry_over, keep_aside
from dcp_hf_writer.save.owner_process import Owner
from dcp_hf_writer.save.target_contents import (
    collision,
    has_files_of_others,
    has_other_rights,
    is_working_directory,
    own_files,
)
from dcp_hf_writer.storage.linux_calls import UnsupportedCallError, exchange
from dcp_hf_writer.storage.posix_outputs import (
    number_and_text,
    publish_new,
    replace_durably,
    sync_directory,
)
from dcp_hf_writer.storage.posix_trees import (
    Entry,
    entry_of,
    link_entry,
    list_tree,
    move_entry,
    parents_of,
    remove_tree,
    sync_directories,
    unlink_entry,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger(__name__)

RECORD_SUFFIX = ".json"
"""Ends the name of the record of a save that carries files."""
FRESH_SUFFIX = ".new"
"""Ends the name of a record that is still being written."""
DISCARDED_SUFFIX = ".old"
"""Ends the name of a directory that only has to be removed."""

Way = Literal["exchange", "aside", "in place"]

# Errors of an exchange or a link after which a directory without a checkpoint can still be filled
# in place: the file system has no such call, or something in the way is of another file system.
_NOT_HERE = frozenset(
    {
        *(errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY),
        *(errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EMLINK),
    }
)


@dataclass
class TargetRecord:
    """What a save that takes a directory's name does, recorded beside it until it is done."""

    save_id: str
    """Id of the save."""
    target: str
    """Path of the checkpoint."""
    owner: Owner
    """The process that saves."""
    way: Way = "exchange"
    """How the checkpoint gets its name."""
    own: frozenset[str] = frozenset()
    """Files of the old checkpoint, by path within it."""
    carried: dict[str, Entry] = field(default_factory=dict)
    """Files of others that were linked, by path within the checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        carried = {path: [e.inode, e.is_directory] for path, e in self.carried.items()}
        own = sorted(self.own)
        plain = {"save_id": self.save_id, "target": self.target, "owner": self.owner.to_json()}
        return plain | {"way": self.way, "own": own, "carried": carried}

    @classmethod
    def from_json(cls, value: Any) -> TargetRecord | None:
        """Read a record made by `to_json`; returns `None` if `value` is not one."""
        try:
            owner = Owner.from_json(value["owner"])
            carried = {str(p): Entry(int(i), bool(d)) for p, (i, d) in value["carried"].items()}
            own = frozenset(map(str, value["own"]))
            save_id, target, way = value["save_id"], value["target"], value["way"]
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        if owner is None or way not in get_args(Way):
            return None
        return cls(str(save_id), str(target), owner, way, own, carried)


class TargetReplacement:
    """One save that takes the name of an existing directory.

    The caller holds the locks of both directories.
    """

    def __init__(self, staged: str, target: str, save_id: str) -> None:
        """Look at what the target holds.

        Args:
            staged: The finished directory, with a manifest; durable.
            target: The directory that has the name.
            save_id: Id of the save.
        """
        self.staged, self.target = staged, target
        self.record = TargetRecord(save_id, target, Owner.me(), own=own_files(target))
        self.aside = os.path.join(os.path.dirname(target), REPLACED + save_id)
        self._taken = list_tree(staged)
        # Without files of others, all that a recovery needs is the manifest of the old checkpoint.
        old = read_json(os.path.join(target, MANIFEST_NAME)) or {}
        self._has_record = (
            os.path.basename(str(old.get("target"))) != os.path.basename(target)
            or has_files_of_others(target, self.record.own)
            or is_working_directory(target)
            or has_other_rights(target, staged)
        )

    @property
    def record_path(self) -> str:
        """Where the record is."""
        return self.staged + RECORD_SUFFIX

    def give_name(self) -> None:
        """Publish the new directory, with the files of others; not yet durable on return.

        Raises:
            TargetExistsError: If a file of others has a name that the checkpoint needs. Nothing
                was published.
            CommitError: If files of others cannot be linked, or the target changed hands.
            OSError: If the file system refuses an operation. Nothing was published.
        """
        try:
            self._carry()
        except StorageError:
            raise
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            if self.record.own:
                raise self._cannot_carry(error) from error
            self._move_in()
            return
        try:
            self._exchange()
        except OSError as error:
            if not self.record.own and error.errno in _NOT_HERE:
                self._move_in()
            elif isinstance(error, UnsupportedCallError):
                self._rename_aside()
            else:
                raise

    def finish(self) -> bool:
        """Tidy up after the commit, whose name must be durable.

        Returns:
            `False` if something is left. The checkpoint is published all the same, the error is
            logged, and the next save tries again.
        """
        try:
            if self.record.way == "exchange" and self._has_record:
                self._try_to_give_place_back()
            elif self.record.way == "aside":
                self._bring(self.aside)
                discard(self.aside)
            self._bring(self.staged)
            discard(self.staged)
            unlink_entry(self.record_path)
        except OSError as error:
            _log.warning(
                "checkpoint %s is published, but what it replaced could not be tidied up (%s); the "
                "next save in that directory tries again",
                self.target,
                error,
            )
            return False
        return True

    def _carry(self) -> None:
        """Link the files of others twice: the second time only what changed meanwhile is left."""
        self._carry_over()
        if self._has_record:
            self._write_record()
            reach("files carried")
        sync_directories(self.staged, parents_of(self.record.carried))
        self._carry_over()

    def _carry_over(self) -> None:
        record = self.record
        carry_over(
            self.target, self.staged, own=record.own, taken=self._taken, carried=record.carried
        )

    def _write_record(self) -> None:
        data = json.dumps(self.record.to_json()).encode()
        replace_durably(self.record_path, data, draft=self.record_path + FRESH_SUFFIX)

    def _exchange(self) -> None:
        before = entry_of(self.target)
        try:
            exchange(self.staged, self.target)
        except UnsupportedCallError:
            raise
        except OSError:
            # A network file system may exchange and still report an error, so look at the result.
            if saved_id(self.target) != self.record.save_id:
                raise
        if entry_of(self.staged) != before:
            # Another save took the name between the look and the exchange: it keeps the name.
            exchange(self.staged, self.target)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.target)
        reach("names exchanged")

    def _move_in(self) -> None:
        """Move the new files into the directory that has the name, the manifest last."""
        self.record.way = "in place"
        names = order_of_moves(path for path in self._taken if "/" not in path)
        for name in names:
            if os.path.lexists(os.path.join(self.target, name)):
                raise collision(self.target, name)
        self._has_record = True
        self._write_record()
        moved: list[str] = []
        try:
            for name in names:
                move_entry(os.path.join(self.staged, name), os.path.join(self.target, name))
                moved.append(name)
            sync_directory(self.target)
        except OSError:
            for name in reversed(moved):
                move_entry(os.path.join(self.target, name), os.path.join(self.staged, name))
            raise

    def _rename_aside(self) -> None:
        """Rename the old directory aside and the new one in; a crash between is recovered."""
        self.record.way = "aside"
        if self._has_record:
            self._write_record()
        os.rename(self.target, self.aside)
        try:
            publish_new(self.staged, self.target)
        except BaseException:
            os.rename(self.aside, self.target)
            raise

    def _cannot_carry(self, error: OSError) -> CommitError:
        return CommitError(
            "a file that no checkpoint made cannot be carried into the new checkpoint",
            phase="commit",
            path=error.filename or self.target,
            found=number_and_text(error),
            errno=error.errno,
            hint="the old checkpoint and all files are untouched; move the file out of the "
            "checkpoint, or save under another name",
        )

    def _try_to_give_place_back(self) -> None:
        try:
            self._give_place_back()
        except StorageError:
            # It is unknown what a power cut would leave, so nothing may be removed now.
            raise
        except OSError as error:
            _log.info(
                "%s is another directory than before: the file system refused to keep it (%s)",
                self.target,
                error,
            )

    def _give_place_back(self) -> None:
        """Make the old directory hold the new checkpoint, and exchange the names again."""
        old, record = self.staged, self.record
        for path in sorted(record.own, reverse=True):
            unlink_entry(os.path.join(old, path))
        for path in sorted(parents_of(record.own), reverse=True):
            unlink_entry(os.path.join(old, path))
        linked = {""}
        for path, entry in list_tree(self.target).items():
            name = os.path.join(old, path)
            found = entry_of(name)
            if path in record.carried or found == entry:
                continue
            if found is not None and found.is_directory and entry.is_directory:
                continue
            if found is not None:
                keep_aside(name, name, record.save_id)
            source = os.path.join(self.target, path)
            link_entry(source, name, is_directory=entry.is_directory)
            linked.add(path if entry.is_directory else os.path.dirname(path))
        sync_directories(old, linked)
        reach("files linked back")
        exchange(self.staged, self.target)
        sync_directory(os.path.dirname(self.target))
        reach("place given back")

    def _bring(self, hidden: str) -> None:
        one = self.record
        bring_changes(hidden, self.target, own=one.own, carried=one.carried, save_id=one.save_id)


def order_of_moves(names: Iterable[str]) -> list[str]:
    """Return the names at the top of a checkpoint in the order in which they may appear.

    Data first, then `.metadata`, then the manifest: a reader that sees one of the last two finds
    everything that it refers to.
    """
    last = (METADATA_NAME, MANIFEST_NAME)
    return sorted(names, key=lambda name: (last.index(name) + 1 if name in last else 0, name))


def discard(path: str) -> None:
    """Remove a directory for good. It first gets a name that says so, in case of a crash."""
    if not os.path.lexists(path):
        return
    old = path + DISCARDED_SUFFIX
    remove_tree(old)
    os.rename(path, old)
    remove_tree(old)


def saved_id(directory: str) -> str | None:
    """Return the id of the save whose manifest is in a directory; `None` without a manifest."""
    manifest = read_json(os.path.join(directory, MANIFEST_NAME))
    found = None if manifest is None else manifest.get("save_id")
    return found if isinstance(found, str) else None


def read_json(path: str) -> dict[str, Any] | None:
    """Read a JSON object; `None` if the file is missing or holds something else."""
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
