"""Wait in a round of a save until the records of the other ranks are in the store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dcp_hf_writer.save.failure_explanations import (
    explain_broken_exchange,
    explain_failed_ranks,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.rank_progress import Rendezvous

# A rank asks the store again after this part of the time that it has waited, so that many ranks do
# not keep the store busy, and a short wait stays short.
_PART_OF_WAIT = 0.1
_SHORTEST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.5

# Seconds between two looks for ranks that have failed. A look reads a record of each rank, so it
# comes less often where there are many.
_LOOK_S_OF_RANK = 0.005
_SHORTEST_LOOK_S = 0.5


def wait_for_ranks(
    attempt: Attempt,
    records: Rendezvous,
    are_there: Callable[[], bool],
    *,
    late: str,
    round_name: str,
    among: Sequence[int] | None = None,
) -> None:
    """Wait until the records of a round are there.

    Args:
        attempt: The save.
        records: Tells which ranks have failed.
        are_there: Asks the store for the records; called again and again.
        late: What a rank did not do if the deadline passes, for the error.
        round_name: What follows "failed before" in the error, such as "the comparison ended".
        among: Ranks within the process group of the save that take part; `None` stands for all.

    Raises:
        RankLostError: If they are not there by the deadline, or the process of a rank is gone.
        SaveAbortedError: If a rank failed before.
        RuntimeError: If the store fails.
    """
    ranks = attempt.member.world_size if among is None else len(among)
    every_s = max(_SHORTEST_LOOK_S, _LOOK_S_OF_RANK * ranks)
    began = time.monotonic()
    look_at = began + every_s
    while not are_there():
        if not attempt.context.left_s():
            raise explain_broken_exchange(attempt, TimeoutError(late))
        attempt.check()
        if time.monotonic() > look_at:
            failed, gone = records.failed_ranks(attempt.member.count, among)
            if failed or gone:
                raise explain_failed_ranks(attempt, failed, gone, round_name=round_name)
            look_at = time.monotonic() + every_s
        pause_s = (time.monotonic() - began) * _PART_OF_WAIT
        time.sleep(min(max(pause_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))
