"""What torch's `save` does not hand to a storage writer: the planner, and the end of the save.

A synchronous save needs the planner to find tied tensors (an asynchronous one finds them while it
stages), and any save whose planner caches plans, to see those that torch does not show. Of a save
that fails on another rank torch tells a writer nothing at all.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.planner import SavePlanner

if TYPE_CHECKING:
    from collections.abc import Mapping

# torch calls the writer from the function that holds the planner; a subclass may stand between.
_MAX_DEPTH = 4


def current_planner() -> SavePlanner | None:
    """Return the planner of the save that calls a writer, which calls this; `None` if unknown."""
    frame = sys._getframe(2)  # noqa: SLF001
    for _ in range(_MAX_DEPTH):
        planner = frame.f_locals.get("planner")
        if isinstance(planner, SavePlanner):
            return planner
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def current_save() -> object | None:
    """Return an object that lives as long as the save that calls a writer; `None` if unknown."""
    frame = sys._getframe(2)  # noqa: SLF001
    for _ in range(_MAX_DEPTH):
        found = frame.f_locals.get("distW")
        if found is not None:
            return found  # type: ignore[no-any-return]
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def planned_state_dict(planner: SavePlanner | None) -> Mapping[str, Any]:
    """Return the flat state dict that a planner was set up with; empty if it shows none."""
    found = getattr(planner, "state_dict", None)
    return found if isinstance(found, dict) else {}
