"""The tensors that a load fills, and the parts of them that this rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.preflight.check_placements import refuse_partial
from dcp_hf_writer.tensors.boxes import whole
from dcp_hf_writer.tensors.shards import blocks_of, shards_of
from dcp_hf_writer.torch_seam.multi_block_tensors import blocked_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.tensors.boxes import Box, Shape


@dataclass(frozen=True, eq=False, slots=True)
class HeldTensor:
    """The parts of one tensor of the model that this rank holds."""

    tensor: torch.Tensor
    """The tensor in the state dict."""
    shape: Shape
    """Shape of the whole tensor."""
    parts: tuple[tuple[Box, torch.Tensor], ...]
    """Blocks of the whole tensor, and the memory of each."""


def held_tensors(
    tensors: Mapping[str, torch.Tensor], specs: Mapping[str, LoadSpec]
) -> dict[str, HeldTensor]:
    """Find the blocks of each tensor that this rank holds.

    Args:
        tensors: DTensors, plain tensors that a spec declares to be shards, or whole tensors.
        specs: Specs by name.

    Raises:
        PlanningError: If a tensor contradicts its spec or its placements.
    """
    refuse_partial(tensors, phase="read")
    blocked = blocked_tensors(dict(tensors), {}, specs, key=None)
    found = {}
    for name, tensor in tensors.items():
        special = blocked.get(name)
        if special is not None:
            boxes = [block.global_box for block in special.blocks]
            parts = tuple((box, special.part(box.offsets)) for box in boxes)
            found[name] = HeldTensor(tensor, special.shape, parts)
        elif isinstance(tensor, DTensor):
            found[name] = HeldTensor(tensor, tuple(tensor.shape), tuple(_placed(name, tensor)))
        else:
            shape = tuple(tensor.shape)
            found[name] = HeldTensor(tensor, shape, ((whole(shape), tensor.detach()),))
    return found


def _placed(name: str, tensor: DTensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """Yield the block of a DTensor that this rank holds, if it holds any."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return
    local = tensor.to_local().detach()
    shards = shards_of(tensor.placements, tensor.device_mesh.shape, coordinate)
    blocks = blocks_of(tuple(tensor.shape), shards)
    if local.numel() != sum(block.global_box.numel for block in blocks) or len(blocks) > 1:
        raise PlanningError(
            "a rank's part of a tensor does not match its placements",
            phase="plan",
            fqn=name,
            expected=f"blocks of shapes {[list(block.global_box.sizes) for block in blocks]}",
            found=f"one local tensor of shape {list(local.shape)}",
        )
    for block in blocks:
        yield block.global_box, local
