"""Choose where a save writes: a directory of a file system, or an object store."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.mirror_jobs import start_mirror
from dcp_hf_writer.save.object_target import ObjectTarget
from dcp_hf_writer.save.posix_target import LocalOptions, PosixTarget
from dcp_hf_writer.storage.open_store import open_store
from dcp_hf_writer.storage.store_urls import is_url, shown_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.save_target import SaveTarget


class StoreAccess:
    """How a writer reaches its stores: full URLs and options, which may hold credentials.

    It is pickled for a checkpointer process, and for nothing else. Its `repr` shows no values.
    """

    def __init__(self, storage_options: Mapping[str, Any] | None) -> None:
        """Keep the options, as fsspec takes them."""
        self.options = dict(storage_options or {})
        self._urls: dict[str, str] = {}

    def __repr__(self) -> str:
        """Show the names of the options only."""
        return f"StoreAccess({', '.join(sorted(map(str, self.options)))})"

    def note(self, path: str) -> str:
        """Return a path or URL as it is shown; remember the credentials in a URL."""
        if not is_url(path):
            return path
        shown = shown_url(path)
        self._urls[shown] = path
        return shown

    def url_of(self, shown: str) -> str:
        """Return the URL with its credentials."""
        return self._urls.get(shown, shown)


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
            StagingDirectory.of(attempt.target, save_id), local, host_budget_bytes=host_budget_bytes
        )
    store = open_store(access.url_of(attempt.target), access.options)
    attempt.at_end(store.close)
    return ObjectTarget(
        attempt.target, save_id, store, host_budget_bytes=host_budget_bytes, told=told
    )
