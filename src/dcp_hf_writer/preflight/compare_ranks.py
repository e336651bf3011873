"""Refuse different values under one name: DCP takes them for replicas and keeps one rank's.

`rank_samples` makes the samples that the coordinator compares here.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.excerpts import some_ranks
from dcp_hf_writer.preflight.rank_samples import Rule, hash_of_item, rows_of
from dcp_hf_writer.said_once import SAID_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt
    from torch.distributed.checkpoint.planner import SavePlan
    from typing_extensions import Self

    from dcp_hf_writer.said_once import SaidOnce

    _Measure = Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[np.float64]]

_log = logging.getLogger(__name__)

# Replicas that nothing keeps equal in training drift apart by rounding, far less than this fraction
# of their norm. Shards have nothing in common, and differ by more than their norm.
_DRIFT = 0.01

# Stands for infinity: more than any finite bfloat16.
_LARGEST = 2.0**128

# How many groups of ranks a message names.
_SHOWN = 8

_WEIGHT_HINT = (
    "pass planner=HFSavePlanner(specs) to the save, with specs whose shards say what each rank "
    "holds; HFSavePlanner() without specs keeps one of the tensors"
)
_STATE_HINT = (
    "to keep each rank's own value (random state, data loader), save it as PerRank(value); to keep "
    "one of them, leave it in the state dict of one rank only; for optimizer state of tensors that "
    "are sharded by hand, pass planner=HFSavePlanner(specs); for that of pipeline stages, use FQNs "
    "as keys: get_optimizer_state_dict with flatten_optimizer_state_dict=True"
)


def check_samples(
    samples: Sequence[bytes], plans: Iterable[SavePlan], *, said: SaidOnce = SAID_ONCE
) -> None:
    """Compare the samples that the ranks sent (coordinator).

    Args:
        samples: Sample of each rank, in rank order; empty samples are not compared.
        plans: Plans in which every FQN occurs.
        said: What was logged before.

    Raises:
        PlanningError: If values differ. The error names one of them, the ranks that differ, and
            what to pass.
    """
    ranks: dict[bytes, list[int]] = {}
    for rank, sample in enumerate(samples):
        if sample:
            ranks.setdefault(sample, []).append(rank)
    if len(ranks) <= 1:
        return
    both = [rows_of(sample) for sample in ranks]
    holders = list(ranks.values())
    compared = [
        _Compared.of([rows for rows, _ in both], holders, _distance),
        _Compared.of([rows for _, rows in both], holders, _is_other),
    ]
    for one in compared:
        one.refuse(plans)
    for one in compared:
        one.warn(plans, said)


class _Compared:
    """Rows of all ranks, and how far each is from the first row of its name."""

    def __init__(
        self, rows: npt.NDArray[Any], holders: list[list[int]], distance: npt.NDArray[np.float64]
    ) -> None:
        self._rows, self._holders, self._distance = rows, holders, distance

    @classmethod
    def of(
        cls, tables: Sequence[npt.NDArray[Any]], ranks: Sequence[list[int]], how: _Measure
    ) -> Self:
        """Compare the rows of some ranks.

        Args:
            tables: One for each distinct sample.
            ranks: The ranks that sent each.
            how: Returns the distance between rows and the first rows of their names.
        """
        rows = np.concatenate(tables)
        holders = [holder for holder, table in zip(ranks, tables, strict=True) for _ in table]
        _, first, group = np.unique(rows["name"], return_index=True, return_inverse=True)
        return cls(rows, holders, how(rows, rows[first[group]]))

    def refuse(self, plans: Iterable[SavePlan]) -> None:
        """Raise for the value that differs most among those that must not differ."""
        is_lenient = self._rows["rule"] == Rule.LENIENT
        refused = np.where(is_lenient & np.isfinite(self._distance), 0, self._distance)
        if not len(refused) or not refused.max() > _DRIFT:
            return
        # If the weights differ, so does their optimizer state, and the hint for weights helps both.
        of_weights = np.where(self._rows["rule"] == Rule.STATE, 0, refused)
        is_weight = bool(of_weights.max() > _DRIFT)
        worst = int(np.argmax(of_weights if is_weight else refused))
        raise PlanningError(
            f"ranks hold different {'tensors' if is_weight else 'values'} under one name, and DCP "
            "would keep only one of them",
            phase="plan",
            fqn=self._fqn(worst, plans),
            expected="equal replicas, or declared shards" if is_weight else "equal on all ranks",
            found=self._found(worst),
            hint=_WEIGHT_HINT if is_weight else _STATE_HINT,
        )

    def warn(self, plans: Iterable[SavePlan], said: SaidOnce) -> None:
        """Log the value that differs most."""
        if not len(self._distance) or self._distance.max() == 0:
            return
        is_lenient = self._rows["rule"] == Rule.LENIENT
        for is_meant, text in (
            (is_lenient, "ranks hold different values of %s: %s; the save keeps one of them"),
            (~is_lenient, "the replicas of %s have drifted apart: %s; the save keeps one of them"),
        ):
            distance = np.where(is_meant, self._distance, 0)
            worst = int(np.argmax(distance))
            if distance[worst] > 0:
                said.warn(_log, text, self._fqn(worst, plans), self._found(worst))

    def _found(self, worst: int) -> str:
        alike: dict[bytes, list[int]] = {}
        for i in np.flatnonzero(self._rows["name"] == self._rows["name"][worst]):
            alike.setdefault(self._rows[i].tobytes(), []).extend(self._holders[i])
        groups = list(alike.values())[:_SHOWN]
        return " and ".join(f"one on ranks {some_ranks(group)}" for group in groups)

    def _fqn(self, row: int, plans: Iterable[SavePlan]) -> str | None:
        item = int(self._rows["item"][row])
        places = ((one.index.fqn, one.index.offset) for plan in plans for one in plan.items)
        return next((fqn for fqn, at in places if hash_of_item(fqn, at) == item), None)


def _distance(rows: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the distance between sampled tensors, relative to the larger norm of the two.

    Tensors of different dtype or shape are infinitely far apart. Tensors whose sampled bits differ
    are never at the same place, even if they round to the same values.
    """
    one, other = _floats(rows["values"]), _floats(others["values"])
    norm = np.maximum(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    distance: npt.NDArray[np.float64] = np.linalg.norm(one - other, axis=1)
    distance[norm > 0] /= norm[norm > 0]
    nearest = np.finfo(np.float64).tiny
    distance[(rows["bits"] != others["bits"]) & (distance == 0)] = nearest
    distance[rows["kind"] != others["kind"]] = np.inf
    return distance


def _is_other(rows: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return 1 for each digest that differs, 0 for the others."""
    distance: npt.NDArray[np.float64] = (rows["digest"] != others["digest"]).astype(np.float64)
    return distance


def _floats(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    floats = (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    # The square of the largest float64 would be infinite, and the quotient of two norms no number.
    return np.nan_to_num(floats, posinf=_LARGEST, neginf=-_LARGEST)
