"""PerRank: a value of which each rank saves its own, and gets its own back.

DCP keeps one value per name. So the value gets a name that says which rank of how many it is from:
`<entry>.rank-<rank>-of-<ranks>`. Nothing else is needed, and every writer and reader of DCP saves
and loads such a value.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.torch_seam.default_store import has_default_group


class PerRank(dict[str, Any]):
    """A value that differs between ranks, such as a random state or the state of a data loader.

        state_dict = {"model": ..., "rng": PerRank(torch.get_rng_state())}
        dcp.async_save(state_dict, storage_writer=...)

        state_dict = {"model": ..., "rng": PerRank()}
        dcp.load(state_dict, checkpoint_id=...)
        torch.set_rng_state(state_dict["rng"].value)

    Put it into the state dict at any place that DCP flattens: below dicts. The value is stored as
    one object, whatever it consists of. So a load needs no template for it, and the value comes
    back with the structure that it had. Each rank loads only its own.

    A checkpoint has such values for as many ranks as saved it. A load on another number of ranks
    finds no value under its name, and fails with an error that shows this name. Leave the entry out
    of the state dict there, and load the rest.
    """

    def __init__(
        self, value: object = None, *, process_group: dist.ProcessGroup | None = None
    ) -> None:
        """Hold the value of this rank.

        Args:
            value: What to save; leave it out to load.
            process_group: Group of the save or load; `None` is the default group. Without a process
                group, this process is the only rank.

        Raises:
            PlanningError: If this rank is not in `process_group`.
        """
        rank, ranks = 0, 1
        if has_default_group():
            rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
        if rank < 0:
            msg = "a PerRank value needs a process group that this rank is in"
            raise PlanningError(msg, phase="plan", expected="a rank of the group", found="none")
        # A tuple, because DCP stores a tuple as one object.
        super().__init__({f"rank-{rank}-of-{ranks}": (value,)})

    @property
    def value(self) -> Any:
        """The value of this rank: as given, or as loaded."""
        (found,) = self.values()
        return found[0]
