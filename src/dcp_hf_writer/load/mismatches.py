"""Find every tensor to load that the checkpoint lacks or holds in another shape.

torch's planners stop at the first tensor that does not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.tensors.boxes import Box, intersect
from dcp_hf_writer.torch_seam.multi_block_tensors import blocked_tensors
from dcp_hf_writer.torch_seam.names_before_torch_2_4 import names_before_2_4

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.torch_seam.multi_block_tensors import BlockedTensor


def loaded_values(planner: LoadPlanner, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat state dict that a planner loads into.

    If the planner does not show it, return the tensors of `given`, by FQN.
    """
    flat = getattr(planner, "state_dict", None)
    if not isinstance(flat, dict):
        return {fqn: tensor for fqn, (_, tensor) in flat_tensors(given).items()}
    blocked = getattr(planner, "_blocked", {})
    return {**flat, **blocked}


def misfits(
    planner: LoadPlanner, given: Mapping[str, Any], metadata: Metadata
) -> tuple[list[str], dict[str, str]]:
    """Compare the state dict of a planner with the metadata of a checkpoint.

    Args:
        planner: The planner.
        given: The nested state dict that it was set up with.
        metadata: Metadata of the checkpoint; the planner's own copy counts, if it has one.

    Returns:
        The missing FQNs, and the reason why a tensor does not fit, by FQN. No FQN counts as missing
        if the planner allows missing tensors. A planner that does not show its state dict may
        rename tensors, so only that planner can find the missing ones.
    """
    seen = getattr(planner, "metadata", None)
    known = seen if isinstance(seen, Metadata) else metadata
    wanted, there = loaded_values(planner, given), known.state_dict_metadata
    missing = [fqn for fqn in wanted if fqn not in there]
    is_shown = isinstance(getattr(planner, "state_dict", None), dict)
    if missing and (
        not is_shown
        or getattr(planner, "allow_partial_load", False)
        or _has_old_names(planner, wanted, there)
    ):
        missing = []
    faults: dict[str, str] = {}
    for fqn, value in wanted.items():
        entry = there.get(fqn)
        if not isinstance(entry, TensorStorageMetadata):
            continue
        size = getattr(value, "size", None)
        if size is None:
            stored = f"a tensor of shape {list(entry.size)}"
            faults[fqn] = f"a {type(value).__name__}, stored as {stored}"
        elif tuple(size()) != tuple(entry.size):
            faults[fqn] = f"shape {list(size())}, stored as {list(entry.size)}"
    return missing, faults


def _has_old_names(planner: LoadPlanner, wanted: Mapping[str, Any], there: Iterable[str]) -> bool:
    """Whether a checkpoint has the FQNs of torch before 2.4, which torch's planner accepts too."""
    nested = getattr(planner, "original_state_dict", None)
    if not isinstance(nested, dict):
        return False
    return bool(names_before_2_4(nested).intersection(set(there) - wanted.keys()))


def check_blocks(
    plan: LoadPlan,
    planner: LoadPlanner,
    given: Mapping[str, Any],
    specs: Mapping[str, LoadSpec],
    *,
    key: str | None,
) -> None:
    """Check that a plan treats the blocks of a tensor one by one.

    A rank may hold several blocks of a tensor. torch's planner plans them as one block.

    Args:
        plan: The plan that the planner made on this rank.
        planner: The planner.
        given: The nested state dict that it was set up with.
        specs: Specs by name; they declare which tensors are shards.
        key: Entry that holds the model, as in `HFDualReader`.

    Raises:
        PlanningError: If the plan joins blocks; it names the tensor and the planner to use.
    """
    flat, mappings = getattr(planner, "state_dict", None), getattr(planner, "mappings", {})
    if not isinstance(flat, dict):
        tensors = flat_tensors(given)
        flat = {fqn: tensor for fqn, (_, tensor) in tensors.items()}
        mappings = {fqn: path for fqn, (path, _) in tensors.items()}
    items: dict[str, list[ReadItem]] = {}
    for item in plan.items:
        items.setdefault(item.dest_index.fqn, []).append(item)
    for fqn, tensor in blocked_tensors(flat, mappings, specs, key=key).items():
        if not all(_is_of(item, tensor) for item in items.get(fqn, ())):
            raise PlanningError(
                "a rank holds several blocks of a tensor, but its planner plans them as one",
                phase="plan",
                fqn=fqn,
                expected=f"{len(tensor.blocks)} blocks of {list(tensor.shape)}",
                found=f"one block, planned by {type(planner).__name__}",
                hint="pass planner=HFLoadPlanner(specs) to dcp.load, or use load_hf",
            )


def _is_of(item: ReadItem, tensor: BlockedTensor) -> bool:
    offset = item.dest_index.offset
    box = Box(tuple(item.dest_offsets), tuple(item.lengths))
    for block in tensor.blocks:
        if offset == block.global_box.offsets:
            return intersect(box, Box((0,) * len(box.sizes), block.global_box.sizes)) == box
    return False
