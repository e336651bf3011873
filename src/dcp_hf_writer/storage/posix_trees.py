"""Directory trees on a POSIX file system: list, link, move, lock and remove them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.storage.posix_outputs import mount_points, publish_new, sync_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_log = logging.getLogger(__name__)

# An NFS client keeps a deleted file under such a name while a process has it open.
_DELETED_ON_NFS = ".nfs"

# A lock is held for milliseconds. Whoever holds it for longer is stopped, or left a fork behind.
_LOCK_S = 10.0
_POLL_S = 0.01

# What flock reports on a file system that has no locks.
_NO_LOCKS = frozenset(
    {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM}
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a tree, and what it stands for."""

    inode: int
    """Inode number. A hard link to a file has the same one."""
    is_directory: bool
    """Whether it is a directory; a symbolic link to one is not."""


def entry_of(path: str) -> Entry | None:
    """Return what a path stands for, without following a symbolic link; `None` if it is free."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Entry(found.st_ino, stat.S_ISDIR(found.st_mode))


def list_tree(root: str) -> dict[str, Entry]:
    """Return everything below a directory by relative path; a directory precedes its content.

    Names that vanish meanwhile are left out. Symbolic links are listed, not followed.

    Raises:
        OSError: If a directory cannot be listed.
    """
    found: dict[str, Entry] = {}
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        for name in _names_in(os.path.join(root, parent)):
            path = os.path.join(parent, name)
            # Not the inode number that the listing gives: overlayfs may tell two different ones.
            entry = entry_of(os.path.join(root, path))
            if entry is None:
                continue
            found[path] = entry
            if entry.is_directory:
                waiting.append(path)
    return found


def _names_in(path: str) -> list[str]:
    try:
        return [name for name in os.listdir(path) if not name.startswith(_DELETED_ON_NFS)]
    except FileNotFoundError:
        return []


def parents_of(paths: Iterable[str]) -> frozenset[str]:
    """Return every directory above any of some relative paths; the root is not among them."""
    found: set[str] = set()
    for path in paths:
        parent = os.path.dirname(path)
        while parent and parent not in found:
            found.add(parent)
            parent = os.path.dirname(parent)
    return frozenset(found)


def link_entry(source: str, target: str, *, is_directory: bool) -> bool:
    """Give a file a second name, or make a directory with the mode of another one.

    Returns:
        `False` if `source` is gone.

    Raises:
        OSError: If the file system refuses, or `target` exists (`FileExistsError`).
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        if not is_directory:
            # A symbolic link is linked itself, not the file that it names.
            os.link(source, target, follow_symlinks=False)
            return True
        mode = stat.S_IMODE(os.lstat(source).st_mode)
    except FileNotFoundError:
        return False
    os.mkdir(target)
    # The owner keeps the right to fill and remove it.
    os.chmod(target, mode | stat.S_IRWXU)
    return True


def unlink_entry(path: str) -> None:
    """Remove a file, or a directory if it is empty; nothing happens if the name is free."""
    found = entry_of(path)
    if found is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if not found.is_directory:
            os.unlink(path)
            return
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise


def move_entry(source: str, target: str) -> bool:
    """Rename a file or directory to a free name.

    Returns:
        `False` if `source` is gone.

    Raises:
        OSError: If `target` exists (`FileExistsError`), or the rename fails.
    """
    if not os.path.lexists(source):
        return False
    os.makedirs(os.path.dirname(target), exist_ok=True)
    publish_new(source, target)
    return True


def sync_directories(root: str, paths: Iterable[str]) -> None:
    """Make the names durable in a directory, and in directories below it that still exist.

    Raises:
        WriteError: If the file system refuses.
    """
    for path in sorted({"", *paths}):
        if os.path.isdir(os.path.join(root, path)):
            sync_directory(os.path.join(root, path))


def is_mount_point(path: str) -> bool:
    """Whether something is mounted at a path; bind mounts count too."""
    return os.path.ismount(path) or os.path.realpath(path) in mount_points()


def remove_tree(path: str) -> None:
    """Remove a directory tree; if that fails, log it and leave the rest to the next save."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("could not remove %s (%s); the next save tries again", path, error)


@contextmanager
def locked_directories(*paths: str) -> Iterator[None]:
    """Hold locks on directories while two names change; a free name is not locked.

    The locks keep two saves to one target apart, where the file system has locks (flock). They
    belong to the directories, not to their names, and the kernel frees those of a dead process.
    """
    with contextlib.ExitStack() as stack:
        until = time.monotonic() + _LOCK_S
        for path in paths:
            while (fd := _try_lock(path)) is _BUSY and time.monotonic() < until:
                time.sleep(_POLL_S)
            if fd is _BUSY:
                _log.warning("another process has held the lock of %s for %g s", path, _LOCK_S)
            elif fd is not None:
                stack.callback(_unlock, fd)
        yield


_BUSY = -1


def _try_lock(path: str) -> int | None:
    """Return a descriptor with the lock; `None` if there is nothing to lock, or `_BUSY`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = entry_of(path)
        if found is not None and found.inode == os.fstat(fd).st_ino:
            return fd
        # The name moved to another directory in between.
        _unlock(fd)
    except OSError as error:
        os.close(fd)
        if error.errno in _NO_LOCKS:
            return None
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            raise
    return _BUSY


def _unlock(fd: int) -> None:
    # A process that was forked meanwhile shares the descriptor, so closing it would not unlock.
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
