"""What a rank tells about its running save: phase and bytes, in a small file that others may read.

Each rank has one file in the directory of the save. It is replaced about once a second, and when
the rank enters a phase. The file is news, not state: nothing in a save depends on it. If it cannot
be written, one line in the log says so, and the save goes on without it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

VERSION = 1

MAX_HEARTBEAT_NBYTES = 1 << 20
"""Readers read no more of a heartbeat, whatever lies in its place."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a rank writes its heartbeat, all in seconds."""

    first_s: float = 0.2
    """Time before the first one; a shorter save writes none."""
    every_s: float = 1.0
    """Time between two."""
    end_s: float = 0.0
    """Longest wait at the end for one that is on its way."""
    at_once: bool = True
    """Whether a change of the phase is told at once."""


STORE_PACE = Pace(first_s=3.0, every_s=5.0, end_s=5.0, at_once=False)
"""On a store each heartbeat is a request, and one that arrives late must not stay there."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """How far one rank of a running save has come."""

    save_id: str
    """Id of the save."""
    target: str
    """Path of the checkpoint."""
    rank: int
    """Rank within the process group of the save."""
    world_size: int
    """Number of ranks of the save."""
    host: str
    """Host name."""
    pid: int
    """Process id."""
    phase: str
    """What the rank does, such as `write hf`; `written` when its part is durable."""
    done_nbytes: int
    """Bytes written so far; at most `planned_nbytes`."""
    planned_nbytes: int
    """Bytes of tensors that the rank will write to both halves; 0 before it has planned them."""
    began: float
    """When the save began on the rank, in seconds since 1970, by the clock of its host."""
    time: float
    """When the heartbeat was written, likewise."""
    news_time: float
    """When phase or bytes last changed, likewise; as exact as the time between two heartbeats."""
    version: int = VERSION
    """Version of this form."""

    def to_bytes(self) -> bytes:
        """Return the heartbeat as one JSON object."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Heartbeat | None:
        """Read what `to_bytes` made; `None` if `data` is something else."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("version") != VERSION:
            return None
        kinds: dict[str, Any] = {"float": (int, float), "int": int, "str": str}
        found: dict[str, Any] = {}
        for field in fields(cls):
            one = value.get(field.name)
            if not isinstance(one, kinds[str(field.type)]) or isinstance(one, bool):
                return None
            if not isinstance(one, str) and not 0 <= one < math.inf:
                return None
            found[field.name] = one
        return cls(**found)


class ByteCount:
    """Counts the bytes that a rank has written. Thread-safe."""

    def __init__(self) -> None:
        """Start at zero, without a plan."""
        self._lock = threading.Lock()
        self._done = self._planned = 0

    def plan(self, nbytes: int) -> None:
        """Add bytes that the rank will write; it may plan its halves one after the other."""
        with self._lock:
            self._planned += nbytes

    def add(self, nbytes: int) -> None:
        """Count bytes whose write is complete; a negative number makes up for later ones."""
        with self._lock:
            self._done += nbytes

    def state(self) -> tuple[int, int]:
        """Return the bytes done and planned; never less than none or more than all."""
        return min(max(self._done, 0), self._planned), self._planned


def replace_file(path: str, data: bytes) -> None:
    """Give a file new content in one step; a reader sees the old content or the new.

    Not durable: after a power cut nobody needs a heartbeat.

    Raises:
        OSError: If the file system refuses.
    """
    fresh = f"{path}.new"
    with open(fresh, "wb") as file:
        file.write(data)
    os.replace(fresh, path)


class HeartbeatWriter:
    """Writes the heartbeats of one rank from a thread of its own, so that the save never waits.

    The thread ends with the save.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        *,
        about: dict[str, Any],
        phase: Callable[[], str],
        count: ByteCount,
        is_alive: Callable[[], bool],
        pace: Pace = Pace(),
    ) -> None:
        """Start the thread.

        Args:
            write: Replaces the heartbeat of the rank; may raise `OSError`.
            about: `save_id`, `target`, `rank` and `world_size` of the save.
            phase: Returns what the rank does.
            count: Counts the bytes of the rank.
            is_alive: Whether the save can still go on.
            pace: How often.
        """
        self._pace = pace
        self._write, self._phase, self._count, self._is_alive = write, phase, count, is_alive
        self._about = {**about, "host": socket.gethostname(), "pid": os.getpid()}
        self._began = self._news_time = time.time()
        self._latest: tuple[str, int] | None = None
        self._wake = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dcp-hf-heartbeat", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            # The interpreter is exiting: it waits for the save, but starts no more threads.
            _log.debug("no heartbeats of the save: %s", error)

    def tell(self) -> None:
        """Write a heartbeat soon, because the phase changed; returns at once."""
        if self._pace.at_once:
            self._wake.set()

    def stop(self) -> None:
        """Write no more heartbeats; one may still be on its way, if the pace says so."""
        self._over.set()
        self._wake.set()
        if self._pace.end_s and self._thread.is_alive():
            self._thread.join(self._pace.end_s)

    def _run(self) -> None:
        # A save that is over by then is not worth a file; a change of phase does not end the wait.
        if self._over.wait(self._pace.first_s):
            return
        while self._is_alive():
            self._wake.clear()
            if not self._beat():
                return
            self._wake.wait(self._pace.every_s)
            if self._over.is_set():
                return

    def _beat(self) -> bool:
        """Write one heartbeat; returns whether another one makes sense."""
        now = time.time()
        phase, (done, planned) = self._phase(), self._count.state()
        if (phase, done) != self._latest:
            self._latest, self._news_time = (phase, done), now
        beat = Heartbeat(
            **self._about,
            phase=phase,
            done_nbytes=done,
            planned_nbytes=planned,
            began=self._began,
            time=now,
            news_time=self._news_time,
        )
        try:
            self._write(beat.to_bytes())
        except FileNotFoundError:
            # The directory has been published or removed meanwhile, or could not be made.
            return False
        except OSError as error:
            _log.warning(
                "the live status of the save of %s cannot be written on rank %d (%s); "
                "the save goes on without it",
                beat.target,
                beat.rank,
                error,
            )
            return False
        return True
