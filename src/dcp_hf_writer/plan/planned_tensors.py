"""What all ranks together write of each tensor, collected from DCP's plans.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import PlanningError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData

    from dcp_hf_writer.mapping.model_entry import Path
    from dcp_hf_writer.tensors.boxes import Shape


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """What all ranks together write of one tensor. A job has millions of items, hence columns."""

    data: TensorWriteData
    """Shape and dtype, from the first item."""
    path: Path
    """Keys that lead to it in the state dict."""
    ranks: list[int]
    """Rank that writes each chunk."""
    offsets: list[Shape]
    """First indices of each chunk."""
    sizes: list[Shape]
    """Extents of each chunk."""


def planned_tensors(plans: Iterable[SavePlan]) -> dict[str, PlannedTensor]:
    """Collect for each tensor what all ranks write.

    Raises:
        PlanningError: If ranks plan different dtypes or shapes for one tensor.
    """
    # Only this loop visits every item of every rank, so its time grows with the job. It reads each
    # attribute once: most of the time is spent on fetching the objects from memory.
    found: dict[str, PlannedTensor] = {}
    for rank, plan in enumerate(plans):
        paths = plan.planner_data if isinstance(plan.planner_data, dict) else {}
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                continue
            fqn = item.index.fqn
            tensor = found.get(fqn)
            if tensor is None:
                path = tuple(paths.get(fqn, (fqn,)))
                tensor = found[fqn] = PlannedTensor(data, path, [], [], [])
            elif data.size != tensor.data.size or (
                data.properties.dtype is not tensor.data.properties.dtype
            ):
                raise _unlike(fqn, tensor, data, rank)
            chunk = data.chunk
            tensor.ranks.append(rank)
            tensor.offsets.append(chunk.offsets)
            tensor.sizes.append(chunk.sizes)
    return found


def _unlike(fqn: str, tensor: PlannedTensor, data: TensorWriteData, rank: int) -> PlanningError:
    first = tensor.data
    return PlanningError(
        "ranks hold shards of different dtype or shape under one name",
        phase="plan",
        fqn=fqn,
        expected=f"{first.properties.dtype} of shape {list(first.size)}, as on rank "
        f"{tensor.ranks[0]}",
        found=f"{data.properties.dtype} of shape {list(data.size)} on rank {rank}",
        hint="give the tensor one dtype and shape on all ranks, or a name of its own on each",
    )
