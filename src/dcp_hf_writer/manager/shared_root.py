"""The start of a run: its directory can be written, and every rank sees the same one."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError, NodeLocalPathError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.manager.rank_messages import Messages
    from dcp_hf_writer.manager.run_storage import RunStorage

_KEY = "directory"


def prepare_shared_root(
    directory: RunStorage,
    messages: Messages,
    *,
    timeout_s: float,
    look: Callable[[], None],
) -> None:
    """Make the directory of the run, and check that all ranks share it. All ranks call it.

    Args:
        directory: The storage of the run.
        messages: Messages of the calling thread.
        timeout_s: How long the other ranks may take, in seconds.
        look: Raises what else keeps this rank from saving, such as a limit of its process.

    Raises:
        StagingError: If `look` raised it on a rank.
        StorageError: If the coordinator cannot make the directory or write to it.
        NodeLocalPathError: If a rank does not see what the coordinator wrote there.
        RankLostError: If a rank does not answer.
    """
    world = messages.world
    if world.is_alone:
        look()
        directory.prepare()
        return
    token = _left_token(directory, messages) if world.is_coordinator else ""
    answer = messages.take_from_coordinator(_KEY, timeout_s=timeout_s, doing="plan")
    if isinstance(answer, CheckpointError):
        raise answer
    try:
        look()
        sees: bool | CheckpointError = directory.has_token(answer)
    except CheckpointError as error:
        messages.put(f"{_KEY}/{world.rank}", error)
        raise
    messages.put(f"{_KEY}/{world.rank}", sees)
    found = messages.collect(_KEY, range(world.size), timeout_s=timeout_s)
    if world.is_coordinator:
        directory.remove_token(token)
    for refusal in found.values():
        if isinstance(refusal, CheckpointError):
            raise refusal
    blind = [rank for rank in range(world.size) if not found.get(rank, False)]
    if blind:
        raise NodeLocalPathError(
            "ranks do not see the directory of the run",
            rank=world.rank,
            phase="plan",
            path=directory.root,
            expected="one directory or store that all ranks share",
            found=f"ranks {blind} do not see what rank 0 wrote there",
            hint="pass the same path on every rank, on a shared file system or store; memory:// "
            "exists in one process only",
        )


def _left_token(directory: RunStorage, messages: Messages) -> str:
    """Leave a token in the directory and tell the other ranks, or tell them what went wrong."""
    token = uuid.uuid4().hex
    try:
        directory.prepare()
        directory.leave_token(token)
    except CheckpointError as error:
        messages.put(_KEY, error)
        return token
    messages.put(_KEY, token)
    return token
