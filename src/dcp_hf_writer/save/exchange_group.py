"""A gloo group of a save's own ranks, for the bytes that they write for each other.

It is made directly from the store of the save: no collective runs on the user's group, and torch's
list of groups does not change. It is kept for the next save of the same ranks, because at many
ranks the connections take seconds. After an error it is closed and never used again.

gloo has no wait that can be interrupted, and a group closes its connections only when the object is
freed. So this module holds the only reference to it.
"""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, PrefixStore  # type: ignore[attr-defined]

from dcp_hf_writer.save.failure_explanations import explain_broken_exchange
from dcp_hf_writer.save.wait_for_ranks import wait_for_ranks
from dcp_hf_writer.torch_seam.default_store import default_store
from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.rank_progress import Rendezvous

    Numbers = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)

# gloo needs some time limit, and less than this would not let it begin.
_SHORTEST_WAIT_S = 0.001


class ExchangeGroup:
    """Sends and receives between the ranks of one save; every wait ends at the save's deadline.

    Not thread-safe. Any error closes the group: the other ranks then get an error at once.
    """

    def __init__(self, group: Any, attempt: Attempt) -> None:
        """Use a gloo group, and end its waits with the save.

        Args:
            group: A `ProcessGroupGloo`; nobody else may keep a reference to it.
            attempt: The save.
        """
        self._group = group
        self._attempt = attempt
        self._pending: dict[int, Any] = {}
        self._number = 0
        self.rank: int = group.rank()
        """This rank."""
        self.size: int = group.size()
        """Number of ranks."""

    def gather(self, mine: Numbers) -> list[Numbers]:
        """Return the arrays of all ranks, by rank; all ranks call it.

        Args:
            mine: Flat array of int64, of any length.
        """
        lengths = self._all_gather(np.array([len(mine)], np.int64), 1)
        longest = max(int(length[0]) for length in lengths)
        padded = np.zeros(longest, np.int64)
        padded[: len(mine)] = mine
        found = self._all_gather(padded, longest)
        return [one[: int(length[0])] for one, length in zip(found, lengths, strict=True)]

    def _all_gather(self, mine: Numbers, length: int) -> list[Numbers]:
        if not length:
            return [mine] * self.size
        found = [torch.zeros(length, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        options = AllgatherOptions()
        options.timeout = self._left()
        with self._explained():
            self._group.allgather([found], [torch.from_numpy(mine)], options).wait()
        return [one.numpy() for one in found]

    def swap(self, parts: Sequence[Numbers]) -> list[Numbers]:
        """Send each rank an array, and return what each rank sent; all ranks call it.

        Args:
            parts: Flat arrays of int64 of any length, by rank; this rank's own comes back as it is.
        """
        lengths = self.gather(np.array([len(part) for part in parts], np.int64))
        others = [rank for rank in range(self.size) if rank != self.rank]
        found = [
            torch.zeros(int(lengths[rank][self.rank]), dtype=torch.int64, device="cpu")
            for rank in range(self.size)
        ]
        waits = [self.receive(found[rank], rank, 0) for rank in others if len(found[rank])]
        waits += [
            self.send(torch.from_numpy(parts[rank]), rank, 0) for rank in others if len(parts[rank])
        ]
        for number in waits:
            self.wait(number)
        return [parts[rank] if rank == self.rank else one.numpy() for rank, one in enumerate(found)]

    def send(self, data: torch.Tensor, rank: int, tag: int) -> int:
        """Begin to send a tensor; it may change after `wait` for the returned number."""
        with self._explained():
            return self._keep(self._group.send([data], rank, tag))

    def receive(self, data: torch.Tensor, rank: int, tag: int) -> int:
        """Begin to receive a tensor; it is complete after `wait` for the returned number."""
        with self._explained():
            return self._keep(self._group.recv([data], rank, tag))

    def wait(self, number: int) -> None:
        """Wait for a send or a receive.

        Raises:
            RankLostError: If a rank was lost, or did not answer by the deadline.
            SaveAbortedError: If another rank gave the save up.
        """
        with self._explained():
            self._pending[number].wait(self._left())
        del self._pending[number]

    def _keep(self, work: Any) -> int:
        self._number += 1
        self._pending[self._number] = work
        return self._number

    def _left(self) -> timedelta:
        return timedelta(seconds=max(self._attempt.context.left_s(), _SHORTEST_WAIT_S))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise explain_broken_exchange(self._attempt, error) from error

    def release(self) -> Any:
        """Give up the use of the gloo group without closing it, and return it."""
        group, self._group = self._group, None
        return group

    def close(self) -> None:
        """Close the connections; the other ranks get an error if they still wait for this one."""
        self._group = None
        self._pending.clear()


@dataclass(slots=True)
class _Kept:
    """A gloo group that no save uses at the moment."""

    group: Any
    name: str
    """Unique name, which all of its ranks know."""
    store: Any
    """The default store when it was made."""
    pid: int


class KeptGroup:
    """The gloo group that this process keeps between saves."""

    def __init__(self) -> None:
        """Start without one."""
        self._kept: list[_Kept] = []

    def take(self, store: Any, rank: int, size: int) -> _Kept | None:
        """Return the kept group if it has this rank and size and was made from this store."""
        kept = self._kept.pop() if self._kept else None
        if kept is None or kept.pid != os.getpid() or kept.store is not store:
            return None
        return kept if (kept.group.rank(), kept.group.size()) == (rank, size) else None

    def keep(self, kept: _Kept) -> None:
        """Keep a group after a save that went well."""
        self._kept[:] = [kept]


KEPT = KeptGroup()
"""One for the whole process: saves of all writers come one after another."""


@contextmanager
def joined_exchange(attempt: Attempt, save_id: str) -> Iterator[ExchangeGroup | None]:
    """Meet the other ranks of a save in a group of their own; all ranks enter it.

    Args:
        attempt: The save.
        save_id: The id of the save that the coordinator announced.

    Yields:
        The group; `None` if this is the only rank.

    Raises:
        RankLostError: If a rank does not come by the deadline.
        SaveAbortedError: If another rank failed before it came.
        UnsupportedTorchError: If torch has no gloo group to make.
    """
    member = attempt.member
    if member.rendezvous is None or member.world_size == 1:
        yield None
        return
    kept = _meet(attempt, member.rendezvous, save_id)
    group = ExchangeGroup(kept.group, attempt)
    kept.group = None
    try:
        yield group
        # No rank leaves before all have what they wait for.
        group.gather(np.zeros(1, np.int64))
    except BaseException:
        group.close()
        raise
    kept.group = group.release()
    KEPT.keep(kept)
    if member.is_coordinator:
        _forget(member.rendezvous, save_id, kept.name)


def _meet(attempt: Attempt, records: Rendezvous, save_id: str) -> _Kept:
    """Wait for all ranks, and return the group that all of them kept, or a new one."""
    member, store = attempt.member, records.part_of_store(_part(save_id))
    kept = KEPT.take(default_store(), member.rank, member.world_size)
    try:
        if kept is not None:
            store.add(f"kept/{kept.name}", 1)
        store.add("arrived", 1)
        wait_for_ranks(
            attempt,
            records,
            lambda: bool(store.add("arrived", 0) >= member.world_size),
            late="a rank did not come to the exchange",
            round_name="the exchange",
        )
        if kept is not None and store.add(f"kept/{kept.name}", 0) == member.world_size:
            return kept
        if member.is_coordinator:
            store.set("name", uuid.uuid4().hex)
        store.wait(["name"], timedelta(seconds=max(attempt.context.left_s(), _SHORTEST_WAIT_S)))
        name = store.get("name").decode()
        limit = timedelta(seconds=max(attempt.context.left_s(), _SHORTEST_WAIT_S))
        group = _gloo(PrefixStore(name, store), member.rank, member.world_size, limit)
    except RuntimeError as error:
        raise explain_broken_exchange(attempt, error) from error
    return _Kept(group, name, default_store(), os.getpid())


def _forget(records: Rendezvous, save_id: str, name: str) -> None:
    """Remove the records of the meeting from the store; every rank has read them."""
    store = records.part_of_store(_part(save_id))
    try:
        for key in ("arrived", "name", f"kept/{name}"):
            store.delete_key(key)
    except RuntimeError as error:
        _log.warning("could not remove the records of the exchange from the store: %s", error)


def _part(save_id: str) -> str:
    return f"exchange/{save_id}"


def _gloo(store: Any, rank: int, size: int, limit: timedelta) -> Any:
    make = getattr(dist, "ProcessGroupGloo", None)
    if make is None:
        raise unsupported_torch(
            "a group for the exchange of bytes between ranks",
            phase="write",
            expected="ProcessGroupGloo in torch.distributed",
            hint='use a build of torch with gloo, or pass strategy="direct"',
        )
    return make(store, rank, size, limit)
