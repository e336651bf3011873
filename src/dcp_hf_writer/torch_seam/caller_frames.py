"""Find the planner and the state dict of a save or load in the frames of torch's functions.

torch passes the planner to a storage writer only in `write_data`, and the state dict never. The
checks against silent data loss need both before the global plan is made. A synchronous save also
needs an object that torch drops when the save ends, so that its resources can be given back.

Mechanism: walk up the stack to torch's `_save_state_dict` or `_load_state_dict` (or to `local_step`
within them), and read the local variables `planner`, `state_dict` and `distW`. A frame counts only
if it has all three names with values of the right types, so that a frame of the user is not
mistaken for torch's. The writer and the reader later compare this planner with the one that torch
passes to `write_data` and `read_data`.

Looked at: torch 2.10 to 2.15. When torch changes: `find_save` raises. `find_load` returns `None`,
and the reader then refuses to load. Nothing is saved or loaded without the checks.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.utils import _DistWrapper

from dcp_hf_writer.mapping.flattening import flat_tensors, flat_values
from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from dcp_hf_writer.errors import UnsupportedTorchError
    from dcp_hf_writer.mapping.model_entry import Path

_STATE_DICT, _PLANNER, _RANKS = "state_dict", "planner", "distW"


@dataclass(frozen=True, slots=True)
class TorchSave:
    """The save that torch is running, as found in torch's frames."""

    planner: SavePlanner
    """Planner of the save."""
    given: Mapping[str, Any]
    """The nested state dict that torch gives to the planner."""
    ranks: _DistWrapper
    """The ranks of the save. This object lives as long as the save."""

    @property
    def group(self) -> Any:
        """Process group of the save; `None` for the default group."""
        return self.ranks.group

    @property
    def is_distributed(self) -> bool:
        """Whether torch uses a process group for the save."""
        return bool(self.ranks.use_dist)


@dataclass(frozen=True, slots=True)
class TorchAsyncSave:
    """The call of `async_save` that stages a state dict, as found in torch's frames."""

    group: Any
    """The `process_group` that it was given; `None` for the default group."""
    no_dist: bool
    """The `no_dist` that it was given."""
    checkpoint_id: str | None
    """The `checkpoint_id` that it was given; `None` for the path of the writer."""


@dataclass(frozen=True, slots=True)
class RunningSave:
    """A save that a thread has begun, for others to ask whether the thread still runs it."""

    thread: threading.Thread
    """The thread that runs the save."""
    ranks: weakref.ref[_DistWrapper]
    """The object that lives as long as the save, and as long as an error of it keeps its frames."""

    @classmethod
    def of(cls, save: TorchSave) -> RunningSave:
        """Note the save that the calling thread runs."""
        return cls(threading.current_thread(), weakref.ref(save.ranks))

    def is_running(self) -> bool:
        """Whether the thread is still in torch's `_save_state_dict`."""
        ranks = self.ranks()
        if ranks is None or not self.thread.is_alive() or self.thread.ident is None:
            return False
        innermost = sys._current_frames().get(self.thread.ident)  # noqa: SLF001 - no other way
        return any(_holds(frame, ranks) for frame in frames_from(innermost))

    def has_raised(self, error: BaseException) -> bool:
        """Whether an error, or one of its causes, came out of the save."""
        ranks = self.ranks()
        seen: set[int] = set()
        todo: list[BaseException | None] = [error]
        while ranks is not None and todo:
            one = todo.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            todo += [one.__cause__, one.__context__]
            trace = one.__traceback__
            while trace is not None:
                if _holds(trace.tb_frame, ranks):
                    return True
                trace = trace.tb_next
        return False


@dataclass(frozen=True, slots=True)
class TorchLoad:
    """The load that torch is running, as found in torch's frames."""

    planner: LoadPlanner
    """Planner of the load."""
    given: Mapping[str, Any]
    """The nested state dict that torch gives to the planner."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A planner, and the flat state dict that it plans to save."""

    planner: SavePlanner
    state_dict: Mapping[str, Any]
    """Values by FQN."""
    paths: Mapping[str, Path]
    """Path of each value within the nested state dict, by FQN; without an entry, it is the FQN."""

    @classmethod
    def of(cls, planner: SavePlanner, given: Mapping[str, Any]) -> Planned:
        """Take the flat state dict from a planner, or else flatten `given`.

        torch's planners show their flat state dict as `state_dict`. For a planner that does not,
        this method names the values of `given` as torch's planners would.

        Raises:
            PlanningError: If two tensors of `given` have the same FQN.
        """
        shown = getattr(planner, "state_dict", None)
        if isinstance(shown, Mapping):
            paths = getattr(planner, "mappings", None)
            return cls(planner, shown, paths if isinstance(paths, Mapping) else {})
        values = {**flat_values(given), **flat_tensors(given)}
        return cls(
            planner,
            {fqn: value for fqn, (_, value) in values.items()},
            {fqn: path for fqn, (path, _) in values.items()},
        )

    def path_of(self, fqn: str) -> Path:
        """Return the path of a value within the nested state dict."""
        return tuple(self.paths.get(fqn, (fqn,)))

    def paths_of_tensors(self) -> dict[str, Path]:
        """Return the path of each tensor, by FQN."""
        return {
            fqn: self.path_of(fqn)
            for fqn, value in self.state_dict.items()
            if isinstance(value, torch.Tensor)
        }


