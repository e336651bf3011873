"""The lock files behind `WriteSlots`: their directory, their names, and how to lock one."""

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
    """Names the file system, and also the half if the half has its own set."""
    count: int

    def path(self, index: int) -> str:
        """Return the lock file of slot `index`."""
        return os.path.join(self.directory, f"{self.key}.{index}.lock")

    def order(self) -> Iterator[int]:
        """Yield every slot once, starting at one that depends on the process.

        Otherwise ranks that start together would all try slot 0 first.
        """
        first = os.getpid() % self.count
        for step in range(self.count):
            yield (first + step) % self.count

    def holders(self) -> str:
        """Return a text for messages: who holds each slot, according to its lock file."""
        notes = (_read_holder(self.path(index)) for index in range(self.count))
        return ", ".join(f"slot {index}: {note}" for index, note in enumerate(notes))


def ensure_private_directory() -> str:
    """Return the path of the node's own lock directory; create it if missing, and check it.

    Raises:
        StorageError: If it cannot be created, if it is a link or not a directory, if it belongs to
            another user, or if others may write to it.
    """
    path = os.path.join(tempfile.gettempdir(), f"dcp-hf-writer-{os.geteuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        # Everyone may write to a directory such as /tmp. Someone else may have put anything under
        # this name first, even a link to one of our directories.
        status = os.lstat(path)
        _require_safe(path, status)
        if status.st_mode & _OPEN_TO_OTHERS:
            # If the directory vanishes, filelock creates it again, with a mode that depends on the
            # umask. Nobody else could write to it, so making it private is enough.
            os.chmod(path, 0o700)
    except StorageError:  # it is an OSError too
        raise
    except OSError as error:
        raise _directory_error(path, error) from error
    return path


def ensure_given_directory(path: str) -> str:
    """Return the path of the lock directory that the user named; create it if missing, check it.

    Raises:
        StorageError: If it cannot be created, is not a directory, belongs to another user, or if
            others may write to it.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        # stat, not lstat: the user may name the directory through their own link.
        status = os.stat(path)
    except OSError as error:
        raise _directory_error(path, error) from error
    _require_safe(path, status)
    return path


def _require_safe(path: str, status: os.stat_result) -> None:
    """Refuse a directory in which someone else could have placed a lock file.

    Someone who may write to the directory could hard-link another of our files to the name of a
    lock file. `record_holder` would then overwrite that file.

    Raises:
        StorageError: If `status`, the status of `path`, shows that the directory is not safe.
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
    """Return what makes a directory with `status` unsafe; `None` if it is safe."""
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
    """Name the file system of `target`, or of its nearest existing parent, by its device number.

    On one node, all bind mounts of a file system have the same device number. Nodes that share a
    file system have different ones.

    Raises:
        StorageError: If `stat` on the path fails.
    """
    return f"{_nearest_existing(target)[1]:x}"


def key_by_mount(target: str) -> str:
    """Name the file system of `target`, or of its nearest existing parent, by its mount point.

    Nodes that share a file system usually mount it at the same place.

    Raises:
        StorageError: If `stat` on the path fails.
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
            "the file system of the target cannot be determined",
            phase="write",
            path=path,
            found=error.strerror,
            errno=error.errno,
        ) from error


def try_lock(path: str) -> BaseFileLock | None:
    """Lock `path` without waiting; `None` if another holds it, or its directory is gone.

    Raises:
        StorageError: If the file cannot be used as a lock.
    """
    # thread_local=False: the slot belongs to the write, whichever thread releases it.
    # fallback_to_soft=False: a soft lock outlives a holder that is killed.
    # filelock opens with O_NOFOLLOW, so it refuses a link (ELOOP). It closes the descriptor in a
    # forked child, so the child does not keep the slot of a dead parent.
    lock = FileLock(
        path, mode=0o600, thread_local=False, is_singleton=False, fallback_to_soft=False
    )
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except FileNotFoundError:
        # The directory was deleted after the check; the caller creates it again.
        return None
    except OSError as error:
        raise _lock_error(path, error) from error
    return lock


def release(lock: BaseFileLock) -> None:
    """Release the slot. A failure is only logged, because the write itself is already over."""
    try:
        lock.release()
    except OSError as error:
        _logger.warning(
            "write slot %s could not be released and stays held until this process ends: %s",
            lock.lock_file,
            error,
        )


def record_holder(path: str) -> None:
    """Write the holder into a lock file that the caller holds; messages of waiters name it.

    A second descriptor is safe: flock belongs to the open file, not to the process. An error is
    only logged: a full disk must not cost the slot.
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
