"""Finish, undo or remove what dead saves left in a directory, by their records.

Every save does this for the whole parent directory of its target. Age never counts, and nothing of
a live save is touched.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import StorageError
from dcp_hf_writer.formats.names_on_disk import INCOMPLETE, MANIFEST_NAME, RECORD_NAME, REPLACED
from dcp_hf_writer.save.carry_files import bring_changes
from dcp_hf_writer.save.owner_process import Owner, is_abandoned, is_over_here
from dcp_hf_writer.save.replace_target import (
    DISCARDED_SUFFIX,
    FRESH_SUFFIX,
    RECORD_SUFFIX,
    TargetRecord,
    discard,
    order_of_moves,
    read_json,
    saved_id,
)
from dcp_hf_writer.save.target_contents import own_files
from dcp_hf_writer.storage.posix_outputs import publish_new, sync_directory, write_errors
from dcp_hf_writer.storage.posix_trees import (
    entry_of,
    locked_directories,
    move_entry,
    remove_tree,
    unlink_entry,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from dcp_hf_writer.storage.posix_trees import Entry

_log = logging.getLogger(__name__)


def recover_parent(parent: str, target: str) -> None:
    """Put right what dead saves left in a directory; errors are logged.

    Args:
        parent: The directory.
        target: Target of the save that asks. About this one, more is logged.

    Raises:
        WriteError: If the directory cannot be listed.
    """
    with write_errors(parent):
        names = os.listdir(parent)
    for name in sorted(names, key=_order):
        step = _step_for(name)
        if step is not None:
            try:
                step(_Leftover(parent, name, target))
            except OSError as error:
                _log.warning(
                    "could not tidy up %s (%s); the next save in that directory tries again",
                    os.path.join(parent, name),
                    error,
                )


class _Leftover:
    """A name that a save may have left."""

    def __init__(self, parent: str, name: str, asking: str) -> None:
        self.parent, self.name = parent, name
        self.path = os.path.join(parent, name)
        self.asking = asking
        prefix = INCOMPLETE if name.startswith(INCOMPLETE) else REPLACED
        self.save_id = name[len(prefix) :].removesuffix(RECORD_SUFFIX)

    @property
    def staged(self) -> str:
        """The directory of that save."""
        return os.path.join(self.parent, INCOMPLETE + self.save_id)

    @property
    def aside(self) -> str:
        """Where that save renames the directory that it replaces."""
        return os.path.join(self.parent, REPLACED + self.save_id)

    @property
    def is_directory(self) -> bool:
        found = entry_of(self.path)
        return found is not None and found.is_directory

    @property
    def has_record(self) -> bool:
        """Whether `TargetRecord` describes it; then that record decides."""
        return os.path.lexists(self.staged + RECORD_SUFFIX)

    def target_of(self, record: Mapping[str, Any] | TargetRecord | None) -> str | None:
        """Return the path of the checkpoint in this parent directory.

        Only the name counts: another host may have reached the parent by another path.
        """
        path = record.target if isinstance(record, TargetRecord) else (record or {}).get("target")
        name = os.path.basename(path) if isinstance(path, str) else ""
        return os.path.join(self.parent, name) if name else None

    def is_of_dead(self, owner: Owner | None, target: str | None) -> bool:
        """Whether no process works on it any more; logs if that cannot be told."""
        abandoned = (
            is_over_here(self.save_id) if owner is None else is_abandoned(self.save_id, owner)
        )
        if abandoned is None and owner is not None:
            level = logging.WARNING if target == self.asking else logging.DEBUG
            _log.log(
                level,
                "%s belongs to process %d on %s, which cannot be seen from here; remove it by hand "
                "if that job is gone",
                self.path,
                owner.pid,
                owner.host,
            )
        return bool(abandoned)

    def may_settle(self, owner: Owner | None, target: str) -> bool:
        """Whether a publication that was begun may be finished or undone.

        For the target of the save that asks, an owner that cannot be seen from here counts as dead:
        two saves to one target at a time are not supported, and the target may have no name now.
        """
        if target == self.asking and owner is not None:
            return is_abandoned(self.save_id, owner) is not False
        return self.is_of_dead(owner, target)


def _order(name: str) -> tuple[int, str]:
    """Sort records first, then what was renamed aside: both decide what becomes of the rest."""
    is_record = name.endswith((RECORD_SUFFIX, RECORD_SUFFIX + FRESH_SUFFIX))
    return 0 if is_record else 1 if name.startswith(REPLACED) else 2, name


def _step_for(name: str) -> Callable[[_Leftover], None] | None:
    if not name.startswith((INCOMPLETE, REPLACED)):
        return None
    if name.endswith(DISCARDED_SUFFIX):
        # Only has to be removed, by anybody.
        return lambda left: remove_tree(left.path) if left.is_directory else None
    if name.endswith(RECORD_SUFFIX + FRESH_SUFFIX):
        return _remove_unfinished_record
    if name.endswith(RECORD_SUFFIX):
        return _recover_by_record
    return _recover_aside if name.startswith(REPLACED) else _recover_directory


def _remove_unfinished_record(left: _Leftover) -> None:
    if is_over_here(left.save_id.removesuffix(RECORD_SUFFIX + FRESH_SUFFIX)):
        unlink_entry(left.path)


def _recover_by_record(left: _Leftover) -> None:
    record = TargetRecord.from_json(read_json(left.path))
    if record is None or record.save_id != left.save_id:
        # The process was killed before the record was durable, so before it changed the target.
        if is_over_here(left.save_id):
            unlink_entry(left.path)
        return
    target = left.target_of(record)
    if target is None or not left.may_settle(record.owner, target):
        return
    _log.info("finishing or undoing what a dead save did to %s", target)
    with locked_directories(target, left.staged):
        _settle(left, record, target)
        sync_directory(left.parent)
        unlink_entry(left.path)


def _settle(left: _Leftover, record: TargetRecord, target: str) -> None:
    is_whole = saved_id(left.staged) == record.save_id
    is_published = saved_id(target) == record.save_id
    if record.way == "in place" and (is_whole or is_published) and os.path.isdir(target):
        for name in order_of_moves(_own_names(left.staged, record)):
            move_entry(os.path.join(left.staged, name), os.path.join(target, name))
        sync_directory(target)
    elif is_published:
        # Make the exchange durable before anything that it replaced is removed.
        sync_directory(left.parent)
        for hidden in (left.aside, left.staged):
            bring_changes(
                hidden, target, own=record.own, carried=record.carried, save_id=left.save_id
            )
    elif os.path.isdir(left.aside):
        _undo_or_finish(left, target, record.own, record.carried)
    elif not is_whole and os.path.isdir(target):
        # It was published, and another save has replaced it since.
        bring_changes(
            left.staged, target, own=record.own, carried=record.carried, save_id=left.save_id
        )
    for hidden in (left.aside, left.staged):
        discard(hidden)


def _own_names(staged: str, record: TargetRecord) -> list[str]:
    if not os.path.isdir(staged):
        return []
    return [name for name in os.listdir(staged) if name not in record.carried]


def _recover_aside(left: _Leftover) -> None:
    """Finish or undo an overwrite of a checkpoint that a crash interrupted between two renames."""
    if left.has_record or not left.is_directory:
        return
    old = read_json(os.path.join(left.path, MANIFEST_NAME))
    new = read_json(os.path.join(left.staged, MANIFEST_NAME))
    target = left.target_of(new) or left.target_of(old)
    if target is None:
        return
    is_published = saved_id(target) == left.save_id
    manifest = read_json(os.path.join(target, MANIFEST_NAME)) if is_published else new
    if not left.may_settle(Owner.from_json((manifest or {}).get("owner")), target):
        return
    with locked_directories(target):
        own = own_files(left.path)
        if is_published:
            bring_changes(left.path, target, own=own, carried={}, save_id=left.save_id)
        else:
            _undo_or_finish(left, target, own, {})
        sync_directory(left.parent)
        discard(left.path)
        discard(left.staged)


def _undo_or_finish(
    left: _Leftover, target: str, own: Collection[str], carried: Mapping[str, Entry]
) -> None:
    """Settle an overwrite whose old directory is aside and whose new one has no name yet."""
    if os.path.lexists(target):
        if not os.path.isdir(target):
            msg = "something else has the name of a checkpoint that was being replaced"
            raise StorageError(msg, phase="plan", path=target, hint="move it away")
        # Somebody made the directory again. Give it back all that it held, but do not mix two
        # checkpoints.
        kept = own if own_files(target) else ()
        bring_changes(left.aside, target, own=kept, carried={}, save_id=left.save_id)
    elif saved_id(left.staged) == left.save_id:
        publish_new(left.staged, target)
        sync_directory(left.parent)
        bring_changes(left.aside, target, own=own, carried=carried, save_id=left.save_id)
    else:
        os.rename(left.aside, target)


def _recover_directory(left: _Leftover) -> None:
    """Remove the directory of a dead save, or what such a save replaced."""
    if left.has_record or not left.is_directory:
        return
    manifest = read_json(os.path.join(left.path, MANIFEST_NAME))
    record = read_json(os.path.join(left.path, RECORD_NAME)) or manifest
    if record is None:
        # Its process was killed before the record was complete or while it removed the directory,
        # or it could not remove the directory.
        if is_over_here(left.save_id.partition(".")[0]):
            discard(left.path)
        return
    target = left.target_of(record)
    if target is not None and saved_id(target) == left.save_id:
        _remove_replaced(left, target)
        return
    owner = Owner.from_json(record.get("owner"))
    if manifest is record and manifest.get("save_id") != left.save_id:
        # A checkpoint that was replaced by a save, which was itself replaced since.
        owner = None
    if target is not None and left.is_of_dead(owner, target):
        _log.info("removing what a dead save left in %s", left.path)
        discard(left.path)


def _remove_replaced(left: _Leftover, target: str) -> None:
    """Remove the checkpoint that a save exchanged with its own, and bring the rest to the target.

    Its manifest tells which files are its own.
    """
    manifest = read_json(os.path.join(target, MANIFEST_NAME)) or {}
    if not left.may_settle(Owner.from_json(manifest.get("owner")), target):
        return
    # The exchange may not be durable yet. Make it so before the old checkpoint is removed.
    sync_directory(left.parent)
    with locked_directories(target, left.path):
        bring_changes(left.path, target, own=own_files(left.path), carried={}, save_id=left.save_id)
        discard(left.path)
