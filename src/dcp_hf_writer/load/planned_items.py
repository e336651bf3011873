"""What a load does with the items that a planner planned, where this is not torch's own planner.

torch's planner asks for everything in its state dict, and for nothing else. Another planner may
leave out what does not fit, rename, resize, or load through tensors of its own. So its plan decides
what is loaded, and its items are checked one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType

from dcp_hf_writer.torch_seam.planners import HFLoadPlanner

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem


def has_methods_of(kind: type, one: object, *names: str) -> bool:
    """Whether `one` has these methods of `kind`: neither a subclass nor `one` replaces them."""
    return all(
        getattr(getattr(one, name, None), "__func__", None) is getattr(kind, name) for name in names
    )


def plans_all(planner: LoadPlanner) -> bool:
    """Whether a planner plans every value of its state dict, as torch's own does."""
    kinds = (DefaultLoadPlanner, HFLoadPlanner)
    return any(has_methods_of(kind, planner, "create_local_plan") for kind in kinds)


def plans_alone(planner: LoadPlanner | None) -> bool:
    """Whether the local plan of each rank is final, as it is with torch's own planner."""
    return has_methods_of(DefaultLoadPlanner, planner, "create_global_plan", "finish_plan")


def gives_own_tensors(planner: LoadPlanner) -> bool:
    """Whether a planner may give the same memory for several items, one after another.

    torch's own planner gives parts of the tensors in the state dict. Another planner may give a
    buffer, take its content when the item is committed, and give the buffer again.
    """
    steps = ("resolve_tensor", "commit_tensor", "transform_tensor")
    kinds = (DefaultLoadPlanner, HFLoadPlanner)
    return not has_methods_of(DefaultLoadPlanner, planner, *steps) or not any(
        has_methods_of(kind, planner, "lookup_tensor") for kind in kinds
    )


def item_faults(items: Iterable[ReadItem], metadata: Metadata) -> tuple[list[str], list[str]]:
    """Find the items of a plan that no stored chunk holds.

    Returns:
        The FQNs that the metadata lacks; and for every other item without a chunk, its FQN and what
        it asks for.
    """
    missing: dict[str, None] = {}
    faults: list[str] = []
    known: dict[str, dict[torch.Size, torch.Size]] = {}
    for item in items:
        index = item.storage_index
        entry = metadata.state_dict_metadata.get(index.fqn)
        if entry is None:
            missing[index.fqn] = None
        elif item.type == LoadItemType.TENSOR:
            # A tensor may have thousands of chunks, and as many items ask for them.
            sizes = known.get(index.fqn)
            if sizes is None:
                chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else ()
                sizes = known[index.fqn] = {chunk.offsets: chunk.sizes for chunk in chunks}
            if not _is_within(item, sizes.get(index.offset or torch.Size(()))):
                asked = f"{list(item.lengths)} elements at {list(item.storage_offsets)}"
                chunk = f"a chunk at {list(index.offset or ())}"
                faults.append(f"{index.fqn} ({asked} of {chunk}, which no stored chunk has)")
    return list(missing), faults


def _is_within(item: ReadItem, sizes: torch.Size | None) -> bool:
    return (
        sizes is not None
        and len(item.storage_offsets) == len(item.lengths) == len(sizes)
        and all(
            offset >= 0 and length >= 0 and offset + length <= size
            for offset, length, size in zip(item.storage_offsets, item.lengths, sizes, strict=True)
        )
    )
