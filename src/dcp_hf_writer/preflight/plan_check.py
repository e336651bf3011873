"""Refuse a rank's plan that leaves out blocks which the rank holds: DCP would, without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.planner import SavePlan

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.save.tensor_bytes import chunk_of
from dcp_hf_writer.tensors.boxes import intersect
from dcp_hf_writer.torch_seam.multi_block_tensors import blocked_tensors
from dcp_hf_writer.torch_seam.unsupported import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.tensors.boxes import Box
    from dcp_hf_writer.torch_seam.frames import Planned
    from dcp_hf_writer.torch_seam.multi_block_tensors import BlockedTensor

_SHOWN = 4


def check_plan(plan: SavePlan, planned: Planned, export: HFExport | None) -> None:
    """Check that tensors of several blocks, and declared shards, are planned as what they are.

    Args:
        plan: What the planner made on this rank; not usable if it is that of the save before.
        planned: Planner of the save, and what it plans.
        export: Options of the export, whose specs declare shards.

    Raises:
        PlanningError: If a tensor is planned otherwise, naming the planner to pass.
        UnsupportedTorchError: If the planner reuses a plan and does not show it.
    """
    specs, key = ({}, None) if export is None else (export.spec_by_fqn, export.key)
    expected = blocked_tensors(planned.state_dict, planned.paths, specs, key=key)
    made = plan if plan.usable or not expected else _reused_plan(planned)
    found: dict[str, list[WriteItem]] = {fqn: [] for fqn in expected}
    for item in made.items:
        if item.index.fqn in found:
            found[item.index.fqn].append(item)
    for fqn, tensor in expected.items():
        if not _plans(found[fqn], tensor):
            raise PlanningError(
                "a rank holds blocks of a tensor that the planner does not plan as such",
                phase="plan",
                fqn=fqn,
                expected=_text(block.global_box for block in tensor.blocks)
                + f" of {list(tensor.shape)}",
                found=_text(map(chunk_of, found[fqn])) + f", by {type(planned.planner).__name__}",
                hint="pass planner=HFSavePlanner(specs) to the save, with the specs of the export, "
                "or none for DTensors",
            )


def _reused_plan(planned: Planned) -> SavePlan:
    made = getattr(planned.planner, "plan", None)
    if not isinstance(made, SavePlan) or not made.usable:
        raise unsupported_torch(
            "the plan that a rank made and did not send, as it is that of the save before",
            phase="plan",
            expected="the attribute plan of DefaultSavePlanner",
            hint="pass a planner with enable_plan_caching=False",
        )
    return made


def _plans(items: Sequence[WriteItem], tensor: BlockedTensor) -> bool:
    """Whether items are the blocks of a tensor, or parts of them; they do not overlap."""
    boxes = [box for box in map(chunk_of, items) if box.numel]
    blocks = [block.global_box for block in tensor.blocks]
    return (
        all(tuple(i.tensor_data.size) == tensor.shape for i in items if i.tensor_data is not None)
        and sum(box.numel for box in boxes) == sum(block.numel for block in blocks)
        and all(any(_is_within(box, block) for block in blocks) for box in boxes)
    )


def _is_within(box: Box, block: Box) -> bool:
    return len(box.sizes) == len(block.sizes) and intersect(box, block) == box


def _text(boxes: Iterable[Box]) -> str:
    shown = (f"{list(box.sizes)} at {list(box.offsets)}" for box in boxes)
    return some_of(shown, most=_SHOWN) or "nothing"
