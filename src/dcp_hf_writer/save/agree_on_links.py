"""The round in which the ranks of a save find out which output files need not be written.

Each rank tells which files of the earlier checkpoint hold all of its own bytes. A file that every
rank names is complete as it is. The coordinator collects the answers, puts the links of these files
in place, and tells the others. The records are in the store of the save.

A rank that gets no answer must give up, and not write: a file that it would write to may be a link
by now, and then the bytes would go into the earlier checkpoint.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.save.failure_explanations import explain_broken_exchange
from dcp_hf_writer.save.wait_for_ranks import wait_for_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.rank_progress import Rendezvous

_log = logging.getLogger(__name__)

_DECISION = "decision"


def agree_on_links(
    attempt: Attempt,
    save_id: str,
    mine: Collection[int],
    put_in_place: Callable[[frozenset[int]], frozenset[int]],
) -> frozenset[int]:
    """Find out which output files are complete without a write; all ranks call it.

    No rank may hold a write slot here, or open an output file before.

    Args:
        attempt: The save.
        save_id: Id of the save.
        mine: Output files whose earlier file holds all bytes of this rank.
        put_in_place: Puts the links of some files in place, and returns those that are; called on
            the coordinator.

    Returns:
        The files that no rank writes.

    Raises:
        RankLostError: If a rank does not answer by the deadline.
        SaveAbortedError: If another rank failed before it answered.
    """
    member = attempt.member
    if member.rendezvous is None:
        return put_in_place(frozenset(mine))
    store = member.rendezvous.part_of_store(f"reuse/{save_id}")
    keys = [str(rank) for rank in range(member.world_size)]
    try:
        store.set(keys[member.rank], json.dumps(sorted(mine)))
        if not member.is_coordinator:
            _await(attempt, member.rendezvous, store, [_DECISION])
            return _numbers(store, _DECISION)
        attempt.at_end(partial(_forget, store, [*keys, _DECISION]))
        _await(attempt, member.rendezvous, store, keys)
        equal = frozenset.intersection(*(_numbers(store, key) for key in keys))
        taken = put_in_place(equal)
        store.set(_DECISION, json.dumps(sorted(taken)))
    except RuntimeError as error:
        raise explain_broken_exchange(attempt, error) from error
    return taken


def _numbers(store: Any, key: str) -> frozenset[int]:
    return frozenset(json.loads(store.get(key)))


def _await(attempt: Attempt, records: Rendezvous, store: Any, keys: Sequence[str]) -> None:
    """Wait until all keys are in the store; see `wait_for_ranks`."""
    wait_for_ranks(
        attempt,
        records,
        lambda: bool(store.check(list(keys))),
        late="a rank did not compare its bytes with the earlier checkpoint",
        round_name="the comparison ended",
    )


def _forget(store: Any, keys: Sequence[str]) -> None:
    """Remove the records of the round; the save is over, so every rank has read them."""
    try:
        for key in keys:
            store.delete_key(key)
    except RuntimeError as error:
        _log.debug("could not remove the records of a save from the store: %s", error)
