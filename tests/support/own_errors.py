"""The package's own errors in what a save or load raised."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer.errors import CheckpointError


def own_errors(error: BaseException | None) -> list[CheckpointError]:
    """Return our errors in one that torch raised, by rank; an own error is the only one."""
    if isinstance(error, CheckpointError):
        return [error]
    if isinstance(error, CheckpointException):
        inner = [failure for _, (failure, _) in sorted(error.failures.items())]
        return [one for one in inner if isinstance(one, CheckpointError)]
    return []
