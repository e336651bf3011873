"""The process that makes a checkpoint: what to record so that others can tell if it is dead."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dcp_hf_writer.storage.store_urls import is_url

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# States in /proc/<pid>/stat of a process that does not write any more.
_GONE = frozenset("ZXx")

OwnerState = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class Owner:
    """Identifies a process; a later process with the same number compares as different."""

    host: str
    """Host name."""
    boot_id: str
    """Identifier of the host's boot; all containers of a host see the same one."""
    pid_namespace: str
    """Pid namespace that `pid` belongs to."""
    pid: int
    """Process id."""
    started: int
    """When the process started, in clock ticks since boot."""

    @classmethod
    def me(cls) -> Owner:
        """Return this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), host_id(), _pid_namespace(), pid, _started(pid)[1])

    @classmethod
    def from_json(cls, value: Any) -> Owner | None:
        """Read a record made by `to_json`; returns `None` if `value` is not one."""
        if not isinstance(value, dict) or set(value) != set(cls.__slots__):
            return None
        texts = all(isinstance(value[k], str) for k in ("host", "boot_id", "pid_namespace"))
        numbers = all(isinstance(value[k], int) for k in ("pid", "started"))
        return cls(**value) if texts and numbers else None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)

    def is_dead(self) -> bool | None:
        """Whether the process is gone; `None` if this host or pid namespace cannot tell."""
        if self.host == socket.gethostname() and self.boot_id != host_id():
            return True
        if self.boot_id != host_id() or self.pid_namespace != _pid_namespace():
            return None
        state, started = _started(self.pid)
        return state in _GONE or started != self.started


def host_id() -> str:
    """Return the boot id of this host; processes with equal ids share one page cache.

    Without a readable boot id, returns the host name.
    """
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


def is_on_first_host() -> bool:
    """Whether the launcher put this process on the same host as rank 0.

    Reads the variables that torchrun and Slurm set. Without them, someone started the processes by
    hand or with `multiprocessing`, on one host.
    """
    local, node = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ.get("SLURM_NODEID", "")
    rank = os.environ.get("RANK", "")
    if local.isdecimal() and rank.isdecimal():
        return int(rank) < int(local)
    return not node.isdecimal() or int(node) == 0


def page_cache_id(target: str) -> str:
    """Return an id of the page cache that writes to a path use: the host's id and the device.

    If the path does not exist, its nearest existing parent tells the device. For a URL, the host's
    id alone: a store has no page cache.
    """
    if is_url(target):
        return host_id()
    path = target
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return f"{host_id()}:{os.stat(path).st_dev}"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> tuple[str, int]:
    """Return state and start time of a process; `("X", -1)` if there is no such process."""
    fields = _stat_of(pid)
    return ("X", -1) if fields is None else (fields[0], int(fields[19]))


def _parent_of(pid: int) -> int | None:
    fields = _stat_of(pid)
    return None if fields is None else int(fields[1])


def _stat_of(pid: int) -> list[str] | None:
    """Return the fields of `/proc/<pid>/stat` from field 3 on; `None` without such a process.

    Source:
        proc_pid_stat(5); the name in parentheses, field 2, may contain any character.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


_active: dict[str, set[str]] = {}
"""The places that each running save of this process writes to, by the id of the save."""
_active_lock = threading.Lock()


def new_save_id() -> str:
    """Make the id of a save: unique, sortable by time, with the host tag and pid of its process."""
    now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    return f"{now}-{_host_tag()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def is_over_here(save_id: str) -> bool:
    """Whether the id alone proves that a save ran on this host and no process works on it now."""
    pid = _pid_in(save_id)
    if pid is None:
        return False
    if pid == os.getpid():
        with _active_lock:
            return save_id not in _active
    return _started(pid)[0] in _GONE


def is_from_here(save_id: str, *, with_children: bool) -> bool:
    """Whether this process made the id of a save, or its checkpointer process did.

    Args:
        save_id: The id.
        with_children: Whether a checkpointer process runs the saves. If so, a process that is gone
            counts as this one's: it may have been the checkpointer process.
    """
    pid = _pid_in(save_id)
    if pid is None:
        return False
    is_mine = pid == os.getpid()
    return is_mine or (with_children and _parent_of(pid) in {None, os.getpid()})


_PID_FIELD = 2


def _pid_in(save_id: str) -> int | None:
    """Return the pid in the id of a save; `None` if it comes from another host or pid namespace."""
    fields = save_id.split("-")
    if len(fields) <= _PID_FIELD or fields[1] != _host_tag() or not fields[_PID_FIELD].isdigit():
        return None
    return int(fields[_PID_FIELD])


def _host_tag() -> str:
    """Return a hash of host and pid namespace, eight characters long."""
    return hashlib.sha256((host_id() + _pid_namespace()).encode()).hexdigest()[:8]


def mark_active(save_id: str, place: str) -> None:
    """Record that a save of this process writes to a place; halves that lie apart have two."""
    with _active_lock:
        _active.setdefault(save_id, set()).add(place)


def mark_ended(save_id: str, place: str | None = None) -> None:
    """Record that a save of this process has ended, whether it succeeded or failed.

    Args:
        save_id: Its id.
        place: Where it has ended; it goes on in its other places. `None`: everywhere.
    """
    with _active_lock:
        left = _active.pop(save_id, set()) - {place}
        if left and place is not None:
            _active[save_id] = left


def is_abandoned(save_id: str, owner: Owner) -> bool | None:
    """Whether no process works on a save any more; `None` if this process cannot tell."""
    if owner == Owner.me():
        with _active_lock:
            return save_id not in _active
    return owner.is_dead()


def owner_state(save_id: str, owner: Owner | None) -> OwnerState:
    """Whether a process still works on a save; `unknown` if this process cannot tell."""
    abandoned = None if owner is None else is_abandoned(save_id, owner)
    return "unknown" if abandoned is None else "dead" if abandoned else "alive"
