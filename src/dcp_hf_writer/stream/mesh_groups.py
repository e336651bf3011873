"""The tensors of a model, and the process groups over which they are sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.mapping.model_entry import model_prefix, names_in_model, without_moments
from dcp_hf_writer.mapping.wrapped_names import unwrapped_names
from dcp_hf_writer.tensors.shards import check_no_shard_attributes

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.load_spec import LoadSpec

UNGROUPED = -1
"""Used instead of a group number where a rank is alone."""


class Groups:
    """The process groups that tensors are sharded over, in the order in which they are added.

    Groups with the same device type and the same ranks count as one, so that the ranks of a group
    agree on its place in the order.
    """

    def __init__(self) -> None:
        """Start without groups."""
        self.all: list[ProcessGroup] = []
        self.places: list[int] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def add(self, group: ProcessGroup, device_type: str) -> int:
        """Return the number of a group; add the group if it is new."""
        ranks = (device_type, *dist.get_process_group_ranks(group))
        if ranks not in self._numbers:
            self._numbers[ranks] = len(self.all)
            self.all.append(group)
            self.places.append(dist.get_rank(group))
        return self._numbers[ranks]

    def add_mesh(self, mesh: DeviceMesh) -> tuple[int, ...]:
        """Return the group number of each mesh dimension; `UNGROUPED` for one with one rank."""
        if mesh.get_coordinate() is None:
            return (UNGROUPED,) * mesh.ndim
        return tuple(
            self.add(mesh.get_group(dim), mesh.device_type) if mesh.size(dim) > 1 else UNGROUPED
            for dim in range(mesh.ndim)
        )


def model_tensors(
    state_dict: Mapping[str, Any], *, key: str | None, wanted: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of the model in a state dict, and their names within it, both by FQN.

    Args:
        state_dict: A nested state dict.
        key: Entry that holds the model, as in `HFExport.key`.
        wanted: Names that the export declares, from `HFExport.declared_names`.

    Raises:
        ModelKeyError: If it is not clear which entry holds the model.
        PlanningError: If two tensors have one FQN, or one has shard attributes.
    """
    tensors = flat_tensors(state_dict)
    paths = {fqn: path for fqn, (path, _) in tensors.items()}
    names = without_moments(names_in_model(paths, model_prefix(paths, key=key)))
    names = unwrapped_names(names, wanted)
    found = {fqn: tensors[fqn][1] for fqn in names}
    check_no_shard_attributes(found)
    return found, names


def is_by_hand(value: torch.Tensor, spec: LoadSpec) -> bool:
    """Whether the `shards` of a spec apply; a DTensor of the whole tensor needs none."""
    is_whole = isinstance(value, DTensor) and tuple(value.shape) == spec.global_shape
    return bool(spec.shards) and not is_whole


def meet_groups(
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    export: HFExport,
    group: ProcessGroup | None,
) -> tuple[Groups, int]:
    """Collect the groups of all meshes, then the group of tensors that are sharded by hand.

    Returns:
        The groups, and the number of that last group: `UNGROUPED` if there are no such tensors, or
        only one rank.
    """
    groups = Groups()
    for mesh in dict.fromkeys(
        value.device_mesh for value in tensors.values() if isinstance(value, DTensor)
    ):
        groups.add_mesh(mesh)
    specs = ((value, export.spec_by_fqn.get(names[fqn])) for fqn, value in tensors.items())
    is_needed = any(spec is not None and is_by_hand(value, spec) for value, spec in specs)
    chosen = dist.group.WORLD if group is None and dist.is_initialized() else group
    # `get_world_size` returns a negative number for a group that this rank is not in.
    if not is_needed or chosen is None or dist.get_world_size(chosen) <= 1:
        return groups, UNGROUPED
    return groups, groups.add(chosen, "")
