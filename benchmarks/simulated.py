"""Plans of ranks that are not there, as DCP's default planner makes them of shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcp_hf_writer.plan.global_plan import LocalFacts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RANKS_A_HOST = 8

Shard = tuple[str, torch.Size, torch.Size, torch.Size]
"""FQN, offsets and sizes of the shard, shape of the whole tensor."""


def rank_plan(rank: int, paths: Mapping[str, tuple[str, ...]], shards: Iterable[Shard]) -> SavePlan:
    """Return what a rank sends to the coordinator: bfloat16 shards, and the facts of our export."""
    properties = TensorProperties(dtype=torch.bfloat16)
    items = [
        WriteItem(
            MetadataIndex(fqn, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, shape),
        )
        for fqn, offsets, sizes, shape in shards
    ]
    host = f"host{rank // RANKS_A_HOST}"
    facts = LocalFacts(host, tuple(paths) if rank == 0 else None, ())
    return SavePlan(items, storage_data=facts, planner_data=paths)
