"""What torch does not hand to a storage writer or reader: the planner, what was staged, its end.

A synchronous save needs the planner to find tied tensors (an asynchronous one finds them while it
stages), and any save whose planner caches plans, to see those that torch does not show. Of a save
that fails on another rank torch tells a writer nothing at all.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

from torch.distributed.checkpoint.planner import LoadPlanner, SavePlan, SavePlanner

from dcp_hf_writer.staging.stager import StagedStateDict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

_Found = TypeVar("_Found")

# torch calls the writer from the function that holds planner and group; a subclass may stand
# between. The state dict as it was staged is held further up, by `save`.
_NEAR, _FAR = 5, 16


def current_planner() -> SavePlanner | None:
    """Return the planner of the save that calls a writer, which calls this; `None` if unknown."""
    return _local("planner", SavePlanner, _NEAR)  # type: ignore[type-abstract]


def current_save() -> object | None:
    """Return an object that lives as long as the save that calls a writer; `None` if unknown."""
    return _local("distW", object, _NEAR)


def current_staged() -> StagedStateDict | None:
    """Return what the writer staged for the save that calls it; `None` for a synchronous save."""
    return _local("state_dict", StagedStateDict, _FAR)


def current_load_planner() -> LoadPlanner | None:
    """Return the planner of a load, for the reader that it calls; `None` if unknown."""
    return _local("planner", LoadPlanner, _NEAR)  # type: ignore[type-abstract]


def loaded_state_dict() -> Mapping[str, Any] | None:
    """Return the state dict of the load that calls a reader, as the planner is given it."""
    return _local("state_dict", dict, _NEAR)


def _local(name: str, kind: type[_Found], depth: int) -> _Found | None:
    """Return the nearest local of a name and type among the callers of the caller's caller."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - torch has no other way
    for _ in range(depth):
        if frame is None:
            return None
        found = frame.f_locals.get(name)
        if isinstance(found, kind) and found is not None:
            return found
        frame = frame.f_back
    return None


def planned_state_dict(planner: SavePlanner | None) -> Mapping[str, Any]:
    """Return the flat state dict that a planner was set up with; empty if it shows none."""
    found = getattr(planner, "state_dict", None)
    return found if isinstance(found, dict) else {}


def planned_paths(planner: SavePlanner | None) -> Mapping[str, tuple[str | int, ...]]:
    """Return the path of each value that a planner flattened, by FQN; empty if it shows none."""
    found = getattr(planner, "mappings", None)
    return found if isinstance(found, dict) else {}


def gathered_plans() -> list[SavePlan] | None:
    """Return the plans that the coordinator got for the save that calls a writer.

    A planner that caches plans leaves out those that did not change, with what we attached.
    """
    found = _local("all_data", list, _NEAR)
    return found if found and all(isinstance(plan, SavePlan) for plan in found) else None
