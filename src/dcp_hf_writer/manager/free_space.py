"""Refuse a save that will not fit, before it begins; first delete what retention gives up."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from dcp_hf_writer.manager.keep_house import Housekeeper
    from dcp_hf_writer.manager.run_storage import RunStorage


def refusal_for_space(
    directory: RunStorage, house: Housekeeper, *, path: str, needed: int, timeout_s: float
) -> CheckpointError | None:
    """Return the error if a checkpoint does not fit on the device; `None` if it does.

    Args:
        directory: The storage of the run.
        house: Deletes what retention gives up, if the space is short.
        path: Path of the checkpoint.
        needed: Its size in bytes.
        timeout_s: How long deletions may take, in seconds.
    """
    try:
        free = directory.free_nbytes()
        if free is not None and free < needed:
            house.wait(timeout_s)
            house.run()
            free = directory.free_nbytes()
    except CheckpointError as error:
        return error
    if free is None or free >= needed:
        return None
    return StorageError(
        "there is not enough free space for the checkpoint",
        phase="plan",
        path=path,
        expected=f"{needed} bytes free ({needed / (1 << 30):.2f} GiB)",
        found=f"{free} bytes ({free / (1 << 30):.2f} GiB)",
        hint="free space, keep fewer checkpoints (keep_last), or export less often",
        errno=errno.ENOSPC,
    )