def frames_from(innermost: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame, its caller, the caller of that, and so on."""
    frame = innermost
    while frame is not None:
        yield frame
        frame = frame.f_back


def find_save() -> TorchSave:
    """Find the save whose writer calls this function.

    Raises:
        UnsupportedTorchError: If no caller is torch's `_save_state_dict` with the known locals.
    """
    found = _locals_of_torch(SavePlanner)
    if found is None:
        raise unsupported_torch(
            "the planner of the save",
            phase="plan",
            expected="torch's _save_state_dict on the stack, with planner, state_dict and distW",
            hint="call dcp.save or dcp.async_save, with a version of torch that this package "
            "was tested with",
        )
    return TorchSave(found[_PLANNER], found[_STATE_DICT], found[_RANKS])


def find_async_save() -> TorchAsyncSave | None:
    """Find the `async_save` that calls this function to stage; `None` if there is none."""
    wanted = {"process_group", "no_dist", "checkpoint_id", "async_checkpointer_type"}
    for frame in frames_from(sys._getframe(1)):  # noqa: SLF001 - as in `_locals_of_torch`
        code = frame.f_code
        if wanted <= {*code.co_varnames, *code.co_cellvars}:
            found = frame.f_locals
            given = found["checkpoint_id"]
            checkpoint_id = None if given is None else os.fspath(given)
            return TorchAsyncSave(found["process_group"], bool(found["no_dist"]), checkpoint_id)
    return None


def is_no_dist_given() -> bool:
    """Whether the asynchronous save that the calling thread runs was given `no_dist=True`."""
    for frame in frames_from(sys._getframe(1)):  # noqa: SLF001 - as in `_locals_of_torch`
        if {"staging_future_or_state_dict", "no_dist"} <= {*frame.f_code.co_varnames}:
            return bool(frame.f_locals["no_dist"])
    return False


def find_load() -> TorchLoad | None:
    """Find the load whose reader calls this function; return `None` if there is none."""
    found = _locals_of_torch(LoadPlanner)
    return None if found is None else TorchLoad(found[_PLANNER], found[_STATE_DICT])


def unknown_load() -> UnsupportedTorchError:
    """Make the error for a reader that `find_load` found no load for."""
    return unsupported_torch(
        "the planner of the load",
        phase="plan",
        expected="torch's _load_state_dict on the stack, with planner, state_dict and distW",
        hint="call dcp.load, with a version of torch that this package was tested with, or load_hf",
    )


def other_planner(kind: str, *, rank: int | None = None) -> UnsupportedTorchError:
    """Make the error for a planner that differs from the planner that the checks looked at.

    Args:
        kind: `save` or `load`.
        rank: Rank on which it happened, if known.
    """
    phase, step = ("write", "write_data") if kind == "save" else ("read", "read_data")
    return unsupported_torch(
        f"the planner of the {kind} in time",
        rank=rank,
        phase=phase,
        expected="the same planner in every step",
        found=f"another planner in {step}",
        hint=f"pass one planner to the {kind}, and do not replace it during the {kind}",
    )


def _holds(frame: FrameType, ranks: _DistWrapper) -> bool:
    """Whether a frame is the `_save_state_dict` of the save of these ranks."""
    code = frame.f_code
    is_known = _RANKS in code.co_cellvars or _RANKS in code.co_varnames
    return is_known and frame.f_locals.get(_RANKS) is ranks


def _locals_of_torch(kind: type[SavePlanner | LoadPlanner]) -> dict[str, Any] | None:
    """Return planner, state dict and ranks from the nearest caller that has all three as locals."""
    wanted: dict[str, type] = {_PLANNER: kind, _STATE_DICT: Mapping, _RANKS: _DistWrapper}
    for frame in frames_from(sys._getframe(2)):  # noqa: SLF001 - torch has no other way
        code = frame.f_code
        names = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        if wanted.keys() <= names:
            found = {name: frame.f_locals.get(name) for name in wanted}
            if all(isinstance(found[name], type_) for name, type_ in wanted.items()):
                return found
    return None
