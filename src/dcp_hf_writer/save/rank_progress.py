"""How the ranks of a save see each other's progress without collectives: records in a store.

A collective that waits for a lost rank ends at the group's own timeout and does not name the rank.
The records here say which save is running and how far each rank has come, so that an error can name
the ranks that did not answer.
"""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dcp_hf_writer.errors import ConfigError, RankLostError
from dcp_hf_writer.save.owner_process import Owner
from dcp_hf_writer.torch_seam.default_store import (
    default_store,
    has_default_group,
    own_store_client,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.torch_seam.save_world import SaveWorld

_PREFIX = "dcp-hf-writer"
_LEFT = f"{_PREFIX}/left"

# Phases of a save, in the order in which a rank goes through them.
PHASES = ("plan", "write", "written", "finish", "failed")

# Once a collective broke, the other live ranks fail too: how long they may take to report it.
POST_MORTEM_S = 3.0

_POLL_S = 0.05

# How long a rank looks for the coordinator's record before it compares paths. The record is in the
# store before the rank gets its plan, but the store may show it a moment later.
_FIRST_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the coordinator tells the other ranks about the running save."""

    save_id: str
    """Id of the save."""
    plan_id: str
    """Id of the global plan; a rank whose plan has another id must not write."""
    count: int
    """Number of saves that the coordinator has begun; the other ranks take it over."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What the ranks need in order to write to the target, such as the ids of uploads."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank has come."""

    count: int
    """Number of saves that the rank has begun."""
    phase: str
    """Its phase, one of `PHASES`."""
    host: str
    """Its host name, for messages."""
    pid: int
    """Its process id, for messages."""
    target: str = ""
    """Path that it saves to."""
    process: Mapping[str, Any] = field(default_factory=dict)
    """Record of its process, from which a process of the same host can tell whether it is gone."""

    @classmethod
    def mine(cls, count: int, phase: str, target: str = "") -> Progress:
        """Make the record of this process, which saves to `target`."""
        me = Owner.me()
        return cls(count, phase, me.host, me.pid, target, me.to_json())


class Rendezvous:
    """Records of the ranks of a process group, in the store of `torch.distributed`.

    Thread-safe if the store is. Uses a clone of the store where it can be cloned, so that a wait
    here does not block the trainer's own use of the store.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Find the members of a group; `None` stands for the default group."""
        self._store = own_store_client()
        self._me = dist.get_rank()
        self._members = list(
            dist.get_process_group_ranks(group)
            if group is not None
            else range(dist.get_world_size())
        )

    def announce(self, target: str, announcement: Announcement) -> None:
        """Tell the other ranks which save to `target` is running (coordinator)."""
        self._store.set(_key("save", target), json.dumps(asdict(announcement)))

    def withdraw(self, target: str) -> None:
        """Remove the record of a save that has ended (coordinator)."""
        self._store.delete_key(_key("save", target))

    def find(self, target: str, *, timeout_s: float, rank: int) -> Announcement:
        """Return what the coordinator announced for `target`.

        The coordinator announces a save before any rank gets its plan, so the record is there and
        only the store can take time.

        Args:
            target: Path of the checkpoint.
            timeout_s: How long to wait for the store, in seconds.
            rank: This rank within the process group of the save, for the message.

        Raises:
            ConfigError: If the coordinator saves to another path.
            RankLostError: If there is no valid record within `timeout_s`.
        """
        key = _key("save", target)
        try:
            if not self._is_set(key, min(timeout_s, _FIRST_LOOK_S)):
                self._check_target_of_coordinator(target, rank)
            self._store.wait([key], timedelta(seconds=max(timeout_s, 0.1)))
            return Announcement(**json.loads(self._store.get(key)))
        except ConfigError:
            raise
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

    def _is_set(self, key: str, wait_s: float) -> bool:
        """Whether a key appears in the store within a short time; a store does not order keys."""
        until = time.monotonic() + wait_s
        while not self._store.check([key]):
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        return True

    def _check_target_of_coordinator(self, target: str, rank: int) -> None:
        record = self.progress(self._members[:1]).get(self._members[0])
        if record is not None and record.target not in ("", target):
            raise other_path(record.target, f"rank {rank}: {target}", rank=rank)

    def post(self, progress: Progress) -> None:
        """Tell the other ranks how far this rank has come."""
        self._store.set(f"{_PREFIX}/rank/{self._me}", json.dumps(asdict(progress)))

    def progress(self, ranks: Sequence[int] | None = None) -> dict[int, Progress | None]:
        """Return how far members have come, by global rank; `None` if a rank never posted.

        Args:
            ranks: Global ranks of some members; `None` stands for all members.
        """
        found: dict[int, Progress | None] = {}
        for rank in self._members if ranks is None else ranks:
            key = f"{_PREFIX}/rank/{rank}"
            found[rank] = (
                Progress(**json.loads(self._store.get(key))) if self._store.check([key]) else None
            )
        return found

    def leave(self, progress: Progress, why: str) -> None:
        """Tell the other ranks that this one has left a save in which they may wait for it."""
        self.post(progress)
        self._store.set(_LEFT, json.dumps({"rank": self._me, "why": why, **asdict(progress)}))

    def left(self, count: int) -> str | None:
        """Return who left the save, and why, as text; `None` if nobody said so.

        Args:
            count: The save, as this rank counts saves.
        """
        # One key for all ranks: each rank asks for it again and again while a save is in flight.
        if not self._store.check([_LEFT]):
            return None
        one = json.loads(self._store.get(_LEFT))
        is_of_save = one["rank"] in self._members and one["count"] >= count
        if not is_of_save or one["rank"] == self._me:
            return None
        return f"rank {one['rank']} ({one['host']}, pid {one['pid']}): {one['why']}"

    def failed_ranks(
        self, count: int, ranks: Sequence[int] | None = None
    ) -> tuple[list[str], list[str]]:
        """Return the ranks that have failed in a save, and those whose process is gone, as text.

        Args:
            count: The save, as this rank counts saves.
            ranks: Ranks within the process group of the save; `None` stands for all.
        """
        failed: list[str] = []
        gone: list[str] = []
        asked = None if ranks is None else [self._members[rank] for rank in ranks]
        for rank, one in self.progress(asked).items():
            if rank == self._me or one is None:
                continue
            process = Owner.from_json(one.process)
            text = f"rank {rank} ({one.host}, pid {one.pid})"
            if one.count == count and one.phase == "failed":
                failed.append(text)
            elif process is not None and process.is_dead():
                gone.append(text)
        return failed, gone

    def part_of_store(self, name: str) -> Any:
        """Return a part of the store for the keys of one purpose."""
        return PrefixStore(f"{_PREFIX}/{name}", self._store)

    def silent_ranks(self, mine: Progress, *, wait_s: float) -> list[str]:
        """Return the ranks that do not get as far as this one within `wait_s` seconds, as text.

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
    # Only the coordinator enters "finish": for the other ranks, "written" is just as far.
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
    """Make the error that names the ranks that did not answer.

    Args:
        silent: The ranks that did not answer, as text.
        rank: This rank.
        phase: Phase that this rank was in.
        target: Path of the checkpoint.
        save_id: Id of the save, if known.
        outcome: Whether the checkpoint is committed, in words.
    """
    msg = "the save was given up because some ranks did not answer"
    return RankLostError(
        msg,
        rank=rank,
        phase=phase,
        path=target,
        expected="an answer from every rank" + (f" in save {save_id}" if save_id else ""),
        found=f"no answer from {', '.join(silent)}; {outcome}",
        hint="the process group cannot be used for saving any more; restart the lost ranks, or, if "
        "the script destroyed the group, wait for the future of the save first",
    )


def other_path(target: str, found: str, *, rank: int | None = None) -> ConfigError:
    """Make the error for ranks that save to another path than the coordinator.

    Args:
        target: Path of the coordinator.
        found: The other ranks and their paths, as text.
        rank: Rank that found it, if it is not the coordinator.
    """
    msg = "the ranks save to different paths"
    return ConfigError(
        msg,
        rank=rank,
        phase="plan",
        path=target,
        expected="the path of rank 0 on every rank",
        found=found,
        hint="make the path on one rank and broadcast it, if it holds a time or a random part; "
        "a relative path depends on the working directory",
    )


def _key(kind: str, target: str) -> str:
    return f"{_PREFIX}/{kind}/{hashlib.sha256(target.encode()).hexdigest()[:32]}"


class Meeting:
    """What this process keeps from save to save: its save count, and the records of a group."""

    def __init__(self) -> None:
        """Start before the first save."""
        self._count = 0
        self._known: tuple[Any, Any, Rendezvous] | None = None
        """The default store, a weak reference to the group or `None`, and the group's records."""

    def next_count(self) -> int:
        """Count a new save of this process, and return the new count."""
        self._count += 1
        return self._count

    def fall_in(self, count: int) -> None:
        """Take over the coordinator's count: it differs after a save failed early on one rank."""
        self._count = count

    def rendezvous_of(self, group: dist.ProcessGroup | None) -> Rendezvous | None:
        """Return the records of a group, made once; `None` if this is the only rank."""
        if not has_default_group() or dist.get_world_size(group) == 1:
            return None
        # Each initialisation of torch.distributed makes a new store, which needs new records.
        store = default_store()
        known = self._known
        if known is None or known[0] is not store or _referent(known[1]) is not group:
            # A group that is held keeps its connections after it was destroyed.
            reference = None if group is None else weakref.ref(group)
            known = self._known = (store, reference, Rendezvous(group))
        return known[2]

    def leave(self, world: SaveWorld, why: str) -> None:
        """Tell the other ranks of a save why this rank takes no part, if they shared a store.

        Raises:
            RuntimeError: If the store does not answer.
        """
        if self._known is not None and self._known[0] is world.store:
            self._known[2].leave(Progress.mine(self._count, "failed"), why)


def _referent(reference: Any) -> Any:
    return None if reference is None else reference() or reference


MEETING = Meeting()
"""One for the whole process: a rank counts its saves across all writers."""
