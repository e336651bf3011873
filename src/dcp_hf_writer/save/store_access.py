"""How a writer reaches its object stores: full URLs and options, which may hold credentials."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.open_store import open_store
from dcp_hf_writer.storage.store_urls import is_url, shown_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.object_contract import ObjectStore

# Seconds for one look.
_LOOK_S = 10.0


class StoreAccess:
    """How a writer reaches its stores: full URLs and options, which may hold credentials.

    It is pickled for a checkpointer process, and for nothing else. Its `repr` shows no values.
    """

    def __init__(self, storage_options: Mapping[str, Any] | None) -> None:
        """Keep the options, as fsspec takes them."""
        self.options = dict(storage_options or {})
        self.of_export: StoreAccess | None = None
        """How to reach the export, if it lies apart from the DCP half."""
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

    def open(self, path: str) -> ObjectStore:
        """Open the store below a URL; sends no request.

        Args:
            path: The URL, with or without its credentials.

        Raises:
            ConfigError: If the store cannot be opened.
        """
        return open_store(self.url_of(path), self.options)

    def manifest_of(self, path: str) -> Manifest:
        """Read the manifest of a checkpoint on a store.

        Args:
            path: URL of the checkpoint.

        Raises:
            StorageError: If the store refuses.
            SaveTimeoutError: If it does not answer for a while.
            CorruptCheckpointError: If there is no manifest, or it is damaged.
        """
        store = self.open(path)
        try:
            patience = Patience(time.monotonic() + _LOOK_S)
            data = store.read(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, patience=patience)
        finally:
            store.close()
        return parse_manifest(data or b"", path=f"{path}/{MANIFEST_NAME}")
