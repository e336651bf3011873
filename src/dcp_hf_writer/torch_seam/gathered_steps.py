"""Steps that all ranks of a group take together, as DCP takes those of a save.

Mechanism: torch's `_DistWrapper`, which runs a function on each rank, gathers the results, and
gives every rank the errors of all. A dry run plans by it as a save does.

Looked at: torch 2.9 to 2.13, `utils.py`. When torch changes: the import fails.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.checkpoint.utils import _DistWrapper


def steps_of(group: dist.ProcessGroup | None) -> _DistWrapper:
    """Return the steps of a group, coordinated by its first rank; of this process alone without."""
    return _DistWrapper(group, dist.is_available() and dist.is_initialized(), 0)
