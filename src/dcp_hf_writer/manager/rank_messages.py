"""Short messages between the ranks of a run, through the store of `torch.distributed`.

No message needs a collective, so a rank that is late or gone delays nobody beyond a deadline, and
the training group is not used.
"""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from dcp_hf_writer.errors import RankLostError
from dcp_hf_writer.torch_seam.calls_in_time import call_in_time
from dcp_hf_writer.torch_seam.default_store import has_default_group, own_store_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_T = TypeVar("_T")

ANSWER_S = 30.0
"""How long the store may take to answer a request. Its host may be stopped, or out of reach."""

_POLL_S = 0.02
_MAX_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a run."""

    rank: int
    """This rank, within the default group."""
    size: int
    """Number of ranks."""

    @classmethod
    def current(cls) -> World:
        """Return the ranks of the default group; one rank without `torch.distributed`."""
        if not has_default_group():
            return cls(0, 1)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank decides for all, and is the only one that deletes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1


class Messages:
    """The messages of one run, as one thread sees them. Each thread makes its own.

    A wait blocks the connection to the store, so threads must not share one.
    """

    def __init__(self, world: World, prefix: str, *, answer_s: float = ANSWER_S) -> None:
        """Connect to the store, unless this rank is alone.

        Args:
            world: The ranks.
            prefix: Start of all keys; the same on every rank, and different for each run.
            answer_s: How long the store may take to answer a request, in seconds.

        Raises:
            UnsupportedTorchError: If torch's default store cannot be found.
        """
        self.world = world
        self._prefix, self._answer_s = prefix, answer_s
        self._store: Any = None if world.is_alone else own_store_client()

    def put(self, key: str, value: object) -> None:
        """Publish a value.

        Raises:
            RankLostError: If the store is gone.
        """
        try:
            data = pickle.dumps(value)
            self._answer(lambda: self._store.set(self._key(key), data))
        except (RuntimeError, TimeoutError) as error:
            raise self._lost_store(error) from error

    def has(self, key: str) -> bool:
        """Whether a value was published.

        Raises:
            RankLostError: If the store is gone.
        """
        try:
            return bool(self._answer(lambda: self._store.check([self._key(key)])))
        except (RuntimeError, TimeoutError) as error:
            raise self._lost_store(error) from error

    def take(self, key: str, *, timeout_s: float, sender: str, doing: str) -> Any:
        """Wait for a value, and return it.

        Args:
            key: Key of the value.
            timeout_s: How long to wait, in seconds.
            sender: Who publishes it, for the message.
            doing: What waits for it, for the message.

        Raises:
            RankLostError: If the value does not come in time, or the store is gone.
        """
        name = self._key(key)
        try:
            data = self._answer(lambda: self._waited_for(name, timeout_s), more_s=timeout_s)
            return pickle.loads(data)  # noqa: S301 - from a rank of this run
        except (RuntimeError, TimeoutError) as error:
            msg = f"{sender} did not answer"
            raise RankLostError(
                msg,
                rank=self.world.rank,
                phase=doing,
                expected=f"an answer within {timeout_s:.0f} s",
                found=type(error).__name__,
                hint="that rank is gone or stuck; look at its log",
            ) from error

    def _waited_for(self, name: str, timeout_s: float) -> bytes:
        if not self._store.check([name]):
            try:
                self._store.wait([name], timedelta(seconds=max(timeout_s, 0.1)))
            except (RuntimeError, TimeoutError):
                # A rank that was stopped in the meantime may find the value there.
                if not self._store.check([name]):
                    raise
        return bytes(self._store.get(name))

    def _answer(self, ask: Callable[[], _T], *, more_s: float = 0.0) -> _T:
        return call_in_time(ask, limit_s=self._answer_s + more_s)

    def take_from_coordinator(self, key: str, *, timeout_s: float, doing: str) -> Any:
        """Wait for a value that the coordinator publishes, and return it; see `take`.

        Raises:
            RankLostError: As `take`.
        """
        return self.take(key, timeout_s=timeout_s, sender="rank 0, the coordinator", doing=doing)

    def collect(self, key: str, ranks: Iterable[int], *, timeout_s: float) -> dict[int, Any]:
        """Return the values that ranks publish in time under `<key>/<rank>`, by rank.

        Args:
            key: Start of the keys.
            ranks: The ranks.
            timeout_s: How long to wait, in seconds.

        Raises:
            RankLostError: If the store is gone.
        """
        missing, found = list(ranks), {}
        until, pause = time.monotonic() + timeout_s, _POLL_S
        while missing:
            for rank in list(missing):
                name = f"{key}/{rank}"
                if self.has(name):
                    found[rank] = self.take(name, timeout_s=1, sender="a rank", doing="collect")
                    missing.remove(rank)
            if not missing or time.monotonic() > until:
                break
            time.sleep(pause)
            pause = min(pause * 1.5, _MAX_POLL_S)
        return found

    def drop(self, key: str) -> None:
        """Remove a value that nobody needs any more."""
        try:
            self._answer(lambda: self._store.delete_key(self._key(key)))
        except (RuntimeError, TimeoutError, NotImplementedError):
            # Some stores cannot delete; the value is small and the store ends with the job.
            return

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _lost_store(self, error: BaseException) -> RankLostError:
        return RankLostError(
            "the store of the process group does not answer",
            rank=self.world.rank,
            found=type(error).__name__,
            hint="the process that hosts the store, usually rank 0, is gone or out of reach; "
            "restart the run",
        )


def sendable_error(
    error: BaseException | None, *, otherwise: Callable[[str], BaseException]
) -> BaseException | None:
    """Return an error that another rank can unpickle; some errors cannot be pickled.

    Args:
        error: The error; `None` stays `None`.
        otherwise: Makes the error to send instead, from the text of the original.
    """
    if error is None:
        return None
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - just made
    except Exception:  # noqa: BLE001 - any error may refuse
        copy = None
    return (
        error if isinstance(copy, BaseException) else otherwise(f"{type(error).__name__}: {error}")
    )
