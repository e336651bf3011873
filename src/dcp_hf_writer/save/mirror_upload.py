"""Upload a committed checkpoint from its local files to a store: data first, the manifest last.

Each rank uploads a share of the files. Rank 0 takes the prefix, waits for the others, uploads what
they did not, and publishes. An object that is there already with the token and size of this save is
not sent again, so a later process goes on where a dead one stopped.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from dcp_hf_writer.errors import CheckpointError, ReadError, SaveAbortedError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, RECORD_NAME
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.save.mirror_shares import shares_of
from dcp_hf_writer.save.object_parts import PART_NBYTES, SentObject, in_flight_of, part_nbytes_of
from dcp_hf_writer.save.object_sizes import check_sizes, listed_sizes
from dcp_hf_writer.save.owner_process import Owner, mark_ended
from dcp_hf_writer.save.store_record import StoreRecord, save_id_in
from dcp_hf_writer.save.take_prefix import take_prefix, taken
from dcp_hf_writer.storage.object_retries import waits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.save.mirror_record import MirrorRecord
    from dcp_hf_writer.storage.object_contract import ObjectStore, Patience

_log = logging.getLogger(__name__)

# Parts of one object that are in memory at the same time: those on the way, those that wait, and
# the one that is read.
_PARTS_IN_MEMORY = 10
# Seconds between two looks for what other ranks upload.
_LOOK_EVERY_S = 2.0
# Rank 0 waits this long for the other ranks, in seconds, and as long again as it uploaded itself.
# Then it uploads what is missing: the other ranks may be dead.
_GRACE_S = 60.0
_CLEAN_UP_S = 10.0


@dataclass(slots=True)
class MirrorUpload:
    """One rank's part of the upload of a mirror."""

    record: MirrorRecord
    """The record beside the local checkpoint."""
    store: ObjectStore
    """The store below the URL of the mirror."""
    patience: Patience
    """Limits the upload."""
    host_budget_bytes: int
    """Memory for the parts on the way, in bytes."""
    rank: int = 0
    """This rank."""
    world_size: int = 1
    """Number of ranks that upload; a process that goes on with a dead one's mirror is alone."""
    sent_nbytes: int = 0
    """Bytes that this rank has sent."""

    def run(self) -> None:
        """Upload the share of this rank. On rank 0, the mirror is published on return.

        Raises:
            ReadError: If a local file is gone, or is not as the manifest says.
            TargetExistsError: If the prefix holds something else, or another process uploads there.
            SaveAbortedError: If another save has taken the prefix over.
            StorageError: If the store refuses.
            SaveTimeoutError: At the deadline.
        """
        data, manifest = self._local_manifest()
        if self.rank == 0:
            if save_id_in(self._stored_manifest()) == manifest.save_id:
                self._forget_record()
                return
            self._take(manifest)
        elif not self._wait_for_record(manifest):
            return
        reach("mirror begun")
        sizes = manifest.sizes()
        began = time.monotonic()
        for name in shares_of(sizes, self.world_size)[self.rank]:
            self._send(name, manifest, sizes[name])
        if self.rank == 0:
            self._wait_for_others(sizes, grace_s=_GRACE_S + time.monotonic() - began)
            for name in sorted(sizes):
                self._send(name, manifest, sizes[name])
            self._publish(data, manifest)

    def _local_manifest(self) -> tuple[bytes, Manifest]:
        path = os.path.join(self.record.target, MANIFEST_NAME)
        data = self._read_whole(path)
        manifest = parse_manifest(data, path=path)
        if manifest.save_id != self.record.save_id:
            msg = "another save has replaced the checkpoint before its mirror was complete"
            raise ReadError(msg, path=self.record.target, found=f"save {manifest.save_id}")
        return data, manifest

    def _read_whole(self, path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise _gone(path, error) from error

    def _stored_manifest(self) -> bytes | None:
        return self.store.read(
            MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, patience=self.patience
        )

    def _take(self, manifest: Manifest) -> None:
        files = tuple(sorted(manifest.sizes()))
        record = StoreRecord(
            manifest.save_id, self.store.url, Owner.me(), manifest.world_size, files
        )
        take_prefix(self.store, record, self.patience)

    def _wait_for_record(self, manifest: Manifest) -> bool:
        """Wait until rank 0 has taken the prefix; `False` if it is done, or has failed."""
        while True:
            here = self.record.read_again()
            if here is None or here.error is not None:
                return False
            found = StoreRecord.read(self.store, self.patience)
            if found is not None and found.save_id == manifest.save_id and not found.is_over:
                return True
            self._pause()

    def _pause(self) -> None:
        for _ in waits(self.patience, time.monotonic() + _LOOK_EVERY_S):
            pass

    def _wait_for_others(self, sizes: dict[str, int], *, grace_s: float) -> None:
        until = time.monotonic() + grace_s
        while self.world_size > 1 and time.monotonic() < min(until, self.patience.deadline):
            listed = listed_sizes(self.store, self.patience)
            if all(listed.get(name) == nbytes for name, nbytes in sizes.items()):
                return
            self._pause()

    def _send(self, name: str, manifest: Manifest, nbytes: int) -> None:
        """Send one file, unless it is there."""
        facts = self.store.facts_of(name, patience=self.patience)
        abilities = self.store.abilities
        # Stores without shared uploads keep no tokens.
        tokens = {manifest.save_id} if abilities.shares_uploads else {None, manifest.save_id}
        if facts is not None and facts.nbytes == nbytes and facts.token in tokens:
            return
        # The memory of a part may grow with the file: a store limits the number of parts.
        usual = min(PART_NBYTES, self.host_budget_bytes // _PARTS_IN_MEMORY)
        part_nbytes = part_nbytes_of(nbytes, abilities, usual_nbytes=usual)
        sent = SentObject(
            self.store,
            name,
            token=manifest.save_id,
            patience=self.patience,
            part_nbytes=part_nbytes,
            in_flight=in_flight_of(abilities),
        )
        try:
            self._send_into(sent, name, manifest, nbytes, part_nbytes)
            reach("mirror part sent")
            sent.finish()
        except BaseException:
            self._discard(sent)
            raise
        self.sent_nbytes += nbytes
        reach("mirror object sent")

    def _send_into(
        self, sent: SentObject, name: str, manifest: Manifest, nbytes: int, part_nbytes: int
    ) -> None:
        path, digest = os.path.join(self.record.target, name), xxhash.xxh3_64()
        whole = manifest.digest_of(name)
        for data in _parts(path, part_nbytes):
            self.patience.check()
            if whole is not None:
                digest.update(data)
            sent.write_many([memoryview(data)], sent.nbytes)
        problem = None
        if sent.nbytes != nbytes:
            problem = f"{nbytes} bytes", f"{sent.nbytes} bytes"
        elif whole is not None and digest.hexdigest() != whole:
            problem = f"the digest {whole}", str(digest.hexdigest())
        if problem:
            msg = "a local file of the checkpoint is not as its manifest says"
            hint = "verify the checkpoint; its mirror is not published"
            raise ReadError(msg, path=path, expected=problem[0], found=problem[1], hint=hint)

    def _discard(self, sent: SentObject) -> None:
        patience = replace(self.patience, deadline=time.monotonic() + _CLEAN_UP_S)
        try:
            sent.discard(patience)
        except CheckpointError as error:
            _log.warning("the upload of %s stays open (%s)", sent.key, error)

    def _publish(self, data: bytes, manifest: Manifest) -> None:
        """Check that everything is there and that the prefix is still ours; put the manifest."""
        check_sizes(self.store, manifest.sizes(), self.patience, target=self.store.url)
        found = StoreRecord.read(self.store, self.patience)
        if found is None or found.save_id != manifest.save_id:
            # Another process that went on with this mirror may have completed it.
            if save_id_in(self._stored_manifest()) == manifest.save_id:
                return
            msg = "a newer save has taken the place of the mirror over, so this one gives up"
            raise SaveAbortedError(msg, path=self.store.url, found=found and found.save_id)
        reach("before mirror manifest")
        is_new = self.store.put(
            MANIFEST_NAME,
            [memoryview(data)],
            token=manifest.save_id,
            patience=self.patience,
            if_absent=True,
        )
        if not is_new and save_id_in(self._stored_manifest()) != manifest.save_id:
            raise taken(self.store.url, "a checkpoint that appeared during the upload")
        reach("after mirror manifest")
        self._forget_record()

    def _forget_record(self) -> None:
        try:
            self.store.delete([RECORD_NAME], patience=self.patience)
        except CheckpointError as error:
            _log.warning(
                "the mirror %s is published, but its record stays: %s", self.store.url, error
            )

    def give_up(self) -> None:
        """Say in the store that this upload is over, so that any process may go on with it.

        Does nothing if the prefix is another's.
        """
        patience = replace(self.patience, deadline=time.monotonic() + _CLEAN_UP_S)
        try:
            found = StoreRecord.read(self.store, patience)
            if found is not None and found.save_id == self.record.save_id and _is_mine(found):
                replace(found, is_over=True).put(self.store, patience)
        except CheckpointError as error:
            _log.info("%s does not say that its upload ended: %s", self.store.url, error)
        finally:
            mark_ended(self.record.save_id, self.store.url)


def _is_mine(record: StoreRecord) -> bool:
    return record.owner == Owner.me()


def _parts(path: str, nbytes: int) -> Iterator[bytes]:
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(nbytes):
                yield data
    except OSError as error:
        raise _gone(path, error) from error


def _gone(path: str, error: OSError) -> ReadError:
    return ReadError(
        "a local file of the checkpoint cannot be read, so its mirror is not complete",
        path=path,
        found=error.strerror or str(error),
        errno=error.errno,
        hint="keep a checkpoint until its mirror is published",
    )
