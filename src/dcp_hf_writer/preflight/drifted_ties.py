"""Check on this rank that tensors which a user or a model's config declares to be tied are equal.

The export leaves a tied name out. Sharding can turn one tied parameter into two: FSDP2 keeps a tie
only within one group. Training then changes the two differently, and an export of only one of them
would serve another model than the trained one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import ExportError
from dcp_hf_writer.mapping.spec_match import model_names
from dcp_hf_writer.mapping.tied_names import declared_ties

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.torch_seam.caller_frames import Planned


HOW_TO_TIE = (
    "shard them in one fully_shard group, or call model.tie_weights() after it; or export both, "
    "without alias_of and tied"
)


def untrue_tie(
    planned: Planned, export: HFExport, memory: Mapping[str, int], *, rank: int
) -> ExportError | None:
    """Compare tensors that are declared to be tied but do not share memory.

    Args:
        planned: What this rank plans to save.
        export: Options of the export.
        memory: Number of each tensor's memory, by FQN; equal numbers mean shared memory.
        rank: This rank.

    Returns:
        An error if two such tensors have different bytes on this rank; otherwise `None`.
    """
    state_dict, paths = planned.state_dict, planned.paths
    if not any(declared_ties(export, ())) or not state_dict:
        return None
    tensors = {
        fqn: paths.get(fqn, (fqn,)) for fqn, v in state_dict.items() if isinstance(v, torch.Tensor)
    }
    drifted = drifted_tie(state_dict, model_names(tensors, key=export.key), export, memory)
    if drifted is None:
        return None
    return ExportError(
        "tensors that are declared to be tied are not equal",
        rank=rank,
        phase="plan",
        fqn=drifted[0],
        expected=f"the values of {drifted[1]!r}, because the export keeps only those",
        found="different values",
        hint=HOW_TO_TIE,
    )


def drifted_tie(
    tensors: Mapping[str, Any],
    names: Mapping[str, str],
    export: HFExport,
    memory: Mapping[str, int],
) -> tuple[str, str] | None:
    """Find two tensors that are declared to be tied but differ on this rank.

    Args:
        tensors: Values by FQN; not all need to be tensors.
        names: Name within the model of each of its tensors, by FQN.
        export: Options of the export.
        memory: Number of each tensor's memory, by FQN; equal numbers mean shared memory.

    Returns:
        FQN of the tensor that the export would leave out, and of the one that it would keep;
        `None` if no two differ.
    """
    fqn_of = {name: fqn for fqn, name in names.items()}
    for drop, keep in dict(declared_ties(export, fqn_of)).items():
        one, other = fqn_of.get(drop), fqn_of.get(keep)
        if one is None or other is None or memory.get(one) == memory.get(other) is not None:
            continue
        if _differ(tensors[one], tensors[other]):
            return one, other
    return None


def _differ(one: Any, other: Any) -> bool:
    """Whether two tensors differ in bytes on this rank; `False` if they are sharded differently."""
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        if (one.device_mesh, one.placements) != (other.device_mesh, other.placements):
            return False
        one, other = one.to_local(), other.to_local()
    if isinstance(one, DTensor) or isinstance(other, DTensor):
        return False
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return True
    if one.is_meta or other.is_meta:
        return False
    return not torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
