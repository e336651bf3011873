"""Describe a stored DCP checkpoint as the plan of a save by one rank, for the planner of exports.

Pure: the metadata goes in, a plan comes out. A conversion then plans with the functions of a save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcp_hf_writer.formats.parse_dcp_metadata import paths_in
from dcp_hf_writer.plan.global_plan import LocalFacts
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.tensors.row_major_parts import row_major_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.metadata import Metadata


def plan_of_stored(metadata: Metadata, *, max_nbytes: int) -> SavePlan:
    """Return a plan with an item for each part of each tensor.

    DCP records the paths of the tensors in state-dict order, so the plan has the order of the save.

    Args:
        metadata: The metadata, as `parse_metadata` returned it.
        max_nbytes: Most bytes of an item; a larger chunk becomes several items.
    """
    stored = metadata.state_dict_metadata
    paths = paths_in(metadata)
    order = tuple(dict.fromkeys([*(fqn for fqn in paths if fqn in stored), *stored]))
    items = [
        item
        for fqn in order
        if isinstance(entry := stored[fqn], TensorStorageMetadata)
        for item in _items(fqn, entry, max_nbytes)
    ]
    facts = LocalFacts(host="", order=order, tied=())
    return SavePlan(items, storage_data=facts, planner_data=paths)


def _items(fqn: str, entry: TensorStorageMetadata, max_nbytes: int) -> Iterator[WriteItem]:
    most = max(1, max_nbytes // entry.properties.dtype.itemsize)
    for chunk in entry.chunks:
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        for part in (box,) if not box.numel else row_major_parts(box, most):
            offsets = torch.Size(part.offsets)
            yield WriteItem(
                MetadataIndex(fqn, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, torch.Size(part.sizes)),
                    properties=entry.properties,
                    size=entry.size,
                ),
            )
