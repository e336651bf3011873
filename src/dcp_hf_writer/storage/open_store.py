"""The one place that chooses the backend for saves to an object store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.storage.fsspec_store import FsspecStore
from dcp_hf_writer.storage.store_urls import check_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.storage.object_contract import ObjectStore


def open_store(url: str, storage_options: Mapping[str, Any] | None = None) -> ObjectStore:
    """Open the store below a URL; nothing needs to be there yet.

    Choose a new backend for one URL scheme here, before the one for every file system of fsspec.

    Args:
        url: URL of the prefix that the objects go below.
        storage_options: Options of the URL, as fsspec takes them.

    Raises:
        ConfigError: If no backend takes this URL, or a package for it is missing.
    """
    check_scheme(url)
    return FsspecStore(url, storage_options)
