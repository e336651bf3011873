"""Delete checkpoints and what dead saves left from a store, in an order that crashes survive.

A checkpoint goes in this order: a record that lists what will go, the manifest, DCP's metadata, the
rest, the record. Without its manifest, and with a record, a step is no checkpoint. So whatever a
crash leaves looks like the leftovers of a dead save, and is removed as such.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CorruptCheckpointError, TargetExistsError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, RECORD_NAME
from dcp_hf_writer.manager.run_storage import Leftover
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.save.owner_process import Owner, OwnerState, owner_state
from dcp_hf_writer.save.store_record import StoreRecord, remove_leftovers
from dcp_hf_writer.storage.object_contract import Patience

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.object_contract import ObjectStore

_log = logging.getLogger(__name__)

_DELETION_S = 600.0
"""Seconds for one deletion, all its requests together."""
_OLD = timedelta(days=1)
"""A save whose process cannot be seen from here counts as dead after this time."""

Steps = dict[str, dict[str, int]]
"""Size of every object of each step, by the name of the step and the rest of its key."""


class StoreDeletions:
    """Deletions below the root of a run. For one thread at a time."""

    def __init__(self, store: ObjectStore, root: str) -> None:
        """Delete nothing yet.

        Args:
            store: The store, at the root of the run.
            root: URL of the run without credentials.
        """
        self._store, self._root = store, root
        self._begun: set[str] = set()
        """Steps whose deletion this process began and has not ended."""

    def remove(self, name: str, sizes: Mapping[str, int]) -> None:
        """Delete the checkpoint of a step.

        Args:
            name: Name of the step's directory.
            sizes: Size of every object below it.

        Raises:
            TargetExistsError: If the manifest does not tell which objects belong to it.
            StorageError: If the store refuses.
        """
        patience = _patience()
        manifest = self._manifest(name, patience)
        if manifest is None:
            self.remove_dead({name: dict(sizes)})
            return
        record = StoreRecord(
            manifest.save_id,
            f"{self._root}/{name}",
            Owner.me(),
            manifest.world_size,
            tuple(sorted(manifest.sizes())),
            is_over=True,
        )
        self._begun.add(name)
        record.put(self._store, patience, below=f"{name}/")
        self._remove_all_of(name, record, sizes, patience)

    def _manifest(self, name: str, patience: Patience) -> Manifest | None:
        key = f"{name}/{MANIFEST_NAME}"
        data = self._store.read(key, max_nbytes=MAX_MANIFEST_NBYTES, patience=patience)
        try:
            return None if data is None else parse_manifest(data, path=f"{self._root}/{key}")
        except CorruptCheckpointError as error:
            raise TargetExistsError(
                "a step with a damaged manifest is not deleted",
                phase="plan",
                path=f"{self._root}/{name}",
                expected="a manifest that lists the objects of the checkpoint",
                found=error.problem,
                hint="delete the objects below this URL by hand",
            ) from error

    def _remove_all_of(
        self, name: str, record: StoreRecord, sizes: Mapping[str, int], patience: Patience
    ) -> None:
        remove_leftovers(self._store, record, sizes, patience, below=f"{name}/")
        self._store.delete([f"{name}/{RECORD_NAME}"], patience=patience)
        self._begun.discard(name)

    def remove_dead(self, steps: Steps) -> None:
        """Delete what dead saves and interrupted deletions left in some steps.

        Args:
            steps: The steps, by a fresh listing.

        Raises:
            StorageError: If the store refuses.
        """
        for name, sizes in steps.items():
            if RECORD_NAME not in sizes:
                continue
            patience = _patience()
            # Read it again for each: a save may have taken the step over since the listing.
            record = self._record(name, patience)
            if record is None or self._state(name, record) != "dead":
                continue
            if MANIFEST_NAME in sizes:
                # Published, or not deleted yet: only the record is left over.
                self._store.delete([f"{name}/{RECORD_NAME}"], patience=patience)
                continue
            _log.info("deleting what a dead save left in %s/%s", self._root, name)
            if self._may_send(name, record):
                remove_leftovers(self._store, record, sizes, patience, below=f"{name}/")
            else:
                self._remove_all_of(name, record, sizes, patience)

    def _may_send(self, name: str, record: StoreRecord) -> bool:
        """Whether a late rank may still send something: then the record stays."""
        state = owner_state(record.save_id, record.owner)
        is_alive = state == "alive" or record.owner == Owner.me()
        return record.world_size > 1 and is_alive and name not in self._begun

    def _record(self, name: str, patience: Patience) -> StoreRecord | None:
        return StoreRecord.read(self._store, patience, below=f"{name}/")

    def leftovers(self, steps: Steps) -> list[Leftover]:
        """Return the steps with objects of saves in flight, of dead saves, and of deletions.

        Raises:
            StorageError: If the store refuses.
        """
        found = []
        for name, sizes in sorted(steps.items()):
            if RECORD_NAME not in sizes or MANIFEST_NAME in sizes:
                continue
            record = self._record(name, _patience())
            state = "unknown" if record is None else self._state(name, record)
            nbytes = sum(sizes.values())
            found.append(Leftover(name, state, nbytes))
        return found

    def _state(self, name: str, record: StoreRecord) -> OwnerState:
        if not record.target.endswith(f"/{name}"):
            # Someone copied it here: the saves elsewhere tell nothing about this prefix.
            return "unknown"
        if record.is_over:
            return "dead"
        state = owner_state(record.save_id, record.owner)
        return "dead" if state == "unknown" and _is_old(record.save_id) else state


def _is_old(save_id: str) -> bool:
    """Whether the time in the id of a save is long ago."""
    try:
        begun = datetime.strptime(f"{save_id.partition('-')[0]}Z", "%Y%m%dT%H%M%S%z")
    except ValueError:
        return False
    return datetime.now(timezone.utc) - begun > _OLD


def _patience() -> Patience:
    return Patience(time.monotonic() + _DELETION_S)
