"""Refuse a rank's plan that leaves out blocks which the rank holds; DCP silently loses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.save.tensor_bytes import chunk_of
from dcp_hf_writer.tensors.boxes import intersect
from dcp_hf_writer.torch_seam.dtensor import is_strided, local_of
from dcp_hf_writer.torch_seam.multi_block_tensors import blocked_tensors
from dcp_hf_writer.torch_seam.planners import HFSavePlanner
from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.tensors.boxes import Box
    from dcp_hf_writer.torch_seam.caller_frames import Planned
    from dcp_hf_writer.torch_seam.multi_block_tensors import BlockedTensor

_SHOWN = 4


def check_plan(plan: SavePlan, planned: Planned, export: HFExport | None) -> None:
    """Check that the plan covers all blocks of tensors with several blocks or declared shards.

    Every check of a save looks up tensors by FQN in `planned`, so the plan must use these FQNs.

    Args:
        plan: The planner's plan on this rank; marked not usable if the planner reuses the plan of
            the previous save.
        planned: Planner of the save, and what it plans.
        export: Options of the export, whose specs declare shards.

    Raises:
        PlanningError: If the items of a tensor are not its blocks, and the error names the planner
            to pass; if the plan has a tensor that `planned` lacks; or if a local tensor does not
            have the sizes that its placements imply.
        UnsupportedTorchError: If the planner reuses a plan and does not show it.
    """
    _check_seen(plan, planned)
    _check_local_sizes(plan, planned)
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
                "the planner does not plan the blocks of a tensor that a rank holds",
                phase="plan",
                fqn=fqn,
                expected=_text(block.global_box for block in tensor.blocks)
                + f" of {list(tensor.shape)}",
                found=_text(map(chunk_of, found[fqn])) + f", by {type(planned.planner).__name__}",
                hint="pass planner=HFSavePlanner(specs) to the save, with the specs of the export; "
                "for DTensors alone, HFSavePlanner() is enough",
            )


def _check_seen(plan: SavePlan, planned: Planned) -> None:
    for item in plan.items:
        if item.tensor_data is not None and item.index.fqn not in planned.state_dict:
            raise PlanningError(
                "the plan has a tensor that the planner does not show, so it cannot be checked",
                phase="plan",
                fqn=item.index.fqn,
                expected="an FQN of the planner's state_dict, or of the state dict of the save",
                found=f"an FQN that only {type(planned.planner).__name__} knows",
                hint="give the planner an attribute state_dict: a dict of its values by FQN",
            )


def _check_local_sizes(plan: SavePlan, planned: Planned) -> None:
    # DCP plans the sizes that the placements imply, and never looks at the local tensor.
    blocked = planned.planner.declared if isinstance(planned.planner, HFSavePlanner) else ()
    for item in plan.items:
        value = planned.state_dict.get(item.index.fqn)
        if not isinstance(value, DTensor) or item.index.fqn in blocked or is_strided(value):
            continue
        implied, found = chunk_of(item).sizes, tuple(local_of(value).shape)
        if implied != found:
            placements = ", ".join(map(repr, value.placements))
            raise PlanningError(
                "a local tensor does not have the sizes that its placements imply",
                phase="plan",
                fqn=item.index.fqn,
                expected=f"a local tensor of shape {list(implied)}, which {placements} of "
                f"{list(value.shape)} gives this rank",
                found=f"shape {list(found)}",
                hint="DCP supports only the sizes of torch.chunk: use distribute_tensor, or save "
                "the local tensor as a plain tensor whose LoadSpec declares its shards",
            )


def _reused_plan(planned: Planned) -> SavePlan:
    made = getattr(planned.planner, "plan", None)
    if not isinstance(made, SavePlan) or not made.usable:
        raise unsupported_torch(
            "the plan that a rank reuses from the previous save and did not send",
            phase="plan",
            expected="the attribute plan of DefaultSavePlanner",
            hint="pass a planner with enable_plan_caching=False",
        )
    return made


def _plans(items: Sequence[WriteItem], tensor: BlockedTensor) -> bool:
    """Whether items cover exactly the blocks of a tensor; items are assumed not to overlap."""
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
