"""Which targets each rank gets with its plan, and on which hosts ranks share rows.

Pure. The stacks of experts of a model have the same copies, so each answer is found once for all
of them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dcp_hf_writer.plan.regions import RowIndex

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.plan.layout import PartTarget
    from dcp_hf_writer.plan.planned_tensors import PlannedTensor
    from dcp_hf_writer.tensors.strided_copies import Copy

    Targets = Mapping[str, tuple[PartTarget, ...]]
    """The targets of each runtime tensor, by FQN."""


def hosts_that_share_rows(
    targets: Targets, tensors: Mapping[str, PlannedTensor], hosts: Sequence[str]
) -> set[str]:
    """Return the hosts with several ranks that may hold parts of the same rows of a file.

    A rank does if its shard of a tensor is cut on another dimension than the first one, or if the
    file does not store the tensor's dimensions in their order.

    Args:
        targets: The targets of the export.
        tensors: What the ranks write of each tensor, by FQN.
        hosts: Host of each rank.
    """
    found: set[str] = set()
    turned: dict[tuple[int, ...], bool] = {}
    seen: set[tuple[object, ...]] = set()
    for fqn, parts in targets.items():
        tensor = tensors[fqn]
        if len(tensor.ranks) == 1:
            continue
        copies = _copies_ids(parts)
        is_turned = turned.get(copies)
        if is_turned is None:
            is_turned = any(_is_turned(copy) for part in parts for copy in part.copies)
            turned[copies] = is_turned
        # Tensors that are cut alike lead to the same hosts.
        cut = is_turned, tensor.data.size, tuple(tensor.sizes), tuple(tensor.ranks)
        if cut not in seen:
            seen.add(cut)
            ranks = set(tensor.ranks) if is_turned else _ranks_with_cut_rows(tensor)
            of_hosts = Counter(hosts[rank] for rank in ranks)
            found.update(host for host, count in of_hosts.items() if count > 1)
    return found


def _copies_ids(parts: Sequence[PartTarget]) -> tuple[int, ...]:
    """Return the same numbers for tensors whose targets take the same elements from them."""
    # Specs of equal layers share their `copies` objects, which are too large to compare.
    return tuple([id(part.copies) for part in parts])


def _is_turned(copy: Copy) -> bool:
    """Whether the rows of a file are not rows of the runtime tensor."""
    dims = [loop.dim for loop in copy.loops]
    return dims != sorted(dims)


def _ranks_with_cut_rows(tensor: PlannedTensor) -> set[int]:
    """Return the ranks whose shards do not have whole rows."""
    row = tensor.data.size[1:]
    shards = zip(tensor.ranks, tensor.sizes, strict=True)
    return {rank for rank, sizes in shards if sizes[1:] != row}


def targets_by_rank(
    targets: Targets, tensors: Mapping[str, PlannedTensor], *, world_size: int
) -> list[dict[str, tuple[PartTarget, ...]]]:
    """Return for each rank the targets near the rows that it writes.

    A rank that holds one expert of a layer does not get the targets of the other experts.

    Args:
        targets: Targets of tensors of the plan.
        tensors: What the ranks write of each tensor, by FQN.
        world_size: Number of ranks.
    """
    found: list[dict[str, tuple[PartTarget, ...]]] = [{} for _ in range(world_size)]
    indexes: dict[tuple[int, ...], RowIndex] = {}
    for fqn, parts in targets.items():
        tensor = tensors[fqn]
        if len(parts) == 1 or not tensor.data.size:
            for rank in tensor.ranks:
                found[rank][fqn] = parts
            continue
        copies = _copies_ids(parts)
        index = indexes.get(copies)
        if index is None:
            index = indexes[copies] = RowIndex(parts)
        # Ranks that share rows get the same tuple.
        near: dict[frozenset[tuple[int, int]], tuple[PartTarget, ...]] = {}
        for rank, rows in _rows_by_rank(tensor).items():
            if rows not in near:
                near[rows] = tuple([parts[i] for i in index.near_rows(rows)])
            found[rank][fqn] = near[rows]
    return found


def _rows_by_rank(tensor: PlannedTensor) -> dict[int, frozenset[tuple[int, int]]]:
    """Return, for each rank, the first row and one past the last row of each of its chunks."""
    rows: dict[int, set[tuple[int, int]]] = {}
    for rank, offsets, sizes in zip(tensor.ranks, tensor.offsets, tensor.sizes, strict=True):
        rows.setdefault(rank, set()).add((offsets[0], offsets[0] + sizes[0]))
    return {rank: frozenset(wanted) for rank, wanted in rows.items()}
