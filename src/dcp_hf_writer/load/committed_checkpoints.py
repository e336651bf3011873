"""Find the checkpoints of a run on an object store, by a fresh listing."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.open_store import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.storage.object_contract import ObjectStore

_log = logging.getLogger(__name__)


def committed_checkpoints(
    url: str, storage_options: Mapping[str, Any] | None = None, *, timeout_s: float = 300
) -> list[str]:
    """Return the names of the whole checkpoints directly below the URL of a run.

    A checkpoint is a prefix whose manifest can be read, and whose files have the listed sizes. A
    damaged one is left out, with a warning.

    Args:
        url: URL of the run, such as `s3://bucket/run`.
        storage_options: Options of the URL, as fsspec takes them.
        timeout_s: Limit for all requests, in seconds.

    Returns:
        Names such as `step-100`, sorted by length, then by text: `step-9` before `step-10`.

    Raises:
        ConfigError: If no backend takes this URL.
        WriteError: If the store refuses a request.
        SaveTimeoutError: If it does not answer in time.
    """
    patience = Patience(time.monotonic() + timeout_s)
    with closing(open_store(url, storage_options)) as store:
        files: dict[str, dict[str, int]] = {}
        for facts in store.objects("", patience=patience):
            name, _, inner = facts.key.partition("/")
            files.setdefault(name, {})[inner] = facts.nbytes
        found = [name for name, sizes in files.items() if _is_whole(store, name, sizes, patience)]
    return sorted(found, key=lambda name: (len(name), name))


def _is_whole(store: ObjectStore, name: str, sizes: Mapping[str, int], patience: Patience) -> bool:
    if MANIFEST_NAME not in sizes:
        return False
    key = f"{name}/{MANIFEST_NAME}"
    data = store.read(key, max_nbytes=MAX_MANIFEST_NBYTES, patience=patience)
    if data is None:
        return False
    try:
        listed = parse_manifest(data, path=f"{store.url}/{key}").sizes()
    except CorruptCheckpointError as error:
        _log.warning("%s/%s is left out: %s", store.url, name, error)
        return False
    wrong = sorted(file for file, nbytes in listed.items() if sizes.get(file) != nbytes)
    if wrong:
        _log.warning("%s/%s is left out: %s is not as listed", store.url, name, wrong[0])
    return not wrong
