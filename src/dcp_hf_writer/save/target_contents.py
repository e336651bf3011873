"""What the target of a save already holds: which files belong to a checkpoint, and which do not.

The files of a checkpoint are those that its manifest lists, or, for a checkpoint of torch's own
writer, those that its `.metadata` names. Only they are replaced. All other files stay, whatever
their names are.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import _StorageInfo

from dcp_hf_writer.errors import CorruptCheckpointError, TargetExistsError
from dcp_hf_writer.formats.names_on_disk import (
    DIGESTS_DIRECTORY,
    MANIFEST_NAME,
    METADATA_NAME,
    digests_file_name,
    is_digests_file,
    rank_of_dcp_file,
)
from dcp_hf_writer.formats.parse_dcp_metadata import MAX_METADATA_NBYTES, parse_metadata
from dcp_hf_writer.plan.parse_manifest import (
    MAX_MANIFEST_NBYTES,
    is_relative_name,
    parse_manifest,
)
from dcp_hf_writer.storage.posix_trees import entry_of, is_mount_point, list_tree, parents_of

if TYPE_CHECKING:
    from collections.abc import Collection

# A directory with one of these files is a checkpoint, so only `overwrite=True` may replace it.
_CHECKPOINT_FILES = (MANIFEST_NAME, METADATA_NAME)


def own_files(directory: str) -> frozenset[str]:
    """Return the files that belong to the checkpoint in a directory, by relative path.

    If the manifest or `.metadata` is damaged, only what can still be told is returned: files that
    nothing readable lists count as files of others. Empty if the directory holds no checkpoint.
    """
    found = {name for name in _CHECKPOINT_FILES if os.path.lexists(os.path.join(directory, name))}
    listed = _listed_by_manifest(directory)
    if listed is None:
        listed = _named_by_metadata(directory)
        if MANIFEST_NAME in found:
            # Only this package gives files such names, so a damaged manifest need not list them.
            listed = {*listed, *_digests_files(directory)}
    return frozenset(found | {name for name in listed if is_relative_name(name)})


def _listed_by_manifest(directory: str) -> Collection[str] | None:
    path = os.path.join(directory, MANIFEST_NAME)
    data = _read(path, MAX_MANIFEST_NBYTES)
    try:
        return None if data is None else parse_manifest(data, path=path).sizes().keys()
    except CorruptCheckpointError:
        return None


def _named_by_metadata(directory: str) -> Collection[str]:
    path = os.path.join(directory, METADATA_NAME)
    data = _read(path, MAX_METADATA_NBYTES)
    try:
        storage = {} if data is None else parse_metadata(data, path=path).storage_data
    except CorruptCheckpointError:
        return ()
    return {info.relative_path for info in storage.values() if isinstance(info, _StorageInfo)}


def _digests_files(directory: str) -> Collection[str]:
    try:
        names = os.listdir(os.path.join(directory, DIGESTS_DIRECTORY))
    except OSError:
        return ()
    return {f"{DIGESTS_DIRECTORY}/{name}" for name in names if is_digests_file(name)}


def _read(path: str, most_nbytes: int) -> bytes | None:
    try:
        with open(path, "rb") as file:
            data = file.read(most_nbytes + 1)
    except OSError:
        return None
    return data if len(data) <= most_nbytes else None


def check_target(
    target: str,
    *,
    overwrite: bool,
    new_files: Collection[str] = (),
    world_size: int | None = None,
) -> None:
    """Check that a checkpoint may take this name.

    A free name may be taken, and so may a directory without a checkpoint. With `overwrite`, a
    directory with a checkpoint may be taken too.

    Args:
        target: Absolute path of the checkpoint.
        overwrite: Whether a checkpoint may be replaced.
        new_files: Files that the save will make, by path within the checkpoint. None of these
            names may belong to a file of others.
        world_size: Number of ranks of the save, each of which makes DCP files; `None` if the names
            of these files are not known yet.

    Raises:
        TargetExistsError: If the target may not be taken; the error says why.
    """
    if not os.path.lexists(target):
        return
    if os.path.islink(target) or not os.path.isdir(target):
        raise exists(target, "it is not a directory, so it is not replaced; use another name")
    names = os.listdir(target)
    if not overwrite and any(name in names for name in _CHECKPOINT_FILES):
        raise exists(target, "pass overwrite=True to replace it, or save under another name")
    if is_mount_point(target):
        raise exists(
            target,
            "something is mounted there, so the checkpoint cannot take its name in one step; save "
            "into a directory below it",
        )
    _check_names(target, names, new_files, world_size)


def _check_names(
    target: str, names: Collection[str], new_files: Collection[str], world_size: int | None
) -> None:
    planned = {METADATA_NAME, MANIFEST_NAME, *new_files}
    for name in names:
        rank = rank_of_dcp_file(name)
        if rank is not None and world_size is not None and rank < world_size:
            planned.add(name)
    if DIGESTS_DIRECTORY in names:
        planned |= {digests_file_name(rank) for rank in range(world_size or 1)}
    there = {
        name: entry
        for name in planned | parents_of(planned)
        if (entry := entry_of(os.path.join(target, name))) is not None
    }
    if not there:
        return
    own = own_files(target)
    ours = own | parents_of(own)
    for name in sorted(there):
        if name not in ours:
            raise collision(target, name)


def collision(target: str, name: str) -> TargetExistsError:
    """Return the error for a file or directory of others that has a name which the save needs."""
    path = os.path.join(target, name)
    kind = "a directory" if os.path.isdir(path) else "a file"
    return TargetExistsError(
        "the target holds something with a name that the checkpoint needs",
        phase="plan",
        path=path,
        expected="a free name, or a file of the checkpoint that is replaced",
        found=f"{kind} that no manifest or .metadata of a checkpoint there lists",
        hint="it is not replaced: move it away, or save under another name",
        errno=errno.EEXIST,
    )


def exists(target: str, hint: str) -> TargetExistsError:
    """Return the error for a target that may not be taken."""
    kind = "a symbolic link" if os.path.islink(target) else "a file"
    if os.path.isdir(target) and not os.path.islink(target):
        names = os.listdir(target)
        kind = "a directory" if names else "an empty directory"
        if any(name in names for name in _CHECKPOINT_FILES):
            kind = "a checkpoint"
    return TargetExistsError(
        "the target of the save already exists",
        phase="plan",
        path=target,
        expected="a free name, or a directory without a checkpoint",
        found=kind,
        hint=hint,
        errno=errno.EEXIST,
    )


def has_files_of_others(directory: str, own: Collection[str]) -> bool:
    """Whether a directory holds anything that does not belong to its checkpoint."""
    ours = {*own, *parents_of(own)}
    return any(path not in ours for path in list_tree(directory))


def is_working_directory(path: str) -> bool:
    """Whether this process has a directory as its working directory."""
    try:
        return os.path.samefile(os.curdir, path)
    except OSError:
        return False


def has_other_rights(directory: str, other: str) -> bool:
    """Whether two directories differ in mode, owner or group."""
    one, two = os.stat(directory), os.stat(other)
    return (one.st_mode, one.st_uid, one.st_gid) != (two.st_mode, two.st_uid, two.st_gid)
