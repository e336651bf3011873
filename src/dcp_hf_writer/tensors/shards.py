"""Which blocks of the whole tensor a rank's local tensor consists of.

Pure: no I/O, no process group. Cuts apply in order: each one cuts what the cut before it left.
torch applies the placements of a DTensor in the same way, from the first mesh dimension to the
last.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import PlanningError, SpecError
from dcp_hf_writer.tensors.boxes import Box, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_Run = tuple[int, int]
"""Start and extent of consecutive indices of a dimension of the whole tensor."""

# Entries of the cache: the layers of a model have the same cuts, and so has every save of a run.
_KEPT = 4096


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One cut of a tensor along one dimension, for tensors that a trainer shards by hand.

    The dimension is cut into `interleave` segments, and each segment into `count` chunks. Both cuts
    follow `torch.chunk`. The rank holds chunk `index` of each segment, one after another.
    """

    dim: int
    """Dimension that is cut."""
    index: int
    """Index of the chunk that this rank holds, counted from 0."""
    count: int
    """Number of chunks."""
    interleave: int = 1
    """Number of segments; 2 if a tensor holds a gate projection followed by an up projection."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            SpecError: If a number is out of range.
        """
        if not 0 <= self.index < self.count or self.interleave < 1 or self.dim < 0:
            raise SpecError(
                "a ShardSpec has a number out of range",
                phase="plan",
                expected="0 <= index < count, interleave >= 1, dim >= 0",
                found=repr(self),
            )


# The fields of torch's `CheckpointableTensor` (torch.distributed.checkpoint.protocol, since 2.14).
_SHARD_ATTRIBUTES = ("global_shape", "global_offsets", "local_offsets", "local_sizes")

SHARD_ATTRIBUTES_HINT = (
    "make it a DTensor; or pass tensor.detach(), which has no such attributes, declare it by "
    "LoadSpec(shards=...), and use HFSavePlanner or HFLoadPlanner"
)
"""What to do about a tensor that `has_shard_attributes`."""


def has_shard_attributes(tensor: object) -> bool:
    """Whether the attributes of a plain tensor say which part of a larger tensor it is.

    torch 2.14 and later call such a tensor a `CheckpointableTensor` and plan it as shards. Older
    versions treat it as the whole tensor. A copy of the tensor does not have the attributes. A
    DTensor makes its own plan, with or without them.
    """
    return not hasattr(tensor, "__create_write_items__") and all(
        hasattr(tensor, name) for name in _SHARD_ATTRIBUTES
    )


def check_no_shard_attributes(tensors: Mapping[str, Any]) -> None:
    """Refuse tensors for which `has_shard_attributes` holds.

    Args:
        tensors: Tensors by FQN.

    Raises:
        PlanningError: If there is such a tensor; the error names the first one.
    """
    for fqn, tensor in tensors.items():
        if has_shard_attributes(tensor):
            raise PlanningError(
                "a tensor has shard attributes, which are not supported",
                phase="plan",
                fqn=fqn,
                expected="a plain tensor without them, or a DTensor",
                found=f"a CheckpointableTensor of shape {list(tensor.shape)}, "
                f"global_shape {tensor.global_shape!r:.100}",
                hint=SHARD_ATTRIBUTES_HINT,
            )


@dataclass(frozen=True, slots=True)
class ShardBlock:
    """One block of the whole tensor, held in a local tensor."""

    global_box: Box
    """Place of the block in the whole tensor."""
    local_box: Box
    """Place of the block in the local tensor; it has the same sizes."""


def blocks_of(shape: Shape, shards: Iterable[ShardSpec]) -> tuple[ShardBlock, ...]:
    """Return the blocks of a whole tensor that the local tensor consists of.

    Args:
        shape: Shape of the whole tensor; `()` for a scalar.
        shards: The cuts, in order; several may cut one dimension.

    Returns:
        Blocks that tile the local tensor, in its row-major order, as few and as large as possible;
        empty if the local tensor has no element.

    Raises:
        PlanningError: If a cut is along a dimension that the tensor does not have.
    """
    return _blocks(tuple(shape), tuple(shards))


