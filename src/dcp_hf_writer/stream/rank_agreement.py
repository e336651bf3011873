"""Exchange facts between ranks before they stream, so that all do or raise the same."""

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
    """Fingerprint of everything that must be equal on all ranks."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs whose tensors have the same memory."""
    cuts: Mapping[str, tuple[ShardSpec, ...]]
    """The cuts that made this rank's shard of each tensor that is sharded by hand, by FQN."""
    error: CheckpointError | None
    """Why this rank cannot take part; `None` if it can."""


def exchange(own: _Told, groups: Iterable[ProcessGroup]) -> dict[int, _Told]:
    """Gather one value from each rank, by global rank. Runs one collective in each group in turn.

    A rank passes on in the next group what it got in the last one, so that every value reaches all
    ranks of a mesh.
    """
    known = {dist.get_rank() if dist.is_initialized() else 0: own}
    for group in groups:
        told: list[dict[int, _Told] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, known, group=group)
        for some in told:
            known.update(some or {})
    return dict(sorted(known.items()))


def raise_first(errors: Mapping[int, CheckpointError | None]) -> None:
    """Raise the error of the lowest rank that has one, so that all ranks raise the same error.

    Raises:
        CheckpointError: The error of that rank; it names the rank.
    """
    for rank, error in errors.items():
        if error is not None:
            error.rank = rank
            raise error


def check_alike(facts: Mapping[int, Facts]) -> None:
    """Check that all ranks stream the same tensors with the same options.

    Raises:
        PlanningError: If they do not; names the ranks that differ.
    """
    ranks: dict[str, list[int]] = {}
    for rank, fact in facts.items():
        ranks.setdefault(fact.fingerprint, []).append(rank)
    if len(ranks) > 1:
        shown = " and ".join(f"one set on ranks {some_ranks(some)}" for some in ranks.values())
        raise PlanningError(
            "ranks of one mesh were called to stream different tensors or options",
            phase="plan",
            expected="equal names, shapes, dtypes, placements, specs and options on all ranks",
            found=shown,
        )
