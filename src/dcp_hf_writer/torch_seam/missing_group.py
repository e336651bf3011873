"""Find out whether a save runs alone although its launcher started several ranks.

Without an initialised process group, torch saves each process by itself, and warns. Under a
launcher, every rank then writes the same checkpoint, and the last one wins. `no_dist=True` says
that this is meant, but torch replaces its local `no_dist` before any writer sees it.

Mechanism: walk up the stack to torch's `save`. The decorators around it call it with their own
local variable `kwargs`, which still holds what the caller gave. `dcp.async_save` passes its
`no_dist` on in the same way.

Looked at: torch 2.10 to 2.15. When torch changes: no frame shows `no_dist`, and the save is refused
under a launcher that names several ranks. The error then names the variable to unset.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver

from dcp_hf_writer.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

_WORLD_SIZE = "WORLD_SIZE"
_TORCH = "torch.distributed.checkpoint"


def check_group_is_there() -> None:
    """Refuse a save without a process group if the launcher started several ranks.

    Raises:
        ConfigError: If `WORLD_SIZE` is above 1, no process group is initialised, and the caller of
            the save did not pass `no_dist=True`.
    """
    text = os.environ.get(_WORLD_SIZE, "")
    if not text.isdecimal() or int(text) <= 1 or _is_initialised() or _is_meant_alone():
        return
    msg = "each rank would save by itself, because no process group is initialised"
    raise ConfigError(
        msg,
        phase="plan",
        expected=f"one group of {_WORLD_SIZE}={text} ranks",
        found="torch.distributed is not initialised, or was destroyed before the save",
        hint="call torch.distributed.init_process_group before the save, and wait for saves before "
        "destroy_process_group; if one process saves alone on purpose, pass no_dist=True, or unset "
        + _WORLD_SIZE,
    )


def _is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_meant_alone() -> bool:
    """Whether the caller of torch's `save` passed `no_dist=True`."""
    code = inspect.unwrap(state_dict_saver.save).__code__
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - torch has no other way
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    # The decorators come next, one frame each.
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_TORCH):
        given = frame.f_locals.get("kwargs")
        if isinstance(given, dict) and "no_dist" in given:
            return bool(given["no_dist"])
        frame = frame.f_back
    return False
