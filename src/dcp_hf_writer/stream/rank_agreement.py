"""What ranks tell one another before they stream: so that all do the same, or raise the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from dcp_hf_writer.errors import CheckpointError, PlanningError
from dcp_hf_writer.excerpts import some_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.distributed import ProcessGroup

    from dcp_hf_writer.mapping.load_spec import ShardSpec

_Told = TypeVar("_Told")


@dataclass(frozen=True, slots=True)
class Facts:
    """What one rank tells the others."""

    fingerprint: str
    """Of all that must be equal on every rank."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs whose tensors are the same memory."""
    cuts: Mapping[str, tuple[ShardSpec, ...]]
    """How its part of each tensor that is sharded by hand was cut, by FQN."""
    error: CheckpointError | None
    """Why it cannot take part."""


def exchange(own: _Told, groups: Iterable[ProcessGroup]) -> dict[int, _Told]:
    """Return what each rank tells, by global rank; a collective over each group in turn.

    What is learned in one group is told in the next, so that it reaches all ranks of a mesh.
    """
    known = {dist.get_rank() if dist.is_initialized() else 0: own}
    for group in groups:
        told: list[dict[int, _Told] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, known, group=group)
        for some in told:
            known.update(some or {})
    return dict(sorted(known.items()))


def raise_first(errors: Mapping[int, CheckpointError | None]) -> None:
    """Raise the error of the lowest rank that has one, the same on all ranks.

    Raises:
        CheckpointError: As that rank met it, naming the rank.
    """
    for rank, error in errors.items():
        if error is not None:
            error.rank = rank
            raise error


def check_alike(facts: Mapping[int, Facts]) -> None:
    """Check that all ranks were given the same.

    Raises:
        PlanningError: Naming the ranks that differ.
    """
    ranks: dict[str, list[int]] = {}
    for rank, fact in facts.items():
        ranks.setdefault(fact.fingerprint, []).append(rank)
    if len(ranks) > 1:
        shown = " and ".join(f"one on ranks {some_ranks(some)}" for some in ranks.values())
        raise PlanningError(
            "ranks that share a mesh were asked to stream different things",
            phase="plan",
            expected="equal names, shapes, dtypes, placements, specs and options",
            found=shown,
        )
