"""Find the saves that run below a URL, by their records and heartbeats. Reads only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, RECORD_NAME, rank_of_heartbeat
from dcp_hf_writer.manager.saves_in_flight import PublishedSave, SaveInFlight
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.save.progress_heartbeat import MAX_HEARTBEAT_NBYTES, Heartbeat
from dcp_hf_writer.save.store_record import StoreRecord
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.open_store import open_store
from dcp_hf_writer.storage.store_urls import shown_url

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# Seconds for one look, all its requests together.
_LOOK_S = 60.0


class SavesOnStore:
    """The saves below a URL."""

    def __init__(self, root: str, storage_options: Mapping[str, object] | None = None) -> None:
        """Send no request.

        Args:
            root: URL of a run.
            storage_options: As fsspec takes them.

        Raises:
            ConfigError: If the store cannot be opened.
        """
        self.root = shown_url(root)
        self._store = open_store(root, storage_options)

    def in_flight(self) -> list[SaveInFlight]:
        """Return the saves that have a record and no manifest, the oldest first.

        Raises:
            StorageError: If the store refuses.
            SaveTimeoutError: If it does not answer.
        """
        patience = Patience(time.monotonic() + _LOOK_S)
        keys = {facts.key for facts in self._store.objects("", patience=patience)}
        # The URL may be that of a run, or of one checkpoint that is being made.
        places = (key[: -len(RECORD_NAME)] for key in keys if f"/{key}".endswith(f"/{RECORD_NAME}"))
        found = [
            self._save_in(below, keys, patience)
            for below in places
            if f"{below}{MANIFEST_NAME}" not in keys
        ]
        return sorted((one for one in found if one is not None), key=lambda one: one.save_id)

    def _save_in(
        self, below: str, keys: Collection[str], patience: Patience
    ) -> SaveInFlight | None:
        record = StoreRecord.read(self._store, patience, below=below)
        if record is None or record.is_over:
            return None
        path = f"{self.root}/{below}".rstrip("/")
        names = [key for key in keys if key.startswith(below)]
        beats = [
            self._heartbeat(name, patience)
            for name in sorted(names)
            if rank_of_heartbeat(name[len(below) :]) is not None
        ]
        mine = tuple(one for one in beats if one is not None and one.save_id == record.save_id)
        return SaveInFlight(record.save_id, path, path, record.owner, mine)

    def _heartbeat(self, key: str, patience: Patience) -> Heartbeat | None:
        data = self._store.read(key, max_nbytes=MAX_HEARTBEAT_NBYTES, patience=patience)
        return None if data is None else Heartbeat.from_bytes(data)

    def is_there(self, save: SaveInFlight) -> bool:
        """Whether the record of a save is still there.

        Raises:
            StorageError: If the store refuses.
        """
        patience = Patience(time.monotonic() + _LOOK_S)
        record = StoreRecord.read(self._store, patience, below=self._below(save.path))
        return record is not None and record.save_id == save.save_id and not record.is_over

    def published(self, save: SaveInFlight) -> PublishedSave | None:
        """Return what a save published; `None` if the checkpoint there is not its.

        Raises:
            StorageError: If the store refuses.
        """
        patience = Patience(time.monotonic() + _LOOK_S)
        key = f"{self._below(save.target)}{MANIFEST_NAME}"
        data = self._store.read(key, max_nbytes=MAX_MANIFEST_NBYTES, patience=patience)
        try:
            found = None if data is None else parse_manifest(data, path=f"{self.root}/{key}")
        except CorruptCheckpointError:
            return None
        if found is None or found.save_id != save.save_id:
            return None
        return PublishedSave(
            sum(found.sizes().values()), found.seconds.get("total"), found.hf is not None
        )

    def _below(self, path: str) -> str:
        part = path[len(self.root) :].strip("/")
        return f"{part}/" if part else ""
