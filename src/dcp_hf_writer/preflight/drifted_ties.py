"""Ties that a user or a model's configuration declares, and whether they are true on this rank.

A tied name is left out of the export. Two parameters that were one, and that sharding has made two
(FSDP2 keeps a tie only within one group), drift apart as they are trained: an export of one of them
would then serve another model than the one that was trained.
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
    from dcp_hf_writer.torch_seam.frames import Planned


HOW_TO_TIE = (
    "shard them in one fully_shard group, or call model.tie_weights() after it; or export both, "
    "without alias_of and tied"
)


def untrue_tie(
    planned: Planned, export: HFExport, memory: Mapping[str, int], *, rank: int
) -> ExportError | None:
    """Compare tensors that are declared to be tied, where they are not one memory.

    Args:
        planned: What is planned on this rank.
        export: Options of the export.
        memory: Number of the memory of each tensor, by FQN.
        rank: This rank.

    Returns:
        What is wrong, if two of them have different bytes on this rank.
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
        expected=f"the values of {drifted[1]!r}, as only these would be exported",
        found="others",
        hint=HOW_TO_TIE,
    )


def drifted_tie(
    tensors: Mapping[str, Any],
    names: Mapping[str, str],
    export: HFExport,
    memory: Mapping[str, int],
) -> tuple[str, str] | None:
    """Find two tensors that are declared to be tied, and differ on this rank.

    Args:
        tensors: Tensors by FQN; other values may be among them.
        names: Name within the model of each of its tensors, by FQN.
        export: Options of the export.
        memory: Number of the memory of each tensor, by FQN.

    Returns:
        FQN of the one that would be left out, and of the one that would be kept.
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
    """Whether two tensors differ in bytes here; `False` where they are not held alike."""
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
