"""What torch holds while it saves or loads, and does not hand to a storage writer or reader.

The checks against silent loss need the planner and the state dict before the global plan is made,
and the end of a synchronous save needs an object that goes with it. torch gives a writer the
planner in `write_data` only.

Mechanism: the locals `planner`, `state_dict` and `distW` of torch's functions `_save_state_dict`
and `_load_state_dict` (and of `local_step` within them), found by walking up the stack. All three
must be there, under these names and of these types, so that no frame of a user is taken for
torch's. The writer and the reader compare the planner with the one that torch later passes to
`write_data` and `read_data`.

Looked at: torch 2.9 to 2.13. When torch changes: `find_save` raises, and `find_load` returns
`None`, which the reader refuses within a load. Nothing is saved or loaded without the checks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.utils import _DistWrapper

from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.torch_seam.unsupported import unsupported_torch

if TYPE_CHECKING:
    from types import FrameType

    from dcp_hf_writer.errors import UnsupportedTorchError
    from dcp_hf_writer.mapping.model_entry import Path

_STATE_DICT, _PLANNER, _RANKS = "state_dict", "planner", "distW"


@dataclass(frozen=True, slots=True)
class TorchSave:
    """What torch holds of the save that calls a writer."""

    planner: SavePlanner
    """Its planner."""
    given: Mapping[str, Any]
    """The nested state dict, as the planner is given it."""
    anchor: object
    """An object that lives as long as the save."""


@dataclass(frozen=True, slots=True)
class TorchLoad:
    """What torch holds of the load that calls a reader."""

    planner: LoadPlanner
    """Its planner."""
    given: Mapping[str, Any]
    """The nested state dict, as the planner is given it."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A planner, and the flat state dict that it plans."""

    planner: SavePlanner
    state_dict: Mapping[str, Any]
    """Values by FQN."""
    paths: Mapping[str, Path]
    """Path of each value within the nested state dict, by FQN; of one not in here, its FQN."""

    @classmethod
    def of(cls, planner: SavePlanner, given: Mapping[str, Any]) -> Planned:
        """Take what a planner shows, or else what it was given.

        torch's planners show the flat state dict. Of one that does not, the tensors of the nested
        state dict are taken, under the names that torch's planners give them.
        """
        shown = getattr(planner, "state_dict", None)
        if isinstance(shown, Mapping):
            paths = getattr(planner, "mappings", None)
            return cls(planner, shown, paths if isinstance(paths, Mapping) else {})
        tensors = flat_tensors(given)
        return cls(
            planner,
            {fqn: tensor for fqn, (_, tensor) in tensors.items()},
            {fqn: path for fqn, (path, _) in tensors.items()},
        )


def find_save() -> TorchSave:
    """Find the save that calls a writer, which calls this.

    Raises:
        UnsupportedTorchError: If torch is not, or not as known, among the callers.
    """
    found = _locals_of_torch(SavePlanner)
    if found is None:
        raise unsupported_torch(
            "the planner of the save",
            phase="plan",
            expected="torch's _save_state_dict among the callers, with a planner",
            hint="call dcp.save or dcp.async_save, with a version of torch that this package "
            "was tested with",
        )
    return TorchSave(found[_PLANNER], found[_STATE_DICT], found[_RANKS])


def find_load() -> TorchLoad | None:
    """Find the load that calls a reader, which calls this; `None` if there is none."""
    found = _locals_of_torch(LoadPlanner)
    return None if found is None else TorchLoad(found[_PLANNER], found[_STATE_DICT])


def unknown_load() -> UnsupportedTorchError:
    """Make the error of a reader that is asked to load outside of a load that it can find."""
    return unsupported_torch(
        "the planner of the load",
        phase="plan",
        expected="torch's _load_state_dict among the callers, with a planner",
        hint="call dcp.load, with a version of torch that this package was tested with, or load_hf",
    )


def other_planner(kind: str, *, rank: int | None = None) -> UnsupportedTorchError:
    """Make the error of a save or load whose planner is not the one that the checks were made of.

    Args:
        kind: `save` or `load`.
        rank: Rank on which it happened, if known.
    """
    return unsupported_torch(
        f"the planner of the {kind} before it begins",
        rank=rank,
        phase="write" if kind == "save" else "read",
        expected="the same planner in every step",
        hint=f"pass one planner to the {kind}, and do not exchange it on the way",
    )


def _locals_of_torch(kind: type[SavePlanner | LoadPlanner]) -> dict[str, Any] | None:
    """Return the locals of the nearest caller that are a planner, a state dict and the ranks."""
    wanted: dict[str, type] = {_PLANNER: kind, _STATE_DICT: Mapping, _RANKS: _DistWrapper}
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - torch has no other way
    while frame is not None:
        code = frame.f_code
        names = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        if wanted.keys() <= names:
            found = {name: frame.f_locals.get(name) for name in wanted}
            if all(isinstance(found[name], type_) for name, type_ in wanted.items()):
                return found
        frame = frame.f_back
    return None
