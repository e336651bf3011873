"""Look at the place where a checkpoint will appear, before anything is written there."""

from __future__ import annotations

import errno
import os

from dcp_hf_writer.errors import TargetExistsError, WriteError

# `access` asks for the effective user, as every later system call does, where it can.
_IS_EFFECTIVE = os.access in os.supports_effective_ids


def check_output_place(target: str) -> None:
    """Check that a directory can be made at `target`: the parents are directories, and writable.

    Writes nothing. Says nothing about a directory that is there already.

    Args:
        target: Absolute path of the checkpoint.

    Raises:
        TargetExistsError: If `target` is a file.
        WriteError: If a parent of `target` is a file, or the user may not write there.
    """
    if os.path.lexists(target) and not os.path.isdir(target) and not os.path.islink(target):
        msg = "the target of the save already exists, and it is a file"
        raise TargetExistsError(
            msg,
            phase="plan",
            path=target,
            expected="a free name, or a directory",
            found="a file",
            errno=errno.EEXIST,
            hint="a file is not replaced, not even with overwrite=True; save under another name",
        )
    above = existing_parent(target)
    if not os.path.isdir(above):
        raise _not_a_directory(target, above)
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=_IS_EFFECTIVE):
        raise _not_writable(target, above)


def existing_parent(target: str) -> str:
    """Return the lowest parent of an absolute path that is there, whatever it is."""
    above = os.path.dirname(target)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    return above


def _not_a_directory(target: str, above: str) -> WriteError:
    is_link = os.path.islink(above)
    msg = "a parent of the checkpoint is not a directory"
    return WriteError(
        msg,
        phase="plan",
        path=above,
        expected=f"a directory, to make {target} in",
        found=f"a symbolic link to {os.path.realpath(above)}, which is not there or no directory"
        if is_link
        else "a file",
        errno=errno.ENOTDIR,
        hint="save to another path, or move what is there away",
    )


def _not_writable(target: str, above: str) -> WriteError:
    is_read_only = bool(os.statvfs(above).f_flag & os.ST_RDONLY)
    number = errno.EROFS if is_read_only else errno.EACCES
    msg = "the checkpoint cannot be made here"
    return WriteError(
        msg,
        phase="plan",
        path=above,
        expected=f"a directory that this user may write to, to make {target} in",
        found=f"{errno.errorcode[number]}: {os.strerror(number)}",
        errno=number,
        hint="the file system is read-only"
        if is_read_only
        else "the directory is not writable by this user",
    )
