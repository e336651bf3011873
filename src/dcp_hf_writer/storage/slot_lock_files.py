"""The lock files behind `WriteSlots`: where they are, what names them, how one is locked."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash
from filelock import FileLock, Timeout

from dcp_hf_writer.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filelock import BaseFileLock

_logger = logging.getLogger(__name__)

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class SlotFiles:
    """The lock files of one set."""

    directory: str
    key: str
    """Names the file system, and the half where it has a set of its own."""
    count: int

    def path(self, index: int) -> str:
        """Return the lock file of slot `index`."""
        return os.path.join(self.directory, f"{self.key}.{index}.lock")

    def order(self) -> Iterator[int]:
        """Yield every slot once, from one that depends on the process.

        Ranks that start together would otherwise all try slot 0 first.
        """
        first = os.getpid() % self.count
        for step in range(self.count):
            yield (first + step) % self.count

    def holders(self) -> str:
        """Tell who holds the slots, as far as their lock files say; for messages."""
        notes = (_read_holder(self.path(index)) for index in range(self.count))
        return ", ".join(f"slot {index}: {note}" for index, note in enumerate(notes))


def ensure_private_directory() -> str:
    """Make the node's own lock directory where it is missing, check it, and return its path.

    Raises:
        StorageError: If it cannot be made, or what is there under its name is a link, is not the
            user's own, or may be written to by others.
    """
    path = os.path.join(tempfile.gettempdir(), f"dcp-hf-writer-{os.geteuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        # In a directory that all may write to, such as /tmp, someone else may have put anything
        # under the name first, a link to a directory of ours included.
        status = os.lstat(path)
        _require_safe(path, status)
        if status.st_mode & _OPEN_TO_OTHERS:
            # filelock makes a directory that vanished under it anew, with the mode of the umask.
            # Nobody else could write to it, so making it private is enough.
            os.chmod(path, 0o700)
    except StorageError:  # an OSError too
        raise
    except OSError as error:
        raise _directory_error(path, error) from error
    return path


def ensure_given_directory(path: str) -> str:
    """Make the lock directory that the user named where it is missing, check it, and return it.

    Raises:
        StorageError: If it cannot be made, is not the user's own, or others may write to it.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        # Followed, not lstat: the user may name a directory through a link of their own.
        status = os.stat(path)
    except OSError as error:
        raise _directory_error(path, error) from error
    _require_safe(path, status)
    return path


def _require_safe(path: str, status: os.stat_result) -> None:
    """Refuse a directory in which someone else could have placed a lock file.

    Whoever may write to it could link one of our files to a lock's name, and see it overwritten
    with the holder's number.

    Raises:
        StorageError: If `status`, that of `path`, shows that it is not safe.
    """
    flaw = _directory_flaw(status)
    if flaw is not None:
        raise StorageError(
            "the directory of write slots is not safe to use",
            phase="write",
            path=path,
            expected=f"a directory of user {os.geteuid()} that others cannot write to",
            found=flaw,
            hint="remove it, or pass WriteSlots(directory=...) with a private directory",
        )


def _directory_flaw(status: os.stat_result) -> str | None:
    """Return what makes a directory with `status` unsafe, `None` where nothing does."""
    if stat.S_ISLNK(status.st_mode):
        return "a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return "not a directory"
    if status.st_uid != os.geteuid():
        return f"owned by user {status.st_uid}, not {os.geteuid()}"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"mode {stat.S_IMODE(status.st_mode):04o}"
    return None


def key_by_device(target: str) -> str:
    """Name the file system of the nearest existing parent of `target` by its device number.

    Bind mounts on one node have it in common; nodes that share a file system do not.

    Raises:
        StorageError: If the path cannot be looked at.
    """
    return f"{_nearest_existing(target)[1]:x}"


def key_by_mount(target: str) -> str:
    """Name the file system of the nearest existing parent of `target` by its mount point.

    Nodes that share a file system usually have it in common.

    Raises:
        StorageError: If the path cannot be looked at.
    """
    path, device = _nearest_existing(target)
    while (parent := os.path.dirname(path)) != path and _device_of(parent) == device:
        path = parent
    return xxhash.xxh3_64_hexdigest(os.fsencode(path))


def _nearest_existing(target: str) -> tuple[str, int]:
    """Return the nearest existing parent of `target`, or `target` itself, and its device."""
    path = os.path.realpath(target)
    while (device := _device_of(path)) is None:
        path = os.path.dirname(path)
    return path, device


def _device_of(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            "the directory to write to cannot be looked at",
            phase="write",
            path=path,
            found=error.strerror,
            errno=error.errno,
        ) from error


def try_lock(path: str) -> BaseFileLock | None:
    """Lock `path` if that is possible at once; `None` where another holds it.

    Raises:
        StorageError: If the file cannot be used as a lock.
    """
    # thread_local=False: the slot belongs to the write, whichever thread ends it.
    # fallback_to_soft=False: a soft lock outlives a holder that is killed.
    # filelock opens with O_NOFOLLOW, so a link under the name is refused (ELOOP), and closes the
    # descriptor in a forked child, so that one does not keep the slot of a dead parent.
    lock = FileLock(
        path, mode=0o600, thread_local=False, is_singleton=False, fallback_to_soft=False
    )
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except FileNotFoundError:
        # The directory was deleted after it was checked; the caller makes it anew.
        return None
    except OSError as error:
        raise _lock_error(path, error) from error
    return lock


def release(lock: BaseFileLock) -> None:
    """Give the slot back; the write it admitted is durable, so a failure is logged, not raised."""
    try:
        lock.release()
    except OSError as error:
        _logger.warning(
            "write slot %s could not be released and stays held until this process ends: %s",
            lock.lock_file,
            error,
        )


def record_holder(path: str) -> None:
    """Note in the lock file, held by the caller, who holds it: for the messages of those that wait.

    A second descriptor is safe: flock belongs to the open file, not to the process. Best effort: a
    full disk must not cost the slot.
    """
    note = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.pwrite(descriptor, note, 0)
            os.ftruncate(descriptor, len(note))
        finally:
            os.close(descriptor)
    except OSError as error:
        _logger.debug("holder not recorded in %s: %s", path, error)


def _read_holder(path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            text = os.pread(descriptor, 256, 0).decode(errors="replace")
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"unknown ({error.strerror})"
    return text.partition("\n")[0] or "unknown"


def _directory_error(path: str, error: OSError) -> StorageError:
    return StorageError(
        "the directory of write slots cannot be used",
        phase="write",
        path=path,
        found=error.strerror,
        hint="pass WriteSlots(directory=...) with a private directory on a local file system",
        errno=error.errno,
    )


def _lock_error(path: str, error: OSError) -> StorageError:
    hint = "check the directory, or pass WriteSlots(directory=...) with another"
    if error.errno == errno.ELOOP:
        hint = "a lock file must not be a symbolic link; remove it"
    elif error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        hint = "this file system has no locks; pass WriteSlots(directory=...) on a local one"
    return StorageError(
        "a write slot cannot be locked",
        phase="write",
        path=path,
        found=error.strerror,
        hint=hint,
        errno=error.errno,
    )
