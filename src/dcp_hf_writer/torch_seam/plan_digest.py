"""Digests of local plans, by which the coordinator sees that a layout has not changed.

Each rank digests its own plan. The coordinator then compares one text a rank, and need not visit
millions of items to find out that it has planned them before.

Mechanism: the fields of torch's `WriteItem` and of the values in it. A digest covers all of them.

Looked at: torch 2.10 to 2.15, `planner.py` and `metadata.py`. When torch changes: plans with other
fields, or with items of a subclass, have no digest. Then each save is planned anew.
"""

from __future__ import annotations

import hashlib
import marshal
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.checkpoint.planner import SavePlanner

_KNOWN: dict[Any, tuple[str, ...]] = {
    SavePlan: ("items", "storage_data", "planner_data", "usable"),
    WriteItem: ("index", "type", "bytes_io_data", "tensor_data"),
    MetadataIndex: ("fqn", "offset", "index"),
    BytesIOWriteData: ("nbytes",),
    TensorWriteData: ("chunk", "properties", "size"),
    ChunkStorageMetadata: ("offsets", "sizes"),
    TensorProperties: ("dtype", "layout", "requires_grad", "memory_format", "pin_memory"),
}
# torch 2.15 added strides.
_ALSO_KNOWN = {TensorProperties: (*_KNOWN[TensorProperties], "strides")}
_IS_KNOWN = all(
    tuple(f.name for f in fields(kind)) in {names, _ALSO_KNOWN.get(kind, names)}
    for kind, names in _KNOWN.items()
)

# Version 2 writes equal values as equal bytes; later versions also write which objects are shared.
_MARSHAL_VERSION = 2


def digest_of_plan(plan: SavePlan, *facts: Any) -> str:
    """Return a digest of a rank's plan and of other facts that the global plan depends on.

    Two plans with equal digests lead to one global plan.

    Args:
        plan: The plan. Its `storage_data` is left out.
        facts: Plain values: texts, numbers, `None`, and tuples of these.

    Returns:
        The digest in hex; `""` if the plan holds something that this module does not know.
    """
    try:
        values = (facts, plan.planner_data, plan.usable, *_values(plan.items))
        return hashlib.sha256(marshal.dumps(values, _MARSHAL_VERSION)).hexdigest()
    except ValueError:
        # `marshal` refuses objects: planner_data may hold anything.
        return ""


def digests_of_global_plan(
    plans: Sequence[SavePlan], planner: SavePlanner, sent: Sequence[str]
) -> tuple[str, ...] | None:
    """Return digests of what all ranks write; equal digests mean equal global plans.

    Args:
        plans: The plans after torch's global planning, by rank.
        planner: The planner of the coordinator, which made them.
        sent: The digest that each rank sent with its local plan.

    Returns:
        The digests; `None` if equal local plans may lead to different global plans, because the
        planner has a global planning of its own, or because a rank's plan has no digest.
    """
    if not all(sent) or not plans_globally_as_torch(planner):
        return None
    options = (f"{name}={getattr(planner, name, None)!r}" for name in _GLOBAL_OPTIONS)
    # The counts cost nothing, and would show a torch whose planning depends on more than its input.
    counts = (str(len(plan.items)) for plan in plans)
    return (*options, *counts, *sent)


def plans_globally_as_torch(planner: SavePlanner) -> bool:
    """Whether the global planning of a planner is that of torch's `DefaultSavePlanner`."""
    if not isinstance(planner, DefaultSavePlanner):
        return False
    own = set(vars(planner))
    for kind in type(planner).__mro__:
        if kind is DefaultSavePlanner:
            break
        own.update(vars(kind))
    theirs = {name for name, value in vars(DefaultSavePlanner).items() if callable(value)}
    return own.isdisjoint(theirs - _METHODS_OF_A_RANK)


_GLOBAL_OPTIONS = ("dedup_save_to_lowest_rank", "flatten_state_dict", "flatten_sharded_tensors")
_METHODS_OF_A_RANK = frozenset(
    {
        *("__init__", "set_up_planner", "create_local_plan", "finish_plan"),
        *("resolve_data", "lookup_object", "transform_object"),
    }
)
"""Methods of a planner that work on one rank: the digest of the rank shows what they changed."""


def _values(items: Iterable[WriteItem]) -> list[tuple[Any, ...]]:
    """Return all fields of all items as plain values.

    Raises:
        ValueError: If an item has fields that this module does not know.
    """
    if not _IS_KNOWN:
        msg = "torch's plans have other fields"
        raise ValueError(msg)
    return [_value(item) for item in items]


def _value(item: WriteItem) -> tuple[Any, ...]:
    index, data, pickled = item.index, item.tensor_data, item.bytes_io_data
    parts = [item, index]
    shown: tuple[Any, ...] = ()
    if data is not None:
        chunk, kind = data.chunk, data.properties
        strides = getattr(kind, "strides", None)
        parts += [data, chunk, kind]
        shown = (
            *(tuple(chunk.offsets), tuple(chunk.sizes), tuple(data.size)),
            *(str(kind.dtype), str(kind.layout), kind.requires_grad),
            *(str(kind.memory_format), kind.pin_memory, strides and tuple(strides)),
        )
    if pickled is not None:
        parts.append(pickled)
        shown = (*shown, pickled.nbytes)
    if any(type(part) not in _KNOWN for part in parts):
        msg = "an item of a plan has fields of its own"
        raise ValueError(msg)
    offset = None if index.offset is None else tuple(index.offset)
    has = (data is not None, pickled is not None)
    return (index.fqn, offset, index.index, item.type.name, has, shown)
