"""Check on this rank that tensors which a user or a model's config declares to be tied are equal.

The export leaves a tied name out. Sharding can turn one tied parameter into two: FSDP2 keeps a tie
only within one group. Training then changes the two differently, and an export of only one of them
would serve another model than the trained one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import ExportError, ModelKeyError
from dcp_hf_writer.mapping.spec_match import model_names
from dcp_hf_writer.mapping.tied_names import declared_ties
from dcp_hf_writer.torch_seam.tensor_forms import local_shards, plain_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.torch_seam.caller_frames import Planned

    _Shards = tuple[tuple[tuple[int, ...], torch.Tensor], ...]

HOW_TO_TIE = (
    "shard them in one fully_shard group, or call model.tie_weights() after it; or export both, "
    "without alias_of and tied"
)


@dataclass(frozen=True, slots=True)
class UntrueTie:
    """Two tensors that are declared to be tied, and are not known to be equal."""

    dropped: str
    """FQN of the tensor that the export would leave out."""
    kept: str
    """FQN of the tensor that it would keep."""
    is_compared: bool
    """Whether their values differ; `False` if they are sharded differently, so nobody can tell."""

    @property
    def found(self) -> str:
        """What is wrong, for an error message."""
        if self.is_compared:
            return "different values"
        return "another sharding, so the values cannot be compared"


def untrue_tie(
    planned: Planned,
    names: Mapping[str, str],
    export: HFExport,
    memory: Mapping[str, int],
    *,
    rank: int,
) -> ExportError | None:
    """Compare tensors that are declared to be tied but do not share memory.

    Args:
        planned: What this rank plans to save.
        names: Name of each tensor of the model, by FQN, from `names_if_tied`.
        export: Options of the export.
        memory: Number of each tensor's memory, by FQN; equal numbers mean shared memory.
        rank: This rank.

    Returns:
        An error if two such tensors have different bytes on this rank, or cannot be compared;
        otherwise `None`.
    """
    drifted = drifted_tie(planned.state_dict, names, export, memory)
    if drifted is None:
        return None
    return _error(drifted.dropped, drifted.kept, drifted.found, rank=rank)


def lone_ties(held: Collection[str], export: HFExport) -> tuple[tuple[str, str, bool], ...]:
    """List the declared ties where this rank holds only one of the two tensors.

    Args:
        held: Names within the model of the tensors that this rank holds.
        export: Options of the export.

    Returns:
        For each tie, the name of the dropped tensor, the name of the kept one, and whether this
        rank holds the dropped one.
    """
    names = frozenset(held)
    declared = dict(declared_ties(export, names)).items()
    return tuple((d, k, d in names) for d, k in declared if (d in names) != (k in names))


def tie_apart(lone: Iterable[tuple[str, str, bool]]) -> ExportError | None:
    """Refuse a declared tie of two tensors that different ranks hold: nobody can compare them.

    Args:
        lone: What `lone_ties` found on all ranks.
    """
    dropped: set[tuple[str, str]] = set()
    kept: set[tuple[str, str]] = set()
    for drop, keep, holds_dropped in lone:
        (dropped if holds_dropped else kept).add((drop, keep))
    for drop, keep in sorted(dropped & kept):
        return _error(drop, keep, "each on another rank, so the values cannot be compared")
    return None


def names_if_tied(planned: Planned, export: HFExport) -> Mapping[str, str]:
    """Return the name of each tensor of the model on this rank, by FQN; empty without a tie.

    Also empty if it is not clear which entry holds the model: then there will be no export.
    """
    if not any(declared_ties(export, ())):
        return {}
    try:
        return model_names(planned.paths_of_tensors(), key=export.key, wanted=export.declared_names)
    except ModelKeyError:
        return {}


def _error(dropped: str, kept: str, found: str, *, rank: int | None = None) -> ExportError:
    return ExportError(
        "tensors that are declared to be tied are not equal",
        rank=rank,
        phase="plan",
        fqn=dropped,
        expected=f"the values of {kept!r}, because the export keeps only those",
        found=found,
        hint=HOW_TO_TIE,
    )


def drifted_tie(
    tensors: Mapping[str, Any],
    names: Mapping[str, str],
    export: HFExport,
    memory: Mapping[str, int],
) -> UntrueTie | None:
    """Find two tensors that are declared to be tied, but differ or cannot be compared on this rank.

    Args:
        tensors: Values by FQN; not all need to be tensors.
        names: Name within the model of each of its tensors, by FQN.
        export: Options of the export.
        memory: Number of each tensor's memory, by FQN; equal numbers mean shared memory.

    Returns:
        The first such pair; `None` if there is none.
    """
    fqn_of = {name: fqn for fqn, name in names.items()}
    declared = dict(declared_ties(export, fqn_of))
    for drop, keep in declared.items():
        one, other = fqn_of.get(drop), fqn_of.get(keep)
        if one is None or other is None or memory.get(one) == memory.get(other) is not None:
            continue
        has_spec = not export.spec_by_fqn.keys().isdisjoint((drop, keep))
        if keep in declared or (not has_spec and tensors[one].shape != tensors[other].shape):
            # Planning refuses such a tie, and says why.
            continue
        are_equal = _are_equal(tensors[one], tensors[other])
        if not are_equal:
            return UntrueTie(one, other, is_compared=are_equal is not None)
    return None


def _are_equal(one: Any, other: Any) -> bool | None:
    """Whether two tensors have equal bytes on this rank; `None` if they are sharded differently."""
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        if (one.device_mesh, one.placements) != (other.device_mesh, other.placements):
            return None
    elif isinstance(one, DTensor) or isinstance(other, DTensor):
        return None
    shards, others = local_shards(one), local_shards(other)
    if shards is not None or others is not None:
        return _are_equal_shards(shards, others)
    one, other = plain_of(one), plain_of(other)
    if one is None or other is None:
        # Encoded values: nobody can say whether two codes mean the same.
        return None
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # Tensors without data are equal as far as a dry run can tell.
    return one.is_meta or other.is_meta or torch.equal(_bytes(one), _bytes(other))


def _are_equal_shards(one: _Shards | None, other: _Shards | None) -> bool | None:
    """Whether two ShardedTensors have equal shards; `None` if they are cut differently."""
    if one is None or other is None or [at for at, _ in one] != [at for at, _ in other]:
        return None
    found = [_are_equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True)]
    return None if None in found else all(found)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
