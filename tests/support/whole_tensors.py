"""A DTensor as a whole, also where torch puts it together wrongly."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

# torch 2.9.1 orders the rows of an uneven `_StridedShard` wrongly in `full_tensor`; 2.11 does not.
_IS_WRONG = Version(torch.__version__) < Version("2.11")


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a whole; all ranks of its mesh call this."""
    if not isinstance(value, DTensor):
        return value
    if _IS_WRONG and any(isinstance(one, _StridedShard) for one in value.placements):
        return _from_chunks(value)
    return value.full_tensor()


def _from_chunks(value: DTensor) -> torch.Tensor:
    """Put the parts of all ranks where DCP would write them; each rank holds one block."""
    local = value.to_local().detach()
    parts: list[Any] = [
        (tuple(chunk.offsets), tuple(chunk.sizes), local)
        for chunk in value.__create_chunk_list__()  # type: ignore[attr-defined]
    ]
    for dim in range(value.device_mesh.ndim):
        group = value.device_mesh.get_group(dim)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, parts, group=group)
        parts = [part for one in gathered for part in one]
    found = torch.empty(value.shape, dtype=value.dtype)
    for offsets, sizes, part in parts:
        assert tuple(part.shape) == sizes
        found[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = part
    return found
