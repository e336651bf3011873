"""Whether what a planner loads is in a checkpoint, and of the same shape: one answer for all of it.

torch's planners stop at the first tensor that does not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.tensors.boxes import Box, intersect
from dcp_hf_writer.torch_seam.blocked_tensors import blocked_tensors
from dcp_hf_writer.torch_seam.old_names import names_before_2_4

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.torch_seam.blocked_tensors import BlockedTensor


def loaded_values(planner: LoadPlanner, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a planner loads, flat; of one that does not show it, the tensors it was given."""
    flat = getattr(planner, "state_dict", None)
    if not isinstance(flat, dict):
        return {fqn: tensor for fqn, (_, tensor) in flat_tensors(given).items()}
    blocked = getattr(planner, "_blocked", {})
    return {**flat, **blocked}


def misfits(
    planner: LoadPlanner, given: Mapping[str, Any], metadata: Metadata
) -> tuple[list[str], dict[str, str]]:
    """Compare what a planner loads with what is there.

    Args:
        planner: The planner.
        given: The nested state dict that it was set up with.
        metadata: Of what is there.

    Returns:
        FQNs that are missing, unless the planner does without them; and why others do not fit, by
        FQN. Names that only a planner of the user knows are left to it.
    """
    wanted, there = loaded_values(planner, given), metadata.state_dict_metadata
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
            faults[fqn] = f"a {type(value).__name__}, stored as a tensor of {list(entry.size)}"
        elif tuple(size()) != tuple(entry.size):
            faults[fqn] = f"shape {list(size())}, stored as {list(entry.size)}"
    return missing, faults


def _has_old_names(planner: LoadPlanner, wanted: Mapping[str, Any], there: Iterable[str]) -> bool:
    """Whether a checkpoint is of torch before 2.4, which torch's planner then finds out too."""
    nested = getattr(planner, "original_state_dict", None)
    if not isinstance(nested, dict):
        return False
    return bool(names_before_2_4(nested).intersection(set(there) - wanted.keys()))


def plans_alone(planner: LoadPlanner | None) -> bool:
    """Whether what a rank reads is up to its own plan, as torch's planner has it."""
    return has_methods_of(DefaultLoadPlanner, planner, "create_global_plan", "finish_plan")


def has_methods_of(kind: type, one: object, *names: str) -> bool:
    """Whether neither a subclass nor the object itself has others of these methods."""
    return all(
        getattr(getattr(one, name, None), "__func__", None) is getattr(kind, name) for name in names
    )


def check_blocks(
    plan: LoadPlan,
    planner: LoadPlanner,
    given: Mapping[str, Any],
    specs: Mapping[str, LoadSpec],
    *,
    key: str | None,
) -> None:
    """Check that tensors of several blocks are planned as such: torch's planner takes them for one.

    Args:
        plan: What the planner made on this rank.
        planner: The planner.
        given: The nested state dict that it was set up with.
        specs: Specs by name, which declare shards.
        key: Entry that holds the model, as `HFDualReader` takes it.

    Raises:
        PlanningError: Naming the tensor, and the planner to use.
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
                "a rank holds several blocks of a tensor, which its planner takes for one",
                phase="plan",
                fqn=fqn,
                expected=f"{len(tensor.blocks)} blocks of {list(tensor.shape)}",
                found=f"one, by {type(planner).__name__}",
                hint="pass planner=HFLoadPlanner(specs) to dcp.load, or use load_hf",
            )


def _is_of(item: ReadItem, tensor: BlockedTensor) -> bool:
    offset = item.dest_index.offset
    box = Box(tuple(item.dest_offsets), tuple(item.lengths))
    for block in tensor.blocks:
        if offset == block.global_box.offsets:
            return intersect(box, Box((0,) * len(box.sizes), block.global_box.sizes)) == box
    return False
