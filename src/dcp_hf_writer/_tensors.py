"""What a tensor of this rank is: whose memory, and how it was cut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer.errors import PlanningError

if TYPE_CHECKING:
    from collections.abc import Mapping


def memory_of(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Number the tensors of a flat state dict by the memory that they are, by FQN.

    Tensors with equal numbers are one and the same; those without elements here are left out.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    found: dict[str, int] = {}
    for fqn, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue
        if isinstance(value, DTensor):
            check_one_block(fqn, value)
        identity = memory_identity(value)
        if identity is not None:
            found[fqn] = numbers.setdefault(identity, len(numbers))
    return found


def memory_identity(value: torch.Tensor) -> tuple[Any, ...] | None:
    """Name the memory and view of a tensor; equal for tied tensors, `None` without elements."""
    local = value._local_tensor if isinstance(value, DTensor) else value  # noqa: SLF001
    if type(local) not in {torch.Tensor, torch.nn.Parameter} or not local.numel():
        return None
    where = (local.device, local.data_ptr(), local.dtype)
    return (*where, tuple(local.shape), local.stride(), tuple(value.shape))


def tied_groups(memory: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of FQNs that are the same memory."""
    groups: dict[int, list[str]] = {}
    for fqn, number in memory.items():
        groups.setdefault(number, []).append(fqn)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def check_one_block(fqn: str, tensor: DTensor) -> None:
    """Refuse a DTensor whose local part is several blocks of the whole.

    DCP records one block for it, at the first offset and of the full local size: a checkpoint that
    is wrong without a word.

    Raises:
        PlanningError: Naming the placement.

    Source:
        torch.distributed.tensor, `_StridedShard`: the strides of one mesh dimension cancel out if
        the dimensions to its right shard the same tensor dimension `split_factor` ways.
    """
    placements = tensor.placements
    for i, placement in enumerate(placements):
        if not isinstance(placement, _StridedShard):
            continue
        inner = math.prod(
            tensor.device_mesh.size(j)
            for j in range(i + 1, len(placements))
            if getattr(placements[j], "dim", None) == placement.dim
        )
        if inner != placement.split_factor:
            msg = "a rank holds several blocks of one tensor, which DCP's planner takes for one"
            raise PlanningError(
                msg,
                phase="plan",
                fqn=fqn,
                expected="placements that leave one block on each rank",
                found=str(placements),
                hint="redistribute it to Shard placements in the state dict that is saved",
            )
