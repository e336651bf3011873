"""Choose where a save writes: a directory of a file system, or an object store."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.export_half import ExportDirectory, ExportPrefix
from dcp_hf_writer.save.halves_apart import HalvesApart
from dcp_hf_writer.save.mirror_jobs import start_mirror
from dcp_hf_writer.save.object_target import ObjectTarget
from dcp_hf_writer.save.posix_target import LocalOptions, PosixTarget
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_place import ExportPlace
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
    export_at: ExportPlace | None = None,
) -> SaveTarget:
    """Return where a save writes.

    Args:
        attempt: The save.
        save_id: Id of the save.
        access: How to reach stores.
        local: Options of saves to a file system.
        told: What the coordinator told; `None` on the coordinator.
        host_budget_bytes: Memory that a rank may use in addition to the staged copy.
        export_at: Where the export goes, if the halves lie apart.

    Raises:
        ConfigError: If the store cannot be opened.
    """
    if export_at is not None:
        dcp = choose_target(
            attempt,
            save_id,
            access,
            local,
            None if told is None else told["dcp"],
            host_budget_bytes=host_budget_bytes,
        )
        told_export = None if told is None else told["hf"]
        export = _export_half(
            attempt, save_id, export_at, local, told_export, host_budget_bytes=host_budget_bytes
        )
        return HalvesApart(dcp, export, told)
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


def _export_half(
    attempt: Attempt,
    save_id: str,
    place: ExportPlace,
    local: LocalOptions,
    told: Mapping[str, Any] | None,
    *,
    host_budget_bytes: int,
) -> ExportDirectory | ExportPrefix:
    if is_url(place.path):
        store = place.access.open(place.path)
        attempt.at_end(store.close)
        return ExportPrefix(
            place.path, save_id, store, host_budget_bytes=host_budget_bytes, told=told
        )
    attempt.exchange_cells(int((told or {}).get("cell_nbytes", 0)))
    return ExportDirectory(
        StagingDirectory.of(place.path, save_id),
        replace(local, dcp_writer=None, mirror=None),
        host_budget_bytes=host_budget_bytes,
    )
