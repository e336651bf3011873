"""Ranks of one host tell each other values during a save, through records in the store.

No collective runs: a record waits for nobody, and a wait here names the rank that is missing.
"""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.save.failure_explanations import explain_broken_exchange
from dcp_hf_writer.save.wait_for_ranks import wait_for_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dcp_hf_writer.plan.global_plan import RankPlan
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.rank_progress import Rendezvous


_log = logging.getLogger(__name__)


class HostMeeting:
    """One meeting of the ranks of a host in one save; all of them take part, in the same steps."""

    def __init__(
        self, attempt: Attempt, records: Rendezvous, *, save_id: str, ranks: Sequence[int], me: int
    ) -> None:
        """Join a meeting.

        Args:
            attempt: The save.
            records: Records of the ranks of the save.
            save_id: Id of the save.
            ranks: Ranks of this host within the process group of the save, ascending.
            me: Index of this rank among them.
        """
        self._attempt, self._records = attempt, records
        self._ranks = ranks
        self.me = me
        """Index of this rank among them."""
        self._store = records.part_of_store(f"host/{save_id}/{ranks[0]}")
        self._steps: list[str] = []

    @classmethod
    @contextmanager
    def of(cls, attempt: Attempt, own: RankPlan, save_id: str) -> Iterator[HostMeeting]:
        """Meet the ranks of this host, and leave the meeting after the last step.

        Args:
            attempt: The save; it has records of the ranks.
            own: This rank's part of the global plan.
            save_id: Id of the save.
        """
        reach("before rows")
        records = attempt.member.rendezvous
        assert records is not None
        meeting = cls(attempt, records, save_id=save_id, ranks=own.host_ranks, me=own.host_rank)
        yield meeting
        meeting.leave()

    def gather(self, what: str, mine: Any) -> list[Any]:
        """Tell the other ranks a value, wait for theirs, and return all of them by index.

        Args:
            what: Name of this step of the meeting.
            mine: JSON value.

        Raises:
            RankLostError: If a rank of the host is gone, or tells nothing by the deadline.
            SaveAbortedError: If a rank of the host failed before this step.
        """
        try:
            return self._gather(what, mine)
        except CheckpointError:
            # Some of our own errors are RuntimeErrors too.
            raise
        except RuntimeError as error:
            raise explain_broken_exchange(self._attempt, error) from error

    def _gather(self, what: str, mine: Any) -> list[Any]:
        self._store.set(f"{what}/{self.me}", json.dumps(mine))
        self._store.add(what, 1)
        self._steps.append(what)
        wait_for_ranks(
            self._attempt,
            self._records,
            lambda: self._store.add(what, 0) == len(self._ranks),
            late="a rank of this host did not come to the meeting about whole rows",
            round_name="the ranks of the host met",
            among=self._ranks,
        )
        return [
            mine if index == self.me else json.loads(self._store.get(f"{what}/{index}"))
            for index in range(len(self._ranks))
        ]

    def leave(self) -> None:
        """Say that this rank has read all records; the last rank to leave removes them."""
        try:
            if self._store.add("left", 1) < len(self._ranks):
                return
            for step in self._steps:
                for index in range(len(self._ranks)):
                    self._store.delete_key(f"{step}/{index}")
            for key in (*self._steps, "left"):
                self._store.delete_key(key)
        except RuntimeError as error:
            # The ranks have agreed; what stays are a few bytes for each rank.
            _log.info("could not remove the records of a meeting from the store: %s", error)