def local_shape(shape: Shape, shards: Iterable[ShardSpec]) -> Shape:
    """Return the shape of the local tensor that remains after the cuts.

    Raises:
        PlanningError: If a cut is along a dimension that the tensor does not have.
    """
    runs = _runs_by_dim(tuple(shape), tuple(shards))
    return tuple(sum(extent for _, extent in runs_of_dim) for runs_of_dim in runs)


def shards_of(
    placements: Sequence[Any], mesh_sizes: Sequence[int], coordinate: Sequence[int]
) -> tuple[ShardSpec, ...]:
    """Translate the placements of a DTensor into cuts.

    Args:
        placements: One per mesh dimension: `Shard`, `_StridedShard` or `Replicate`.
        mesh_sizes: Number of ranks along each mesh dimension.
        coordinate: This rank's index along each mesh dimension.

    Raises:
        PlanningError: If a placement is of another kind, such as `Partial`.

    Source:
        torch.distributed.tensor (2.11 to 2.13), `_compute_local_shape_and_global_offset` and
        `_StridedShard._split_tensor`: `split_factor` segments, each cut over the mesh dimension.
    """
    found = []
    for placement, size, index in zip(placements, mesh_sizes, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or not isinstance(dim, int):
            raise PlanningError(
                "a tensor has a placement that cannot be saved",
                phase="plan",
                expected="Shard, _StridedShard or Replicate on each mesh dimension",
                found=str(tuple(placements)),
                hint="redistribute the tensor before you put it into the state dict",
            )
        found.append(ShardSpec(dim, index, size, int(getattr(placement, "split_factor", 1))))
    return tuple(found)


@functools.lru_cache(maxsize=_KEPT)
def _blocks(shape: Shape, shards: tuple[ShardSpec, ...]) -> tuple[ShardBlock, ...]:
    per_dim = [_with_local_start(runs) for runs in _runs_by_dim(shape, shards)]
    return tuple(_block(parts) for parts in itertools.product(*per_dim))


def _block(parts: tuple[tuple[int, int, int], ...]) -> ShardBlock:
    sizes = tuple(extent for _, extent, _ in parts)
    start = tuple(first for first, _, _ in parts)
    local_start = tuple(first for _, _, first in parts)
    return ShardBlock(Box(start, sizes), Box(local_start, sizes))


def _with_local_start(runs: Iterable[_Run]) -> list[tuple[int, int, int]]:
    found, reached = [], 0
    for start, extent in runs:
        found.append((start, extent, reached))
        reached += extent
    return found


def _runs_by_dim(shape: Shape, shards: tuple[ShardSpec, ...]) -> list[list[_Run]]:
    runs: list[list[_Run]] = [[(0, extent)] if extent else [] for extent in shape]
    for shard in shards:
        if not 0 <= shard.dim < len(shape):
            raise PlanningError(
                "a tensor is cut along a dimension that it does not have",
                phase="plan",
                expected=f"0 <= dim < {len(shape)}",
                found=shard,
            )
        runs[shard.dim] = _cut(runs[shard.dim], shard)
    return runs


def _cut(runs: list[_Run], shard: ShardSpec) -> list[_Run]:
    """Return the indices of a local dimension that one cut leaves, in local order."""
    kept: list[_Run] = []
    for start, stop in _local_intervals(sum(extent for _, extent in runs), shard):
        for first, extent in _slice(runs, start, stop):
            if kept and sum(kept[-1]) == first:
                kept[-1] = (kept[-1][0], kept[-1][1] + extent)
            else:
                kept.append((first, extent))
    return kept


def _local_intervals(extent: int, shard: ShardSpec) -> Iterator[tuple[int, int]]:
    for segment in range(shard.interleave):
        start, stop = _chunk(extent, shard.interleave, segment)
        first, last = _chunk(stop - start, shard.count, shard.index)
        if first < last:
            yield start + first, start + last


def _chunk(extent: int, count: int, index: int) -> tuple[int, int]:
    """Return start and stop of a chunk, as `torch.chunk` cuts; the last chunks may be empty."""
    size = -(-extent // count)
    return min(index * size, extent), min((index + 1) * size, extent)


def _slice(runs: Iterable[_Run], start: int, stop: int) -> Iterator[_Run]:
    reached = 0
    for first, extent in runs:
        low, high = max(start - reached, 0), min(stop - reached, extent)
        if low < high:
            yield first + low, high - low
        reached += extent
