"""Describe shards to DCP that DCP would plan wrongly: several blocks, and shards in plain tensors.

DCP plans one chunk for each tensor. For a DTensor, the chunk has the offset of the first block and
the whole local size. For a plain tensor, the chunk is the whole tensor, and DCP treats the tensors
of other ranks with this FQN as replicas. While DCP plans, a `BlockedTensor` replaces such a tensor.
It implements the methods that DCP calls on a DTensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import ModelKeyError, PlanningError
from dcp_hf_writer.mapping.spec_match import match_copies, match_specs
from dcp_hf_writer.tensors.boxes import Box, Shape
from dcp_hf_writer.tensors.shards import (
    ShardBlock,
    blocks_of,
    check_no_shard_attributes,
    local_shape,
    shards_of,
)
from dcp_hf_writer.torch_seam.dtensor import is_strided, local_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.mapping.model_entry import Path
    from dcp_hf_writer.mapping.spec_match import Match
    from dcp_hf_writer.tensors.shards import ShardSpec


@dataclass(frozen=True, eq=False, slots=True)
class BlockedTensor:
    """A local tensor, and the blocks of the whole tensor that it holds."""

    local: torch.Tensor
    """The tensor that this rank holds; it shares its memory with the state dict."""
    shape: Shape
    """Shape of the whole tensor."""
    blocks: tuple[ShardBlock, ...]
    """Its blocks. A whole tensor without elements has one block, which is empty."""

    def part(self, offset: Shape | None) -> torch.Tensor:
        """Return the block at an offset in the whole tensor, as a view of the local tensor.

        Raises:
            PlanningError: If this rank has no such block.
        """
        for block in self.blocks:
            if block.global_box.offsets == offset:
                return _view(self.local, block.local_box)
        raise PlanningError(
            "DCP requests a block that this rank does not hold",
            expected=[block.global_box.offsets for block in self.blocks],
            found=offset,
        )

    def size(self) -> torch.Size:
        """Return the shape of the whole tensor; DCP compares it with the stored shape."""
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """Return one item for each block, for a `SavePlan`."""
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return one chunk for each block, for a `LoadPlan`."""
        boxes = [block.global_box for block in self.blocks]
        return [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes
        ]


def _view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, offset, size)
    return tensor


def blocked_tensors(
    state_dict: Mapping[str, Any],
    mappings: Mapping[str, Path],
    specs: Mapping[str, LoadSpec],
    *,
    key: str | None,
) -> dict[str, BlockedTensor]:
    """Find the tensors of a rank that DCP would plan wrongly, by FQN.

    These are DTensors that hold several blocks, tensors that a spec declares to be shards, and the
    optimizer state and copies of such tensors (`spec_match` finds them).

    Args:
        state_dict: The flat state dict.
        mappings: Path of each value within the nested state dict, by FQN; without an entry, the
            path is the FQN.
        specs: Specs by name.
        key: Entry that holds the model, as in `HFExport.key`.

    Raises:
        PlanningError: If a tensor does not fit its spec or its placements, or if it has shard
            attributes.
    """
    tensors = {fqn: value for fqn, value in state_dict.items() if isinstance(value, torch.Tensor)}
    check_no_shard_attributes(tensors)
    matches: dict[str, Match] = {}
    if any(spec.shards for spec in specs.values()):
        paths = {fqn: tuple(mappings.get(fqn, (fqn,))) for fqn in tensors}
        try:
            matches = match_specs(paths, specs, key=key)
        except ModelKeyError:
            # Planning the export refuses this. The DCP half must hold every block all the same.
            matches = match_copies(paths, specs)
    placed = {
        match.spec.name
        for fqn, match in matches.items()
        if not match.is_kept_beside and _is_placed(tensors[fqn], match.spec)
    }
    found = {}
    for fqn, value in tensors.items():
        match = matches.get(fqn)
        blocked = (
            _of_declared(fqn, value, match, is_by_hand=match.spec.name not in placed)
            if match is not None and match.spec.shards
            else _of_placements(fqn, value)
        )
        if blocked is not None:
            found[fqn] = blocked
    return found


def _is_placed(value: torch.Tensor, spec: LoadSpec) -> bool:
    """Whether a tensor is a DTensor whose placements describe the whole cut."""
    return isinstance(value, DTensor) and tuple(value.shape) == spec.global_shape


def _of_placements(fqn: str, value: torch.Tensor) -> BlockedTensor | None:
    # Without `_StridedShard`, a rank holds one block, and DCP plans one block correctly.
    if not isinstance(value, DTensor) or not is_strided(value):
        return None
    shards = _placed(fqn, value)
    if shards is None:
        return None
    blocked = _blocked(fqn, value, tuple(value.shape), shards)
    return blocked if len(blocked.blocks) > 1 else None


def _of_declared(
    fqn: str, value: torch.Tensor, match: Match, *, is_by_hand: bool
) -> BlockedTensor | None:
    spec, shards = match.spec, match.spec.shards
    own = local_shape(spec.global_shape, shards)
    if _is_placed(value, spec):
        return _of_placements(fqn, value)
    if isinstance(value, DTensor):
        placed = _placed(fqn, value)
        if placed is None:
            return None
        shards = (*shards, *placed)
    shape = tuple(value.shape)
    if shape == own:
        return _blocked(fqn, value, spec.global_shape, shards)
    # A whole tensor, one number of the optimizer, or state of a DTensor, which needs no spec.
    if shape == spec.global_shape or (
        match.is_kept_beside and (value.numel() <= 1 or not is_by_hand)
    ):
        return None
    hint = "make the ShardSpecs of its LoadSpec describe what this rank holds"
    if match.is_kept_beside:
        hint = f"add a LoadSpec for {fqn!r} with its own shards, or with none if it is whole"
    raise PlanningError(
        "a tensor is not the shard that its spec declares",
        phase="plan",
        fqn=fqn,
        expected=f"shape {list(own)}: a shard of {spec.name!r}, whose shape is "
        f"{list(spec.global_shape)}",
        found=f"shape {list(value.shape)}",
        hint=hint,
    )


def _placed(fqn: str, value: DTensor) -> tuple[ShardSpec, ...] | None:
    """Return the cuts of a DTensor; `None` if this rank is not in its mesh."""
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    try:
        return shards_of(value.placements, value.device_mesh.shape, coordinate)
    except PlanningError as error:
        error.fqn = fqn
        raise


def _blocked(
    fqn: str, value: torch.Tensor, shape: Shape, shards: tuple[ShardSpec, ...]
) -> BlockedTensor:
    local = local_of(value)
    described = local_shape(shape, shards)
    if tuple(local.shape) != described:
        raise PlanningError(
            "a local tensor does not have the shape that its placements give it",
            phase="plan",
            fqn=fqn,
            expected=f"a local tensor of shape {list(described)}",
            found=f"shape {list(local.shape)}",
            hint="if FSDP and TP both cut a dimension, its size must divide evenly",
        )
    blocks = blocks_of(shape, shards)
    if not math.prod(shape):
        # Every rank plans the same empty block, so that the metadata lists the tensor. DCP keeps
        # one of them, as for replicas.
        blocks = (ShardBlock(Box((0,) * len(shape), shape), Box((0,) * len(shape), shape)),)
        local = local.new_empty(shape)
    return BlockedTensor(local, shape, blocks)
