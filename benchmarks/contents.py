"""What a checkpoint directory holds: its bytes by kind, and whether they are the ones saved."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from states import local_tensors

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader
    from torch.distributed.tensor import DTensor


class WrongContentError(RuntimeError):
    """A checkpoint was written quickly, but does not hold what was saved."""


@dataclass(frozen=True, slots=True)
class Written:
    """Sizes of a directory's files, in bytes."""

    total: int
    """All files."""
    distcp: int
    """DCP's data files."""
    tensors: int
    """Data of the model's safetensors files without their headers, unfinished shards included."""


def count_bytes(directory: str) -> Written:
    """Sum the sizes of all files below `directory`."""
    total = distcp = tensors = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)
            size = os.stat(path).st_size
            total += size
            distcp += size if name.endswith(".distcp") else 0
            # Our own digests have the same format, and a directory to themselves.
            is_model = name.endswith(".safetensors") and os.path.basename(parent) != "dcp-hf"
            tensors += size - _header_nbytes(path) if is_model else 0
    return Written(total, distcp, tensors)


def read_phases(directory: str) -> dict[str, float]:
    """Seconds of each phase by the manifest of a checkpoint, of the rank that took longest.

    Waiting for another rank counts as part of the phase that waits. Empty for a checkpoint without
    a manifest.
    """
    path = os.path.join(directory, "dcp-hf.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        timings = json.load(file)["timings"]
    phases: dict[str, float] = {}
    for of_rank in (*timings["ranks"], timings["coordinator"]):
        for name, seconds in of_rank.items():
            if isinstance(seconds, float) and name != "total":
                phases[name] = max(seconds, phases.get(name, 0.0))
    return phases


def check_content(
    state_dict: dict[str, Any], directory: str, hf: str, *, reader: StorageReader | None = None
) -> None:
    """Read both formats back by stock torch and stock safetensors; all ranks together.

    Args:
        state_dict: What was saved, unchanged since.
        directory: The DCP checkpoint.
        hf: The directory of the weights in HuggingFace's format.
        reader: Reads the DCP half; `None` is torch's own.

    Raises:
        WrongContentError: If a byte differs on this rank.
    """
    found = _empty_like(state_dict)
    dcp.load(found, checkpoint_id=directory, storage_reader=reader)
    pairs = zip(local_tensors(state_dict), local_tensors(found), strict=True)
    if not all(_same_bytes(a, b) for a, b in pairs):
        msg = f"{directory}: dcp.load gives other tensors than were saved, rank {dist.get_rank()}"
        raise WrongContentError(msg)
    with open(os.path.join(hf, "model.safetensors.index.json"), encoding="utf-8") as file:
        file_of_key = json.load(file)["weight_map"]
    for key, tensor in state_dict["model"].items():
        with safe_open(os.path.join(hf, file_of_key[key]), framework="pt") as file:
            part = file.get_slice(key)[_region(tensor)]
        if not _same_bytes(part, tensor.to_local().cpu()):
            msg = f"{hf}: {key} differs from what was saved, rank {dist.get_rank()}"
            raise WrongContentError(msg)


def _header_nbytes(path: str) -> int:
    with open(path, "rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


def _empty_like(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return torch.zeros_like(tree)
    if isinstance(tree, dict):
        return {key: _empty_like(value) for key, value in tree.items()}
    return [_empty_like(value) for value in tree] if isinstance(tree, list) else tree


def _region(tensor: DTensor) -> tuple[slice, ...]:
    size, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + n) for start, n in zip(offset, size, strict=True))


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As bytes, since NaN differs from itself and 0.0 equals -0.0.
    one, other = one.contiguous(), other.contiguous()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
