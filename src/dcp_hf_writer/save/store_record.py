"""The record of a save in the prefix of an object store that it writes to.

It names the process that saves, and every key that the save may make. By it, the next save to the
same prefix removes what a dead save left, and nothing else.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import TargetExistsError
from dcp_hf_writer.formats.names_on_disk import (
    DIGESTS_DIRECTORY,
    MANIFEST_NAME,
    METADATA_NAME,
    RECORD_NAME,
    digests_file_name,
    rank_of_dcp_file,
    rank_of_heartbeat,
)
from dcp_hf_writer.save.owner_process import Owner, is_abandoned

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcp_hf_writer.storage.object_contract import ObjectStore, Patience

_log = logging.getLogger(__name__)

_MAX_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """What the record of a save says."""

    save_id: str
    target: str
    """URL of the checkpoint, without credentials."""
    owner: Owner
    """The coordinator's process."""
    world_size: int
    """Number of ranks, each of which makes one DCP file."""
    files: tuple[str, ...]
    """Keys of the export."""
    is_over: bool = False
    """Whether the save has failed; a rank may still have sent something afterwards."""

    def encode(self) -> bytes:
        """Return the record as JSON."""
        fields = {
            "save_id": self.save_id,
            "target": self.target,
            "owner": self.owner.to_json(),
            "world_size": self.world_size,
            "files": list(self.files),
            "is_over": self.is_over,
        }
        return json.dumps(fields).encode()

    @classmethod
    def parse(cls, data: bytes) -> StoreRecord | None:
        """Return the record in some bytes; `None` if they hold something else."""
        value = object_in(data)
        if value is None:
            return None
        owner = Owner.from_json(value.get("owner"))
        save_id, target = value.get("save_id"), value.get("target")
        files, size, is_over = (value.get(name) for name in ("files", "world_size", "is_over"))
        if (
            owner is None
            or not isinstance(save_id, str)
            or not isinstance(target, str)
            or not isinstance(files, list)
            or not all(isinstance(name, str) for name in files)
            or not isinstance(size, int)
            or not isinstance(is_over, bool)
        ):
            return None
        return cls(save_id, target, owner, size, tuple(files), is_over)

    @classmethod
    def read(cls, store: ObjectStore, patience: Patience, *, below: str = "") -> StoreRecord | None:
        """Return the record in a store; `None` if there is none, or it is not readable.

        Args:
            store: The store.
            patience: Limits the request.
            below: Prefix of the checkpoint within the store; empty, or ends with `/`.

        Raises:
            StorageError: If the store refuses.
        """
        key = f"{below}{RECORD_NAME}"
        data = store.read(key, max_nbytes=_MAX_NBYTES, patience=patience)
        return None if data is None else cls.parse(data)

    def put(
        self,
        store: ObjectStore,
        patience: Patience,
        *,
        below: str = "",
        if_absent: bool = False,
    ) -> bool:
        """Put the record into a store.

        Args:
            store: The store.
            patience: Limits the request.
            below: Prefix of the checkpoint within the store; empty, or ends with `/`.
            if_absent: Leave a record alone that is there already, if the store can do so.

        Returns:
            As `ObjectStore.put`.

        Raises:
            StorageError: If the store refuses.
        """
        return store.put(
            f"{below}{RECORD_NAME}",
            [memoryview(self.encode())],
            token=self.save_id,
            patience=patience,
            if_absent=if_absent,
        )

    def makes(self, key: str) -> bool:
        """Whether the save may make an object of this key, its record excepted."""
        rank = rank_of_dcp_file(key)
        rank = rank_of_heartbeat(key) if rank is None else rank
        if rank is not None:
            return rank < self.world_size
        if key.startswith(f"{DIGESTS_DIRECTORY}/"):
            return any(key == digests_file_name(rank) for rank in range(self.world_size))
        return key in (METADATA_NAME, MANIFEST_NAME) or key in self.files

    def check_takeover(self) -> None:
        """Check that no process works on this save any more.

        An owner that cannot be seen from here counts as dead: a run that was restarted on another
        host must be able to save, and two saves to one target at a time are not supported.

        Raises:
            TargetExistsError: If its process is alive and saving.
        """
        if self.is_over or is_abandoned(self.save_id, self.owner) is True:
            return
        who = f"process {self.owner.pid} on {self.owner.host}"
        if is_abandoned(self.save_id, self.owner) is None:
            _log.warning(
                "%s holds an unfinished save of %s, which cannot be seen from here; it counts as "
                "dead, and gives up if it is not",
                self.target,
                who,
            )
            return
        msg = "another save is writing to this target"
        raise TargetExistsError(
            msg,
            phase="plan",
            path=self.target,
            found=f"save {self.save_id} of {who}, which is running",
            hint="wait for it, or save under another name",
        )


def remove_leftovers(
    store: ObjectStore,
    record: StoreRecord,
    existing: Iterable[str],
    patience: Patience,
    *,
    below: str = "",
) -> None:
    """Abort the uploads and delete the objects of a save that was not published.

    A crash on the way leaves no checkpoint: the manifest goes first, then DCP's metadata.

    Args:
        store: The store.
        record: Record of the save.
        existing: Keys of all objects there, without `below`.
        patience: Limits the requests.
        below: Prefix of the checkpoint within the store; empty, or ends with `/`.

    Raises:
        StorageError: If the store refuses.
    """
    abort_uploads(store, record, patience, below=below)
    keys = sorted(filter(record.makes, existing))
    # Each in a request of its own: one request may delete its keys in any order.
    for first in (MANIFEST_NAME, METADATA_NAME):
        if first in keys:
            keys.remove(first)
            store.delete([f"{below}{first}"], patience=patience)
    if keys:
        store.delete([f"{below}{key}" for key in keys], patience=patience)


def abort_uploads(
    store: ObjectStore, record: StoreRecord, patience: Patience, *, below: str = ""
) -> None:
    """Abort the open uploads of a save; the arguments are those of `remove_leftovers`.

    Raises:
        StorageError: If the store refuses.
    """
    for upload in store.uploads(below, patience=patience):
        if record.makes(upload.key[len(below) :]):
            store.abort(upload, patience=patience)


def save_id_in(manifest: bytes | None) -> str | None:
    """Return the id of the save that a manifest names; `None` without one."""
    value = None if manifest is None else object_in(manifest)
    found = None if value is None else value.get("save_id")
    return found if isinstance(found, str) else None


def object_in(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object in some bytes; `None` if they hold something else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
