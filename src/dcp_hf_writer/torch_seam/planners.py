"""HFSavePlanner and HFLoadPlanner: torch's planners, with support for ranks with several blocks.

`multi_block_tensors` finds tensors of several blocks. `spec_match` finds the spec of a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.hf_export import specs_by_name
from dcp_hf_writer.torch_seam.multi_block_tensors import BlockedTensor, blocked_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
    from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

    from dcp_hf_writer.mapping.load_spec import LoadSpec

    Specs = Mapping[str, LoadSpec] | Iterable[LoadSpec]


class HFSavePlanner(DefaultSavePlanner):
    """Saves tensors that a trainer shards by hand, and DTensors that hold several blocks.

        dcp.async_save(state_dict, storage_writer=..., planner=HFSavePlanner(specs))

    Works with any storage writer. Each block becomes one item of the plan, so the checkpoint holds
    the whole tensor, and any torch can load it on any number of ranks. If several ranks hold one
    block, it is written once. torch's planner handles all other tensors, all options and the plan
    cache.

    `specs` declare the tensors that are sharded by hand. A plain tensor whose spec has `shards` is
    this rank's shard of a tensor of shape `global_shape`; if it has that shape itself, it is the
    whole tensor. It may also be a DTensor, over the ranks that share this shard. Other DTensors
    need no spec.

    A spec also applies to the parameter's optimizer state, `[...].state.<name>.<what>`, and to its
    copies in other entries. They are cut in the same way if they have the parameter's local shape.
    They are whole if they have its `global_shape` or at most one element. Any other shape is
    refused, unless a spec names that tensor by its full dotted path. The keys of optimizer state
    must be FQNs, as in `get_optimizer_state_dict`.
    """

    def __init__(self, specs: Specs | None = (), *, key: str | None = None, **options: Any) -> None:
        """Set up a planner, for one save or for all saves of a run.

        Args:
            specs: Specs of the tensors that are sharded by hand; others may be among them.
            key: Entry of the state dict that holds the model, as in `HFExport.key`.
            **options: Options of torch's `DefaultSavePlanner`.

        Raises:
            ConfigError: If two specs name the same tensor, or if a spec is not a `LoadSpec`.
        """
        super().__init__(**options)
        self.spec_by_name = specs_by_name(specs)
        self.key = key
        self._blocked: dict[str, BlockedTensor] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002 - torch's
    ) -> None:
        """Take the state dict to save.

        Raises:
            PlanningError: If a tensor does not fit its spec.
        """
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self._blocked = blocked_tensors(
            self.state_dict, self.mappings, self.spec_by_name, key=self.key
        )

    @property
    def declared(self) -> frozenset[str]:
        """FQNs of the tensors that this planner plans as blocks."""
        return frozenset(self._blocked)

    @property
    def declares_shards(self) -> bool:
        """Whether any spec says how a tensor is sharded by hand."""
        return any(spec.shards for spec in self.spec_by_name.values())

    def create_local_plan(self) -> SavePlan:
        """Plan what this rank writes."""
        given = self.state_dict
        self.state_dict = {**given, **self._blocked}
        try:
            return super().create_local_plan()
        finally:
            self.state_dict = given

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value of an item. For a block, it is a view of the local tensor."""
        blocked = self._blocked.get(index.fqn)
        if blocked is None:
            return super().lookup_object(index)
        return blocked.part(index.offset)


class HFLoadPlanner(DefaultLoadPlanner):
    """Loads into tensors that a trainer shards by hand, and DTensors that hold several blocks.

        dcp.load(state_dict, checkpoint_id=..., planner=HFLoadPlanner(specs))

    Loads any checkpoint, sharded in any way, into the blocks of each local tensor. `specs` work as
    in `HFSavePlanner`; a stored tensor must have the `global_shape` of its spec. torch's planner
    handles all other tensors and all options.
    """

    def __init__(self, specs: Specs | None = (), *, key: str | None = None, **options: Any) -> None:
        """Set up a planner.

        Args:
            specs: Specs of the tensors that are sharded by hand; others may be among them.
            key: Entry of the state dict that holds the model, as in `HFExport.key`.
            **options: Options of torch's `DefaultLoadPlanner`.

        Raises:
            ConfigError: If two specs name the same tensor, or if a spec is not a `LoadSpec`.
        """
        super().__init__(**options)
        self.spec_by_name = specs_by_name(specs)
        self.key = key
        self._blocked: dict[str, BlockedTensor] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002 - torch's
    ) -> None:
        """Take the state dict to load into.

        Raises:
            PlanningError: If a tensor does not fit its spec.
        """
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self._blocked = blocked_tensors(
            self.state_dict, self.mappings, self.spec_by_name, key=self.key
        )

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank reads.

        Raises:
            PlanningError: If a tensor of several blocks is to be loaded from a checkpoint of torch
                before 2.4, which uses other FQNs.
        """
        given = self.state_dict
        planned = self.state_dict = {**given, **self._blocked}
        try:
            plan = super().create_local_plan()
            if self._blocked and self.state_dict is not planned:
                msg = "tensors of several blocks cannot be loaded from a checkpoint with old FQNs"
                raise PlanningError(
                    msg,
                    phase="plan",
                    expected="a checkpoint of torch 2.4 or later",
                    found="the FQNs of an older torch",
                    hint="load whole tensors from it, and save them again",
                )
        finally:
            if self.state_dict is planned:
                self.state_dict = given
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the tensor to load an item into. For a block, it is a view of the local tensor."""
        blocked = self._blocked.get(index.fqn)
        if blocked is None:
            return super().lookup_tensor(index)
        return blocked.part(index.offset).detach()
