"""What torch's `save` does not hand to a storage writer: the planner, while it plans.

Only a synchronous save needs it, to find tied tensors; an asynchronous one finds them while it
stages.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.planner import SavePlanner

if TYPE_CHECKING:
    from collections.abc import Mapping

# torch calls the writer from the function that holds the planner; a subclass may stand between.
_MAX_DEPTH = 4


def planned_state_dict() -> Mapping[str, Any] | None:
    """Return the flat state dict of the planner that the calling save uses; `None` if unknown."""
    frame = sys._getframe(2)  # noqa: SLF001
    for _ in range(_MAX_DEPTH):
        planner = frame.f_locals.get("planner")
        if isinstance(planner, SavePlanner):
            found = getattr(planner, "state_dict", None)
            return found if isinstance(found, dict) else None
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None
