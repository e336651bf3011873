"""The files that a rank has open during a save, and the threads that fsync them meanwhile."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import SaveTimeoutError

if TYPE_CHECKING:
    from dcp_hf_writer.storage.posix_outputs import OutputFile

# An fsync mostly waits for the device. If a few run at once, the device can merge their work.
_SYNC_THREADS = 4


class OpenFiles:
    """Files between their first write and their fsync, and the threads that fsync them."""

    def __init__(self) -> None:
        """Start without files; threads start with the first fsync."""
        self._pool = ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="dcp-hf-sync")
        self._open: dict[str, OutputFile] = {}
        self._syncing: list[_Fsync] = []
        self.paths: list[str] = []
        """Paths of the files that `sync` got."""

    def renew_threads(self) -> None:
        """Fsync what comes from now on in new threads, which get the priority of the caller."""
        self._pool.shutdown(wait=False)
        self._pool = ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="dcp-hf-sync")

    def keep(self, file: OutputFile) -> OutputFile:
        """Keep a file open until `take` returns it by its path."""
        self._open[file.path] = file
        return file

    def take(self, path: str) -> OutputFile | None:
        """Return a kept file, which is then no longer kept; `None` if there is none."""
        return self._open.pop(path, None)

    def sync(self, file: OutputFile) -> None:
        """Fsync and close a file in the background; `join` reports errors."""
        fsync = _Fsync(file)
        try:
            self._pool.submit(fsync.run)
        except RuntimeError:
            # No thread starts: the interpreter is exiting, or the system allows no more threads.
            # The pool may have queued it for a thread that is there.
            fsync.run()
        self._syncing.append(fsync)
        self.paths.append(file.path)

    def sync_kept(self) -> None:
        """Fsync and close all files that are still kept."""
        for path in list(self._open):
            self.sync(self._open.pop(path))

    def join(self, *, deadline: float) -> list[tuple[str, BaseException]]:
        """Wait until all fsyncs are done.

        Args:
            deadline: `time.monotonic()` after which waiting ends.

        Returns:
            Path and error of each file that could not be made durable.

        Raises:
            SaveTimeoutError: If they are not done by the deadline.
        """
        wait([one.done for one in self._syncing], timeout=max(0.0, deadline - time.monotonic()))
        stuck = [one.file.path for one in self._syncing if not one.done.done()]
        if stuck:
            msg = "files could not be made durable by the deadline of the save"
            raise SaveTimeoutError(
                msg, phase="write", path=stuck[0], found=f"{len(stuck)} files still in fsync"
            )
        syncing, self._syncing = self._syncing, []
        ended = [(one.file.path, one.done.exception()) for one in syncing]
        return [(path, error) for path, error in ended if error is not None]

    def discard_below(self, path: str) -> None:
        """Close the kept files below a directory without fsync; their content is not needed."""
        for kept in [name for name in self._open if name.startswith(os.path.join(path, ""))]:
            self._open.pop(kept).discard()

    def close(self) -> None:
        """End the threads. Call `join` for all files first."""
        self._pool.shutdown(wait=False)

    def abandon(self) -> None:
        """Close files after a failure and cancel waiting fsyncs; the data is not needed."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for path in list(self._open):
            self._open.pop(path).discard()
        for one in self._syncing:
            # Some may wait in threads from before `renew_threads`.
            if one.cancel():
                one.file.discard()


class _Fsync:
    """The fsync of one file. Several threads may try it; the first one does it."""

    def __init__(self, file: OutputFile) -> None:
        self.file = file
        self.done: Future[None] = Future()
        self._begun = threading.Lock()

    def run(self) -> None:
        """Fsync and close the file, unless that has begun or was cancelled."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            with self.file:
                self.file.sync()
        except BaseException as error:  # noqa: BLE001 - `join` reports it
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def cancel(self) -> bool:
        """Keep it from beginning; returns `False` if it has begun."""
        return self._begun.acquire(blocking=False)
