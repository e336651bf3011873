"""Run steps on all ranks of a group together, in the way that DCP runs the steps of a save.

Mechanism: torch's `_DistWrapper` runs a function on each rank, gathers the results, and gives every
rank the errors of all ranks. A dry run plans through it, as a save does.

Looked at: torch 2.10 to 2.15, `utils.py`. When torch changes: the import fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.utils import _DistWrapper

from dcp_hf_writer.torch_seam.default_store import has_default_group

if TYPE_CHECKING:
    import torch.distributed as dist


def steps_of(group: dist.ProcessGroup | None) -> _DistWrapper:
    """Return a runner for `group` (its rank 0 coordinates), or for this process if it is alone."""
    return _DistWrapper(group, has_default_group(), 0)
