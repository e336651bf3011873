"""Find the weights that only the export stores, and the places of their bytes.

Pure.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dcp_hf_writer.formats.weights_once_places import StoredOnce, StoredPart
from dcp_hf_writer.plan.regions import chunk_regions, needs_cast
from dcp_hf_writer.tensors.boxes import Box, Shape, tiling_fault
from dcp_hf_writer.tensors.strided_copies import Copy, coverage_fault, runtime_box, runtime_loops

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
    from dcp_hf_writer.plan.layout import PartTarget


def targets_stored_once(
    tensors: Iterable[RuntimeTensor],
    targets: Mapping[str, Sequence[PartTarget]],
    shared: Iterable[Sequence[str]],
) -> dict[str, tuple[PartTarget, ...]]:
    """Find the runtime tensors that the export stores completely and bit for bit.

    Args:
        tensors: Tensors of the model's entry.
        targets: Targets of each exported tensor, by FQN.
        shared: Groups of FQNs that share their memory.

    Returns:
        The targets of each such tensor, by FQN. A tensor that is not exported itself has the
        targets of an exported tensor that shares its memory.
    """
    kept_of: dict[str, str] = {}
    for group in shared:
        exported = [fqn for fqn in group if fqn in targets]
        kept_of |= {fqn: exported[0] for fqn in group if exported and fqn not in targets}
    by_fqn = {tensor.fqn: tensor for tensor in tensors}
    found: dict[str, tuple[PartTarget, ...]] = {}
    for fqn, tensor in by_fqn.items():
        kept = by_fqn[kept_of.get(fqn, fqn)]
        parts = tuple(targets.get(kept.fqn, ()))
        is_same = (tensor.shape, tensor.dtype) == (kept.shape, kept.dtype)
        if is_same and not any(needs_cast(tensor.dtype, part) for part in parts):
            copies = [copy for part in parts for copy in part.copies]
            if copies and is_whole(copies, tensor.shape):
                found[fqn] = parts
    return found


def is_whole(copies: Sequence[Copy], shape: Shape) -> bool:
    """Whether copies read each element of a runtime tensor exactly once."""
    if sum(copy.numel for copy in copies) != math.prod(shape):
        return False
    boxes = [runtime_box(copy) for copy in copies]
    solid = [box for box in boxes if box is not None]
    if len(solid) == len(boxes):
        return tiling_fault(solid, shape) is None
    return coverage_fault([(copy.start, runtime_loops(copy)) for copy in copies], shape) is None


def stored_once(chunk: Box, targets: Iterable[PartTarget], *, paths: Sequence[str]) -> StoredOnce:
    """Return the places of the export that store the bytes of a chunk.

    Args:
        chunk: The chunk, in indices of the runtime tensor.
        targets: Targets of that tensor.
        paths: Path of each output file within the checkpoint, in the order of `Layout.files`.
    """
    copies: dict[str, list[Copy]] = {}
    by_key: dict[str, PartTarget] = {}
    for region in chunk_regions(chunk, targets):
        by_key[region.target.key] = region.target
        copies.setdefault(region.target.key, []).append(region.copy)
    return StoredOnce(
        tuple(
            StoredPart(
                paths[target.file],
                key,
                target.start,
                target.dtype,
                target.shape,
                tuple(copies[key]),
            )
            for key, target in by_key.items()
        )
    )
