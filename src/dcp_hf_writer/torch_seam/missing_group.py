"""Find out whether a save runs alone although there are several ranks.

Without an initialised process group, torch saves each process by itself, and warns. If there are
several ranks, every rank then writes the same checkpoint, and one of them wins. The launcher tells
how many ranks there are, and so does the process group in which the writer was made. `no_dist=True`
says that one process saves alone on purpose, but torch replaces its local `no_dist` before any
writer sees it.

Mechanism: walk up the stack to torch's `save`. The decorators around it call it with their own
local variable `kwargs`, which still holds what the caller gave. `dcp.async_save` passes its
`no_dist` on in the same way.

Looked at: torch 2.10 to 2.15. When torch changes: no frame shows `no_dist`, and the save is refused
if there are several ranks. The error then names the variable to unset.
"""

from __future__ import annotations

import inspect
import os
import sys

from torch.distributed.checkpoint import state_dict_saver

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.torch_seam.caller_frames import frames_from
from dcp_hf_writer.torch_seam.default_store import has_default_group

_WORLD_SIZE = "WORLD_SIZE"
_TORCH = "torch.distributed.checkpoint"


def check_group_is_there(ranks_before: int = 1) -> None:
    """Refuse a save without a process group if there are several ranks.

    Args:
        ranks_before: Number of ranks when the writer was made.

    Raises:
        ConfigError: If `WORLD_SIZE` or `ranks_before` is above 1, no process group is initialised,
            and the caller of the save did not pass `no_dist=True`.
    """
    text = os.environ.get(_WORLD_SIZE, "")
    is_launched = text.isdecimal() and int(text) > 1
    if (not is_launched and ranks_before == 1) or has_default_group() or _is_meant_alone():
        return
    unset = f", or unset {_WORLD_SIZE}" if is_launched else ""
    msg = "each rank would save by itself, because no process group is initialised"
    raise ConfigError(
        msg,
        phase="plan",
        expected=f"one group of {_WORLD_SIZE}={text} ranks"
        if is_launched
        else f"one group of {ranks_before} ranks, as when the writer was made",
        found="torch.distributed is not initialised, or was destroyed before the save",
        hint="call torch.distributed.init_process_group before the save, and wait for saves before "
        f"destroy_process_group; if one process saves alone on purpose, pass no_dist=True{unset}",
    )


def _is_meant_alone() -> bool:
    """Whether the caller of torch's `save` passed `no_dist=True`."""
    code = inspect.unwrap(state_dict_saver.save).__code__
    frames = frames_from(sys._getframe(1))  # noqa: SLF001 - torch has no other way
    for frame in frames:
        if frame.f_code is code:
            break
    # The decorators come next, one frame each.
    for frame in frames:
        if not frame.f_globals.get("__name__", "").startswith(_TORCH):
            break
        given = frame.f_locals.get("kwargs")
        if isinstance(given, dict) and "no_dist" in given:
            return bool(given["no_dist"])
    return False
