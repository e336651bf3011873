"""End torch's checkpointer process, so that the next save starts another.

Mechanism: `torch.distributed.checkpoint._async_process_executor._CHECKPOINT_PROCESS`. torch keeps
one process for all saves, and does not replace it when it is dead or stuck. torch makes a new one
if the name holds `None`; then all ranks make theirs together.

Looked at: torch 2.10 to 2.15. When torch changes: `end_checkpointer_process` raises, so the save
after one whose process was lost fails.
"""

from __future__ import annotations

import logging

from torch.distributed.checkpoint import _async_process_executor

from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

_log = logging.getLogger(__name__)

_NAME = "_CHECKPOINT_PROCESS"
_END_S = 10.0
"""How long the kernel may take to end a process that was killed."""


def end_checkpointer_process() -> None:
    """Kill torch's checkpointer process, and let torch forget it. Does nothing if there is none.

    All ranks call it, when no save is in flight. A process that is stopped or stuck ends, too.

    Raises:
        UnsupportedTorchError: If torch keeps its process elsewhere.
    """
    if not hasattr(_async_process_executor, _NAME):
        raise _not_found(f"{_NAME} in torch.distributed.checkpoint._async_process_executor")
    kept = getattr(_async_process_executor, _NAME)
    if kept is None:
        return
    process = getattr(kept, "_save_process", None)
    if process is None:
        raise _not_found(f"{type(kept).__name__}._save_process")
    setattr(_async_process_executor, _NAME, None)
    # Not `terminate`: a process that is stopped would keep the signal for later.
    process.kill()
    process.join(_END_S)
    if process.is_alive():
        _log.warning("checkpointer process %d was killed and still does not end", process.pid)


def _not_found(expected: str) -> Exception:
    return unsupported_torch(
        "the checkpointer process",
        phase="plan",
        expected=expected,
        hint="restart the run, or save in a thread",
    )
