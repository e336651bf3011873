"""Write slots limit how much of a node writing takes: how many processes at a time, how urgently.

A slot is one lock file of a fixed set; holding its kernel lock admits one writer. The kernel frees
the lock when the holder dies, however it dies, so there is nothing to clean up after a crash.

Slots limit load; they do not protect data. For a while, more writers than slots may be admitted: if
the lock directory was deleted, if jobs use different counts or directories, or if the locks of a
shared file system are local to a node. A rank never holds a slot while it waits for another rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dcp_hf_writer.errors import ConfigError, SlotTimeoutError
from dcp_hf_writer.mapping.option_values import check_seconds, check_whole
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.slot_lock_files import (
    SlotFiles,
    ensure_given_directory,
    ensure_private_directory,
    key_by_device,
    key_by_mount,
    record_holder,
    release,
    try_lock,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filelock import BaseFileLock

_logger = logging.getLogger(__name__)

SHARED_ENV = "DCP_HF_WRITER_SLOTS"
"""Environment variable that overrides the number of slots that both halves share."""
HALF_ENV = {"dcp": "DCP_HF_WRITER_DCP_SLOTS", "hf": "DCP_HF_WRITER_HF_SLOTS"}
"""Environment variables that give one half its own set, and the number of slots in it."""

_HIGHEST_NICE = 19
"""The lowest priority that Linux has: setpriority(2)."""

_FIRST_SLEEP_S = 0.001
# A write holds its slot for seconds, so a delay of 50 ms does not matter. A hundred processes that
# wait at this pace do not load the node.
_LONGEST_SLEEP_S = 0.05
_LOG_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class SlotHold:
    """The slot that a caller of `WriteSlots.hold` holds."""

    waited_s: float
    """Seconds from the call until the slot was held."""
    index: int | None
    """Which slot of the set, from 0; `None` if the count is unbounded and nothing is locked."""


@dataclass(frozen=True, slots=True)
class WriteSlots:
    """A limit on how many processes of a node write to one file system at a time.

    Both halves of a checkpoint, and other jobs of the same user, count against one set of slots
    for each file system. Each thread that holds a slot counts: two threads of a process take two
    slots. Jobs with different counts share the lower-numbered slots.

    Each `hold` reads the environment: `DCP_HF_WRITER_SLOTS` overrides `slots`;
    `DCP_HF_WRITER_DCP_SLOTS` and `DCP_HF_WRITER_HF_SLOTS` give their half its own set and the
    number of slots in it.

    Thread safety: a frozen value; any thread of any process may call `hold`.

    Raises:
        ConfigError: If an option has an invalid value.
    """

    slots: int = 2
    """Writers admitted at a time; 0 = unbounded."""
    per: Literal["node"] = "node"
    """What the limit applies to; `"node"` is the only choice."""
    directory: str | os.PathLike[str] | None = None
    """Where the lock files are.

    `None`: a private directory (0700) under the node's temporary directory. Its lock files name
    file systems by device number.

    A directory given here must belong to the user, and others must not be able to write to it. It
    may lie on a shared file system: it then limits writers across nodes as far as the locks of that
    file system reach. Device numbers differ between nodes, so its lock files name file systems by
    mount point.
    """
    timeout_s: float | None = None
    """Longest wait for a slot, in seconds; `None`: only the deadline of the save limits it."""
    nice: int = 0
    """By how much the nice value of a thread that writes is above that of training, 0 to 19.

    Only in the background (`async_save`) and on file systems. Training then keeps its processor
    time. If other processes keep all processors busy, a thread of low priority may hold Python's
    lock for longer, so the default is 0.
    """

    def __post_init__(self) -> None:
        """Check each option by itself."""
        check_whole("slots", self.slots, least=0)
        check_whole("nice", self.nice, least=0)
        if self.nice > _HIGHEST_NICE:
            raise ConfigError("nice must be at most 19", found=repr(self.nice))
        if self.per != "node":
            raise ConfigError("per must be 'node'", found=repr(self.per))
        if self.directory is not None:
            object.__setattr__(self, "directory", plain_path(self.directory, option="directory"))
        if self.timeout_s is not None:
            check_seconds("timeout_s", self.timeout_s)

    @contextlib.contextmanager
    def hold(
        self, target: str, half: Literal["dcp", "hf"], *, deadline: float
    ) -> Iterator[SlotHold]:
        """Hold one slot for the body of the `with` statement.

        Every rank enters it before it writes and leaves it after its fsync. Even if the deadline
        has passed, it tries each slot once.

        Args:
            target: Directory that the caller writes to; it need not exist yet.
            half: The half of the checkpoint that the caller writes.
            deadline: Value of `time.monotonic` at which waiting ends, unless `timeout_s` ends it
                earlier.

        Yields:
            The slot, and how long the caller waited for it.

        Raises:
            ConfigError: If an environment variable is not a whole number >= 0.
            SlotTimeoutError: If no slot became free in time; it names the holders.
            StorageError: If the lock directory or a lock file cannot be used: it is a symlink, it
                belongs to another user, others may write to it, or the file system has no locks.
        """
        started = time.monotonic()
        count, own_set = self._resolve(half)
        if count == 0:
            yield SlotHold(waited_s=0.0, index=None)
            return
        key = key_by_device(target) if self.directory is None else key_by_mount(target)
        directory = self._ensure_directory()
        files = SlotFiles(directory, f"{key}-{half}" if own_set else key, count)
        if self.timeout_s is not None:
            deadline = min(deadline, started + self.timeout_s)
        lock, index = self._acquire(files, target, started=started, deadline=deadline)
        waited_s = time.monotonic() - started
        try:
            record_holder(lock.lock_file)
            yield SlotHold(waited_s=waited_s, index=index)
        finally:
            release(lock)

    def is_shared_by_halves(self) -> bool:
        """Whether one hold covers both halves: true unless a variable gives a half its own set.

        Raises:
            ConfigError: If an environment variable is not a whole number >= 0.
        """
        return not (self._resolve("dcp")[1] or self._resolve("hf")[1])

    def _resolve(self, half: Literal["dcp", "hf"]) -> tuple[int, bool]:
        """Return the count for `half` and whether it has a set of its own."""
        own = _count_from_env(HALF_ENV[half])
        if own is not None:
            return own, True
        shared = _count_from_env(SHARED_ENV)
        return (self.slots if shared is None else shared), False

    def _ensure_directory(self) -> str:
        """Return the path of the lock directory; create it if missing, and check it."""
        if self.directory is None:
            return ensure_private_directory()
        return ensure_given_directory(os.fspath(self.directory))

    def _acquire(
        self, files: SlotFiles, target: str, *, started: float, deadline: float
    ) -> tuple[BaseFileLock, int]:
        """Take the first free slot, waiting until `deadline`.

        Raises:
            SlotTimeoutError: If no slot became free.
            StorageError: If a lock file cannot be used.
        """
        sleep_s, is_logged = _FIRST_SLEEP_S, False
        while True:
            for index in files.order():
                lock = try_lock(files.path(index))
                if lock is not None:
                    if is_logged:
                        _logger.info(
                            "got write slot %d for %s after %.1f s",
                            index,
                            target,
                            time.monotonic() - started,
                        )
                    return lock, index
            now = time.monotonic()
            if now >= deadline:
                raise _timeout_error(files, target, waited_s=now - started)
            if not is_logged and now - started >= _LOG_AFTER_S:
                is_logged = True
                _logger.info(
                    "waiting for one of %d write slots for %s, held by %s",
                    files.count,
                    target,
                    files.holders(),
                )
            time.sleep(min(sleep_s, deadline - now))
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
            # A cleaner of the temporary directory may have deleted it meanwhile.
            self._ensure_directory()


def _count_from_env(name: str) -> int | None:
    """Return the count that the variable `name` holds, `None` if it is not set.

    Raises:
        ConfigError: If it is set to anything but a whole number >= 0.
    """
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name} must be a whole number >= 0", found=repr(text))
    return int(text)


def _timeout_error(files: SlotFiles, target: str, *, waited_s: float) -> SlotTimeoutError:
    return SlotTimeoutError(
        f"no write slot became free in {waited_s:.1f} s",
        phase="write",
        path=target,
        expected=f"one of {files.count} slots in {files.directory}",
        found=f"all held; {files.holders()}",
        hint="find out what those processes wait for, or raise `slots` or the timeout",
    )
