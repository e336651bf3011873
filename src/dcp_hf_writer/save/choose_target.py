"""Choose where a save writes: a directory of a file system, or an object store."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.mirror_jobs import start_mirror
from dcp_hf_writer.save.object_target import ObjectTarget
from dcp_hf_writer.save.posix_target import LocalOptions, PosixTarget
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.save_target import SaveTarget
    from dcp_hf_writer.save.store_access import StoreAccess


def choose_target(
    attempt: Attempt,
    save_id: str,
    access: StoreAccess,
    local: LocalOptions,
    told: Mapping[str, Any] | None = None,
    *,
    host_budget_bytes: int,
) -> SaveTarget:
    """Return where a save writes.

    Args:
        attempt: The save.
        save_id: Id of the save.
        access: How to reach stores.
        local: Options of saves to a file system.
        told: What the coordinator told; `None` on the coordinator.
        host_budget_bytes: Memory that a rank may use in addition to the staged copy.

    Raises:
        ConfigError: If the store cannot be opened.
    """
    if not is_url(attempt.target):
        if local.mirror is not None:
            begin = partial(
                start_mirror, attempt, save_id, local.mirror, host_budget_bytes=host_budget_bytes
            )
            attempt.at_end(begin)
        attempt.exchange_cells(int((told or {}).get("cell_nbytes", 0)))
        return PosixTarget(
            StagingDirectory.of(attempt.target, save_id),
            local,
            host_budget_bytes=host_budget_bytes,
            told=told,
        )
    store = access.open(attempt.target)
    attempt.at_end(store.close)
    return ObjectTarget(
        attempt.target, save_id, store, host_budget_bytes=host_budget_bytes, told=told
    )
