"""Carry the files of others from a directory into the one that takes its name.

First `carry_over` gives each of these files a second name in the new directory: a hard link, so a
process that has the file open goes on with the same file. Then the two directories swap names.
`bring_changes` repeats in the visible directory what others did in the hidden one meanwhile: files
that they added, replaced or removed.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from dcp_hf_writer.save.target_contents import collision
from dcp_hf_writer.storage.posix_trees import (
    Entry,
    entry_of,
    link_entry,
    list_tree,
    move_entry,
    parents_of,
    unlink_entry,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_log = logging.getLogger(__name__)


def carry_over(
    source: str,
    into: str,
    *,
    own: Collection[str],
    taken: Collection[str],
    carried: dict[str, Entry],
) -> None:
    """Link everything that is not the old checkpoint's into the new directory.

    A second call brings the links up to date with what changed in `source` meanwhile.

    Args:
        source: The directory that will be replaced.
        into: The new directory.
        own: Files of the old checkpoint, by relative path; they are not carried.
        taken: Everything that the save made in `into`.
        carried: What was carried so far, by relative path; updated. For a directory, the inode is
            that of the directory in `source`.

    Raises:
        TargetExistsError: If a file of others has a name that the save has taken.
        OSError: If the file system refuses a link.
    """
    there = list_tree(source)
    own_directories = parents_of(own)
    for path in sorted(carried, reverse=True):
        if there.get(path) != carried[path]:
            unlink_entry(os.path.join(into, path))
            del carried[path]
    for path, entry in there.items():
        if path in own or path in own_directories or path in carried:
            continue
        if path in taken:
            raise collision(source, path)
        target = os.path.join(into, path)
        if link_entry(os.path.join(source, path), target, is_directory=entry.is_directory):
            linked = entry if entry.is_directory else entry_of(target)
            if linked is not None:
                carried[path] = linked


def bring_changes(
    source: str,
    into: str,
    *,
    own: Collection[str],
    carried: Mapping[str, Entry],
    save_id: str,
) -> None:
    """Repeat in the visible directory what others changed in the hidden one.

    Never overwrites what is newer in `into`. Two different files with one name are both kept: the
    one in `source` gets the name `<name>.kept-<save id>`. Does nothing if `source` is no directory.
    Safe to call twice.

    Args:
        source: The hidden directory: the old one, or the new one after the old got its place back.
        into: The directory that has the name of the checkpoint.
        own: Files of the old checkpoint, by relative path; they stay in `source`.
        carried: What was linked from one to the other, by relative path, as it was then.
        save_id: Id of the save.

    Raises:
        OSError: If the file system refuses an operation.
    """
    if not os.path.isdir(source):
        return
    there = list_tree(source)
    for path in sorted(carried, reverse=True):
        if path not in there:
            # Others removed it.
            _remove_unchanged(os.path.join(into, path), carried[path])
    own_directories = parents_of(own)
    moved: set[str] = set()
    for path, entry in there.items():
        if os.path.dirname(path) in moved:
            moved.add(path)
        elif path not in own and path not in own_directories:
            names = os.path.join(source, path), os.path.join(into, path)
            if _bring(*names, entry, known=carried.get(path), save_id=save_id):
                moved.add(path)


def _remove_unchanged(path: str, carried: Entry) -> None:
    found = entry_of(path)
    if found is not None and (found == carried or (found.is_directory and carried.is_directory)):
        unlink_entry(path)


def _bring(hidden: str, visible: str, entry: Entry, *, known: Entry | None, save_id: str) -> bool:
    """Bring one file or directory; returns whether it left the hidden directory."""
    found = entry_of(visible)
    if entry.is_directory and (
        (known is not None and known.is_directory) or (found is not None and found.is_directory)
    ):
        # Its content is looked at file by file.
        return False
    if entry in (found, known):
        # The same file, or unchanged here: then the visible directory has the newer state.
        return False
    if found is not None and found == known and not found.is_directory and not entry.is_directory:
        # Replaced here after it was linked.
        os.replace(hidden, visible)
        return True
    if found is not None and known is not None:
        # Replaced in both: first here, then in the visible directory.
        return False
    try:
        return move_entry(hidden, visible)
    except FileExistsError:
        return keep_aside(hidden, visible, save_id)


def keep_aside(path: str, name: str, save_id: str) -> bool:
    """Keep a file of others whose name is taken, as `<name>.kept-<save id>`.

    Returns:
        `False` if the file is gone.

    Raises:
        OSError: If the file system refuses the rename.
    """
    kept = f"{name}.kept-{save_id}"
    _log.warning(
        "%s appeared while a checkpoint took its name; what was there is kept as %s", name, kept
    )
    return move_entry(path, kept)
