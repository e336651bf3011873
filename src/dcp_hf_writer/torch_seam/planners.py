"""HFSavePlanner and HFLoadPlanner: torch's planners, right also where a rank holds several blocks.

Which tensors those are is in `multi_block_tensors`, how specs find tensors in `spec_match`.
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

    Works with any storage writer. Each block becomes one item of the plan, so that the checkpoint
    holds the whole tensor, which any torch loads on any number of ranks. A block that several
    ranks hold is written once. All other tensors, all options and the plan cache are torch's.

    `specs` declare what is sharded by hand: a plain tensor (or a DTensor of the ranks that share
    it) whose spec has `shards` is this rank's part of `global_shape`, or all of it if it has that
    shape. Optimizer state of such a parameter, `[...].state.<name>.<what>`, and copies of it in
    other entries are cut the same way if they have its local shape; single numbers are left as
    they are, and any other shape is refused until a spec names that tensor by its whole dotted
    path. Optimizer state must be keyed by FQN, as `get_optimizer_state_dict` has it. DTensors need
    no spec.
    """

    def __init__(self, specs: Specs | None = (), *, key: str | None = None, **options: Any) -> None:
        """Set up a planner, for one save or for all of a run.

        Args:
            specs: What is sharded by hand; specs without `shards` may be among them.
            key: Entry of the state dict that holds the model, as `HFExport` takes it.
            **options: Those of torch's `DefaultSavePlanner`.

        Raises:
            ConfigError: If two specs name one tensor, or one is no `LoadSpec`.
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
        """Take a state dict.

        Raises:
            PlanningError: If a tensor is not what its spec says.
        """
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self._blocked = blocked_tensors(
            self.state_dict, self.mappings, self.spec_by_name, key=self.key
        )

    def create_local_plan(self) -> SavePlan:
        """Plan what this rank writes."""
        given = self.state_dict
        self.state_dict = {**given, **self._blocked}
        try:
            return super().create_local_plan()
        finally:
            self.state_dict = given

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value of an item; of a block, a view of the local tensor."""
        blocked = self._blocked.get(index.fqn)
        if blocked is None:
            return super().lookup_object(index)
        return blocked.part(index.offset)


class HFLoadPlanner(DefaultLoadPlanner):
    """Loads into tensors that a trainer shards by hand, and DTensors that hold several blocks.

        dcp.load(state_dict, checkpoint_id=..., planner=HFLoadPlanner(specs))

    Reads any checkpoint, however it was sharded when it was saved, into the parts of the local
    tensors that the blocks are. `specs` as for `HFSavePlanner`; sizes are compared with their
    `global_shape`. All other tensors and all options are torch's.
    """

    def __init__(self, specs: Specs | None = (), *, key: str | None = None, **options: Any) -> None:
        """Set up a planner.

        Args:
            specs: What is sharded by hand; specs without `shards` may be among them.
            key: Entry of the state dict that holds the model, as `HFExport` takes it.
            **options: Those of torch's `DefaultLoadPlanner`.

        Raises:
            ConfigError: If two specs name one tensor, or one is no `LoadSpec`.
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
            PlanningError: If a tensor is not what its spec says.
        """
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self._blocked = blocked_tensors(
            self.state_dict, self.mappings, self.spec_by_name, key=self.key
        )

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank reads.

        Raises:
            PlanningError: If the checkpoint is one of torch before 2.4, which names values in
                another way, and tensors of several blocks shall be loaded from it.
        """
        given = self.state_dict
        planned = self.state_dict = {**given, **self._blocked}
        try:
            plan = super().create_local_plan()
            if self._blocked and self.state_dict is not planned:
                msg = "tensors of several blocks cannot be loaded from a checkpoint this old"
                raise PlanningError(
                    msg, phase="plan", expected="one of torch 2.4 or later", found="an older one"
                )
        finally:
            if self.state_dict is planned:
                self.state_dict = given
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return where an item is loaded to; of a block, a view of the local tensor."""
        blocked = self._blocked.get(index.fqn)
        if blocked is None:
            return super().lookup_tensor(index)
        return blocked.part(index.offset).detach()
