"""How a save, or the upload of a mirror, takes a prefix of an object store for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import TargetExistsError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME, RECORD_NAME
from dcp_hf_writer.save.owner_process import mark_active, mark_ended
from dcp_hf_writer.save.store_record import StoreRecord, abort_uploads, remove_leftovers

if TYPE_CHECKING:
    from collections.abc import Collection

    from dcp_hf_writer.storage.object_contract import ObjectStore, Patience


def take_prefix(store: ObjectStore, record: StoreRecord, patience: Patience) -> None:
    """Put the record of a save, after a look at what is there.

    Removes what a dead save left there. Of a dead process that worked on this same save, it removes
    the open uploads only: whole objects stay. Counts the save as active in this process.

    Args:
        store: The store below the prefix.
        record: The record to put.
        patience: Limits the requests.

    Raises:
        TargetExistsError: If the prefix holds a checkpoint, a running save, or an object of others
            with a key that this save needs.
        StorageError: If the store refuses.
    """
    existing = {facts.key for facts in store.objects("", patience=patience)}
    earlier = StoreRecord.read(store, patience) if RECORD_NAME in existing else None
    _check_free(existing, earlier, record)
    mark_active(record.save_id, store.url)
    try:
        if earlier is not None and earlier.save_id == record.save_id:
            abort_uploads(store, earlier, patience)
        elif earlier is not None:
            remove_leftovers(store, earlier, existing, patience)
        _put_record(store, record, patience, is_first=earlier is None)
    except BaseException:
        mark_ended(record.save_id, store.url)
        raise


def _put_record(
    store: ObjectStore, record: StoreRecord, patience: Patience, *, is_first: bool
) -> None:
    if not record.put(store, patience, if_absent=is_first):
        raise taken(record.target, "another save began at the same moment")


def _check_free(existing: Collection[str], earlier: StoreRecord | None, new: StoreRecord) -> None:
    if MANIFEST_NAME in existing:
        raise taken(new.target, "a checkpoint")
    if earlier is not None:
        earlier.check_takeover()
    needed = {key for key in existing if new.makes(key)}
    if RECORD_NAME in existing and earlier is None:
        needed.add(RECORD_NAME)
    others = sorted(key for key in needed if earlier is None or not earlier.makes(key))
    if METADATA_NAME in others:
        raise taken(new.target, "a checkpoint of another writer")
    if others:
        raise TargetExistsError(
            "the target holds an object with a key that the checkpoint needs",
            phase="plan",
            path=f"{new.target}/{others[0]}",
            expected="a free key",
            found="an object that no unfinished save of this package lists",
            hint="it is not replaced: move it away, or save under another name",
        )


def taken(target: str, found: str) -> TargetExistsError:
    """Return the error for a prefix that a save may not take."""
    return TargetExistsError(
        "the target of the save already exists",
        phase="plan",
        path=target,
        expected="a free prefix, or one without a checkpoint",
        found=found,
        hint="save under another name; a checkpoint on a store is not overwritten",
    )
