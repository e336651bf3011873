"""The tensors of a model, and the process groups over which they are sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.mapping.model_entry import model_prefix, names_in_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.load_spec import LoadSpec

UNGROUPED = -1
"""Number of no group, where a rank is alone."""


class Groups:
    """The process groups that tensors are sharded over, in the order in which they are met.

    All ranks that share a group meet it as the same one: groups are told apart by their ranks.
    """

    def __init__(self) -> None:
        """Start without groups."""
        self.all: list[ProcessGroup] = []
        self.places: list[int] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def add(self, group: ProcessGroup, device_type: str) -> int:
        """Return the number of a group."""
        ranks = (device_type, *dist.get_process_group_ranks(group))
        if ranks not in self._numbers:
            self._numbers[ranks] = len(self.all)
            self.all.append(group)
            self.places.append(dist.get_rank(group))
        return self._numbers[ranks]

    def add_mesh(self, mesh: DeviceMesh) -> tuple[int, ...]:
        """Return the number of the group of each dimension; negative where there is one rank."""
        if mesh.get_coordinate() is None:
            return (UNGROUPED,) * mesh.ndim
        return tuple(
            self.add(mesh.get_group(dim), mesh.device_type) if mesh.size(dim) > 1 else UNGROUPED
            for dim in range(mesh.ndim)
        )


def model_tensors(
    state_dict: Mapping[str, Any], *, key: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of the model in a state dict, and their names within it, both by FQN.

    Raises:
        ModelKeyError: If it is not clear which entry holds the model.
        PlanningError: If two tensors have one FQN.
    """
    tensors = flat_tensors(state_dict)
    paths = {fqn: path for fqn, (path, _) in tensors.items()}
    names = names_in_model(paths, model_prefix(paths, key=key))
    return {fqn: tensors[fqn][1] for fqn in names}, names


def is_by_hand(value: torch.Tensor, spec: LoadSpec) -> bool:
    """Whether the shards of a spec count: a DTensor of the whole tensor says by itself."""
    is_whole = isinstance(value, DTensor) and tuple(value.shape) == spec.global_shape
    return bool(spec.shards) and not is_whole


def meet_groups(
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    export: HFExport,
    group: ProcessGroup | None,
) -> tuple[Groups, int]:
    """Collect the groups of all meshes, then the one of tensors that are sharded by hand.

    Returns:
        The groups, and the number of that last one; negative without such tensors or with one rank.
    """
    groups = Groups()
    for mesh in dict.fromkeys(
        value.device_mesh for value in tensors.values() if isinstance(value, DTensor)
    ):
        groups.add_mesh(mesh)
    specs = ((value, export.spec_by_fqn.get(names[fqn])) for fqn, value in tensors.items())
    is_needed = any(spec is not None and is_by_hand(value, spec) for value, spec in specs)
    chosen = dist.group.WORLD if group is None and dist.is_initialized() else group
    # The size of a group that this rank is not in is negative.
    if not is_needed or chosen is None or dist.get_world_size(chosen) <= 1:
        return groups, UNGROUPED
    return groups, groups.add(chosen, "")
