"""Run steps on all ranks of a group together, in the way that DCP runs the steps of a save.

Mechanism: torch's `_DistWrapper` runs a function on each rank, gathers the results, and gives every
rank the errors of all ranks. A dry run plans through it, as a save does.

Looked at: torch 2.10 to 2.15, `utils.py`. When torch changes: the import fails.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.checkpoint.utils import _DistWrapper


def steps_of(group: dist.ProcessGroup | None) -> _DistWrapper:
    """Return a runner for `group` (its rank 0 coordinates), or for this process if it is alone."""
    return _DistWrapper(group, dist.is_available() and dist.is_initialized(), 0)
