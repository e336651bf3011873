"""How much a save will write, as far as this rank can tell without asking the others. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.mapping.flattening import walk_tensors
from dcp_hf_writer.mapping.model_entry import NOT_WEIGHTS
from dcp_hf_writer.torch_seam.dtensor import local_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

_MODEL = "model"


def planned_nbytes(
    state_dict: Mapping[str, Any], *, export_dtype: torch.dtype | None, has_second_copy: bool
) -> int:
    """Return the bytes that a save of a state dict writes, all ranks together; a lower bound.

    A DTensor counts with its global shape. A plain tensor counts once, although experts that are
    sharded by hand are more. A save reserves its space anyway; this is an early look.

    Args:
        state_dict: The state dict of this rank.
        export_dtype: Dtype that the export casts floats to; `None` keeps each dtype.
        has_second_copy: Whether the weights are written to the export and to the DCP half.
    """
    tensors = walk_tensors(state_dict, into_tuples=True)
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    if not has_second_copy:
        return total
    return total + _weights_nbytes(tensors, export_dtype)


def planned_export_files(
    state_dict: Mapping[str, Any], *, export_dtype: torch.dtype | None, max_shard_nbytes: int
) -> int:
    """Return the number of weight files of an export; a lower bound, but at least 1.

    Args:
        state_dict: As in `planned_nbytes`.
        export_dtype: As in `planned_nbytes`.
        max_shard_nbytes: Size of the largest file, in bytes.
    """
    tensors = walk_tensors(state_dict, into_tuples=True)
    return max(-(-_weights_nbytes(tensors, export_dtype) // max_shard_nbytes), 1)


def _weights_nbytes(
    tensors: Sequence[tuple[tuple[Any, ...], torch.Tensor]], export_dtype: torch.dtype | None
) -> int:
    has_entry = any(path[0] == _MODEL for path, _ in tensors)
    # Tied weights are stored once in an export: equal addresses count once.
    weights = {
        (local_of(tensor).data_ptr(), tuple(tensor.shape)): _export_nbytes(tensor, export_dtype)
        for path, tensor in tensors
        if (path[0] == _MODEL if has_entry else path[0] not in NOT_WEIGHTS)
    }
    return sum(weights.values())


def _export_nbytes(tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    itemsize = tensor.element_size()
    if dtype is not None and tensor.is_floating_point():
        itemsize = min(itemsize, dtype.itemsize)
    return tensor.numel() * itemsize
