"""How the ranks of a save find one another outside of collectives: records in a store.

A collective that waits for a lost rank names nobody and ends at the group's own timeout. The
records here say which save is under way and how far each rank has come, so that an error can name
who did not answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dcp_hf_writer.errors import RankLostError
from dcp_hf_writer.torch_seam.default_store import default_store

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger(__name__)

_PREFIX = "dcp-hf-writer"

# Phases in the order in which a rank passes them.
PHASES = ("plan", "write", "written", "finish", "failed")

# How long the ranks that are left may take to say that they failed too, once one collective broke.
POST_MORTEM_S = 3.0

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the coordinator says of the save under way."""

    save_id: str
    """Its id."""
    plan_id: str
    """Of the global plan; a rank that works from another one must not write."""
    world_size: int
    """Number of ranks that take part."""
    count: int
    """Number of saves the coordinator has begun, so that the others fall into step."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank has come."""

    count: int
    """Number of saves it has begun."""
    phase: str
    """One of `PHASES`."""
    host: str
    """Its host, for messages."""
    pid: int
    """Its process, for messages."""


class Rendezvous:
    """Records of the ranks of a process group.

    Thread-safe where the store is; a clone of the group's store is used, so that a wait here does
    not hold up the trainer's own use of it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Take the members of a group, or of the default one."""
        self._store = _store()
        self._me = dist.get_rank()
        self._members = list(
            dist.get_process_group_ranks(group)
            if group is not None
            else range(dist.get_world_size())
        )

    def announce(self, target: str, announcement: Announcement) -> None:
        """Say which save to `target` is under way (coordinator)."""
        self._store.set(_key("save", target), json.dumps(asdict(announcement)))

    def withdraw(self, target: str) -> None:
        """Remove the record of a save that has ended (coordinator)."""
        self._store.delete_key(_key("save", target))

    def find(self, target: str, *, timeout_s: float, rank: int) -> Announcement:
        """Return what the coordinator announced for `target`.

        It has done so before any rank got its plan, so there is nothing to wait for but the store.

        Raises:
            RankLostError: If there is no record.
        """
        key = _key("save", target)
        try:
            self._store.wait([key], timedelta(seconds=max(timeout_s, 0.1)))
            return Announcement(**json.loads(self._store.get(key)))
        except (dist.DistError, RuntimeError, ValueError, TypeError) as error:
            msg = "the coordinator announced no save to this path"
            raise RankLostError(
                msg,
                rank=rank,
                phase="write",
                path=target,
                found=f"{type(error).__name__}",
                hint="every rank must pass the same path; if it does, the coordinator is gone",
            ) from error

    def post(self, progress: Progress) -> None:
        """Say how far this rank has come."""
        self._store.set(f"{_PREFIX}/rank/{self._me}", json.dumps(asdict(progress)))

    def progress(self) -> dict[int, Progress | None]:
        """Return how far each member has come, by global rank; `None` if it never said."""
        found: dict[int, Progress | None] = {}
        for rank in self._members:
            key = f"{_PREFIX}/rank/{rank}"
            found[rank] = (
                Progress(**json.loads(self._store.get(key))) if self._store.check([key]) else None
            )
        return found

    def silent_ranks(self, mine: Progress, *, wait_s: float) -> list[str]:
        """Name the ranks that have not come as far as this one within `wait_s`.

        Called when a collective broke or the deadline passed.
        """
        until = time.monotonic() + wait_s
        while True:
            behind = [
                f"rank {rank}" + (f" ({p.host}, pid {p.pid}, last in {p.phase})" if p else "")
                for rank, p in self.progress().items()
                if rank != self._me and _is_behind(p, mine)
            ]
            if not behind or time.monotonic() > until:
                return behind
            time.sleep(_POLL_S)


def _is_behind(other: Progress | None, mine: Progress) -> bool:
    if other is None or other.count < mine.count:
        return True
    return other.count == mine.count and _order(other) < _order(mine)


def _order(progress: Progress) -> int:
    # Only the coordinator finishes: the others have come as far when they have written.
    phase = "written" if progress.phase == "finish" else progress.phase
    return PHASES.index(phase)


def lost_ranks_error(
    silent: Sequence[str],
    *,
    rank: int,
    phase: str,
    target: str,
    save_id: str | None,
    outcome: str,
) -> RankLostError:
    """Make the error that names the ranks that did not answer, and says what is committed."""
    msg = "the save was given up, since not all ranks answered"
    return RankLostError(
        msg,
        rank=rank,
        phase=phase,
        path=target,
        expected="an answer of every rank" + (f" in save {save_id}" if save_id else ""),
        found=f"silent: {', '.join(silent)}; {outcome}",
        hint="the process group is not usable for saving any more; restart the lost ranks",
    )


def _key(kind: str, target: str) -> str:
    return f"{_PREFIX}/{kind}/{hashlib.sha256(target.encode()).hexdigest()[:32]}"


def _store() -> Any:
    # All groups share the default group's store; a group's own is a prefix of it, whose key space
    # torch also uses for its own purposes.
    store = default_store()
    clone = getattr(store, "clone", None)
    if clone is None:
        return store
    try:
        return clone()
    except (RuntimeError, NotImplementedError) as error:
        _log.debug("the store cannot be cloned (%s); it is shared", error)
        return store


class Meeting:
    """What this process keeps from save to save: its number of saves, and a group's records."""

    def __init__(self) -> None:
        """Start before the first save."""
        self._count = 0
        self._known: tuple[Any, dist.ProcessGroup | None, Rendezvous] | None = None

    def next_count(self) -> int:
        """Count a save that this process begins."""
        self._count += 1
        return self._count

    def fall_in(self, count: int) -> None:
        """Take over the coordinator's count: a save that failed early on one rank parts them."""
        self._count = count

    def rendezvous_of(self, group: dist.ProcessGroup | None) -> Rendezvous | None:
        """Return the records of a group, made once; `None` where there is nobody else."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return None
        # The store tells one initialisation of torch.distributed from the next.
        store = default_store()
        if self._known is None or self._known[0] is not store or self._known[1] is not group:
            self._known = (store, group, Rendezvous(group))
        return self._known[2]


MEETING = Meeting()
"""That of this process: all ranks count the saves of their process, whichever writer does them."""
