"""A save to an object store: data first, the manifest last.

Objects have their final names from the start, because stores do not rename. Only a prefix with a
manifest is a checkpoint. Until then, a record in the prefix says whose save it is.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import (
    CheckpointError,
    CommitError,
    CoverageError,
    NodeLocalPathError,
    SaveAbortedError,
    SaveTimeoutError,
    StorageError,
)
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.names_on_disk import (
    HEARTBEATS_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    RECORD_NAME,
    heartbeat_key,
    path_in_export,
    rank_of_heartbeat,
)
from dcp_hf_writer.plan.coverage import check_coverage
from dcp_hf_writer.plan.encode_manifest import WholeFile
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES
from dcp_hf_writer.save import coordinator
from dcp_hf_writer.save.attempt import LONGEST_CLEAN_UP_S
from dcp_hf_writer.save.dcp_half import metadata_writer
from dcp_hf_writer.save.export_cells import ExportUpload
from dcp_hf_writer.save.export_failures import export_error, nbytes_of
from dcp_hf_writer.save.object_parts import PART_NBYTES, part_nbytes_of
from dcp_hf_writer.save.object_sizes import check_sizes
from dcp_hf_writer.save.object_write_phase import ObjectWritePhase
from dcp_hf_writer.save.owner_process import Owner, mark_ended
from dcp_hf_writer.save.progress_heartbeat import STORE_PACE, Pace
from dcp_hf_writer.save.save_target import SaveTarget
from dcp_hf_writer.save.store_record import StoreRecord, remove_leftovers, save_id_in
from dcp_hf_writer.save.take_prefix import take_prefix, taken
from dcp_hf_writer.save.tensor_bytes import digest_of
from dcp_hf_writer.save.write_strategy import CELLS_IN_BUDGET
from dcp_hf_writer.storage.object_contract import Abilities, Patience
from dcp_hf_writer.torch_seam.metadata_in_memory import metadata_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.storage import WriteResult

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.plan.layout import Layout
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_assets import Assets
    from dcp_hf_writer.save.save_target import Publication, RankWrites
    from dcp_hf_writer.storage.object_contract import ObjectStore, SentPart

_log = logging.getLogger(__name__)

# Seconds for one look.
_LOOK_S = 5.0


class ObjectTarget(SaveTarget):
    """A prefix of an object store."""

    def __init__(
        self,
        target: str,
        save_id: str,
        store: ObjectStore,
        *,
        host_budget_bytes: int,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the target on one rank; sends no request.

        Args:
            target: URL of the checkpoint, without credentials.
            save_id: Id of the save.
            store: The store below the URL.
            host_budget_bytes: Memory that a rank may use in addition to the staged copy.
            told: What the coordinator told; `None` on the coordinator.
        """
        self.target, self.save_id = target, save_id
        self.store = store
        """The store below the URL."""
        self._host_budget_bytes = host_budget_bytes
        self._files = tuple(ExportUpload(*one) for one in (told or {}).get("files", ()))
        self._told_abilities = (told or {}).get("abilities")
        self._headers: dict[int, bytes] = {}
        self._late_files: dict[str, bytes] = {}
        """Small objects that are put when all data is there, by key."""
        self._record: StoreRecord | None = None
        """The record of this save, from the moment it is in the store until it is removed."""
        self._made_at = 0.0

    def _patience(self, attempt: Attempt) -> Patience:
        """Return the limits of the requests of the save here."""
        return attempt.patience()

    def _clean_up_patience(self) -> Patience:
        """Return the limits of the requests that remove what a failed save made."""
        return Patience(time.monotonic() + LONGEST_CLEAN_UP_S)

    def _abilities(self) -> Abilities:
        # A store may have to write something to find out: one rank does, and tells the others.
        told = self._told_abilities
        return self.store.abilities if told is None else Abilities(**told)

    @property
    def path(self) -> str:
        """The URL: objects have their final names from the start."""
        return self.target

    @property
    def pace(self) -> Pace:
        """Seldom: each heartbeat is a request."""
        return STORE_PACE

    def heartbeat_of(self, rank: int) -> Callable[[bytes], None]:
        """Return what puts a small object; see `SaveTarget.heartbeat_of`."""
        key = heartbeat_key(rank)

        def put(data: bytes) -> None:
            patience = Patience(time.monotonic() + STORE_PACE.end_s)
            self.store.put(key, [memoryview(data)], token=self.save_id, patience=patience)

        return put

    def _remove_heartbeats(self, attempt: Attempt, patience: Patience) -> None:
        """Remove the heartbeats of all ranks, which have ended theirs."""
        attempt.end_heartbeats()
        if time.monotonic() - self._made_at < STORE_PACE.first_s:
            return
        listed = self.store.objects(f"{HEARTBEATS_NAME}/", patience=patience)
        keys = [facts.key for facts in listed if rank_of_heartbeat(facts.key) is not None]
        if keys:
            self.store.delete(keys, patience=patience)

    def make(self, attempt: Attempt, *, overwrite: bool, new_files: Collection[str]) -> None:
        """Put the record, after a look at what is there; see `SaveTarget.make`."""
        del overwrite  # refused when the writer is made
        patience, store = self._patience(attempt), self.store
        record = StoreRecord(
            self.save_id,
            self.target,
            Owner.me(),
            attempt.member.world_size,
            tuple(sorted(new_files)),
        )
        take_prefix(store, record, patience)
        self._record, self._made_at = record, time.monotonic()
        self.register(attempt)
        reach("directory made")

    def make_export(
        self, plan: GlobalPlan, assets: Assets | None, attempt: Attempt, *, subdir: str
    ) -> bool:
        """Begin the uploads and put the assets; see `SaveTarget.make_export`."""
        if plan.layout is None or assets is None:
            return True
        try:
            self._begin_export(plan.layout, assets, attempt, subdir)
        except (SaveAbortedError, SaveTimeoutError):
            raise
        except StorageError as error:
            nbytes = nbytes_of(plan.layout) + sum(map(len, assets.files.values()))
            path = f"{self.target}/{subdir}"
            self.drop_export(subdir, attempt)
            attempt.leave_out_export(
                export_error(error, rank=attempt.rank, path=path, nbytes=nbytes)
            )
            return False
        return True

    def _begin_export(self, layout: Layout, assets: Assets, attempt: Attempt, subdir: str) -> None:
        store, patience, abilities = self.store, self._patience(attempt), self._abilities()
        usual = min(PART_NBYTES, self._host_budget_bytes // CELLS_IN_BUDGET)
        for number, file in enumerate(layout.files):
            key = path_in_export(subdir, file.name)
            upload_id = ""
            if abilities.shares_uploads:
                upload = store.begin_upload(key, token=self.save_id, patience=patience)
                upload_id = upload.upload_id
            nbytes = part_nbytes_of(file.nbytes, abilities, usual_nbytes=usual)
            self._files += (ExportUpload(key, file.nbytes, nbytes, upload_id),)
            self._headers[number] = file.header
        self._log_strategy()
        if layout.index is not None:
            self._late_files[path_in_export(subdir, INDEX_NAME)] = layout.index
        coordinator.warn_without_config(assets.files)
        reach("headers written")
        for name, data in assets.files.items():
            attempt.add_whole_files(self._put(path_in_export(subdir, name), data, patience))

    def _log_strategy(self) -> None:
        is_shared = self._abilities().shares_uploads
        _log.info(
            "%s: %s; write slots and shared disk blocks do not apply to a store",
            self.target,
            "all ranks send parts of each file of the export, because the store lets them share an "
            "upload"
            if is_shared
            else "one rank sends each file of the export, because only the process that began an "
            "object of this store can complete it",
        )

    def _put(self, key: str, data: bytes, patience: Patience) -> WholeFile:
        self.store.put(key, [memoryview(data)], token=self.save_id, patience=patience)
        return WholeFile(key, len(data), digest_of(data))

    def told(self) -> Mapping[str, Any]:
        """Return the uploads; see `SaveTarget.told`."""
        return {
            "abilities": asdict(self._abilities()),
            "files": [
                (file.key, file.nbytes, file.part_nbytes, file.upload_id) for file in self._files
            ],
        }

    def check_visible(self, attempt: Attempt) -> None:
        """Read the record; see `SaveTarget.check_visible`."""
        found = StoreRecord.read(self.store, self._patience(attempt))
        if found is None or found.save_id != self.save_id:
            msg = "this rank does not see the store that the coordinator writes to"
            raise NodeLocalPathError(
                msg,
                rank=attempt.rank,
                phase="write",
                path=self.target,
                expected=f"the record of save {self.save_id}",
                found="no record" if found is None else "the record of another save",
                hint="all ranks must reach one store; memory:// exists in one process only",
            )

    def write(self, attempt: Attempt, writes: RankWrites) -> list[WriteResult]:
        """Send this rank's objects and parts; see `SaveTarget.write`."""
        return ObjectWritePhase(
            attempt=attempt,
            store=self.store,
            abilities=self._abilities(),
            url=self.target,
            save_id=self.save_id,
            files=self._files,
            headers=self._headers,
            writes=writes,
            patience=self._patience(attempt),
        ).run()

    def drop_export(self, subdir: str, attempt: Attempt) -> None:
        """Abort the uploads and delete the objects of the export; see `SaveTarget.drop_export`."""
        patience, store = self._patience(attempt), self.store
        self._headers, self._late_files = {}, {}
        files, self._files = self._files, ()
        try:
            for upload in [file.upload(self.save_id) for file in files if file.upload_id]:
                store.abort(upload, patience=patience)
            listed = store.objects(f"{subdir}/", patience=patience)
            ours = [facts.key for facts in listed if self._makes(facts.key)]
            if ours:
                store.delete(ours, patience=patience)
        except StorageError as error:
            msg = "the failed export could not be removed, so nothing was published"
            path = f"{self.target}/{subdir}"
            raise CommitError(msg, phase="finish", path=path, found=error.found) from error

    def _makes(self, key: str) -> bool:
        return self._record is not None and self._record.makes(key)

    def add_checksums(self, export: HFExport, attempt: Attempt, *, subdir: str) -> None:
        """Do nothing: a writer to a store refuses an export that asks for checksums."""
        del export, attempt, subdir

    def finish_dcp(
        self,
        metadata: Metadata,
        results: list[list[WriteResult]],
        attempt: Attempt,
        *,
        save_id: str,
    ) -> None:
        """Make `.metadata` in memory; `publish` puts it. See `SaveTarget.finish_dcp`."""
        writer = metadata_writer(self.target, self.target, rank=attempt.rank, save_id=save_id)
        self._late_files[METADATA_NAME] = metadata_bytes(writer, metadata, results)

    def publish(self, attempt: Attempt, what: Publication) -> None:
        """Complete the export, then put the index, `.metadata`, and the manifest."""
        patience = self._patience(attempt)
        if what.half != "hf":
            self._remove_heartbeats(attempt, patience)
        reach("before manifest")
        if what.layout is not None:
            check_coverage(what.layout, what.reports)
            self._complete(what.reports, patience)
        whole = list(what.whole_files(attempt))
        # In the order in which they were added: the index, then `.metadata`.
        whole += [self._put(key, data, patience) for key, data in self._late_files.items()]
        self._check_sizes(what, whole, patience)
        manifest = coordinator.manifest_of(
            attempt, what, whole, save_id=self.save_id, target=self.target
        )
        self._check_record(attempt, patience)
        if what.half == "hf":
            # The record stays until the DCP half is committed too.
            attempt.check()
            self._put_manifest(manifest, patience)
            return
        reach("before rename")
        with attempt.committing():
            self._put_manifest(manifest, patience)
            reach("after rename")
        self._forget_record(attempt.last_patience())

    def _put_manifest(self, manifest: bytes, patience: Patience) -> None:
        is_new = self.store.put(
            MANIFEST_NAME,
            [memoryview(manifest)],
            token=self.save_id,
            patience=patience,
            if_absent=True,
        )
        if not is_new:
            raise taken(self.target, "a checkpoint that appeared during the save")

    def _complete(self, reports: Sequence[RankReport], patience: Patience) -> None:
        """Complete the shared uploads; the owners of the others have done so."""
        sent: dict[str, list[SentPart]] = {}
        for report in reports:
            for key, parts in report.parts.items():
                sent.setdefault(key, []).extend(parts)
        for file in self._files:
            own = sorted(sent.get(file.key, ()), key=lambda part: part.number)
            expected = -(-file.nbytes // file.part_nbytes)
            if [part.number for part in own] != list(range(1, expected + 1)):
                raise CoverageError(
                    "the ranks did not send each part of an object once",
                    phase="finish",
                    path=f"{self.target}/{file.key}",
                    expected=f"parts 1 to {expected}",
                    found=f"{len(own)} parts",
                )
            if file.upload_id:
                self.store.complete(file.upload(self.save_id), own, patience=patience)

    def _check_sizes(
        self, what: Publication, whole: Sequence[WholeFile], patience: Patience
    ) -> None:
        """Check by a fresh listing that every object has the planned or reported size.

        Raises:
            CoverageError: If an object does not; the error names it.
        """
        sizes = {file.name: file.nbytes for report in what.reports for file in report.dcp_files}
        sizes |= {r.digests.name: r.digests.nbytes for r in what.reports if r.digests is not None}
        sizes |= {file.name: file.nbytes for file in whole}
        for output in () if what.layout is None else what.layout.files:
            sizes[path_in_export(what.subdir, output.name)] = output.nbytes
        check_sizes(self.store, sizes, patience, target=self.target, phase="finish")

    def _check_record(self, attempt: Attempt, patience: Patience) -> None:
        """Check that no newer save has taken the prefix over.

        Raises:
            SaveAbortedError: If one has; it deletes what this one wrote.
        """
        found = StoreRecord.read(self.store, patience)
        if found is None or found.save_id != self.save_id:
            # What is there now belongs to the newer save.
            self._record = None
            msg = "a newer save has taken the target over, so this one gives up"
            raise SaveAbortedError(
                msg,
                rank=attempt.rank,
                phase="commit",
                path=self.target,
                found="no record of a save" if found is None else f"save {found.save_id}",
                hint="do not run two jobs that save to one path",
            )

    def _forget_record(self, patience: Patience) -> None:
        self._record = None
        mark_ended(self.save_id, self.store.url)
        try:
            self.store.delete([RECORD_NAME], patience=patience)
        except CheckpointError as error:
            _log.warning("%s is committed, but its record stays: %s", self.target, error)

    def is_committed(self) -> bool:
        """Whether the manifest there is this save's; see `SaveTarget.is_committed`."""
        patience = Patience(time.monotonic() + _LOOK_S)
        data = self.store.read(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, patience=patience)
        return save_id_in(data) == self.save_id

    def remove(self) -> None:
        """Abort and delete what this save made; see `SaveTarget.remove`.

        If other ranks took part, the record stays and says that the save is over: a late rank may
        still send something, and the next save removes that by the record.
        """
        record, self._record = self._record, None
        if record is None:
            return
        mark_ended(self.save_id, self.store.url)
        patience = self._clean_up_patience()
        try:
            if self.is_committed():
                self._forget_record(patience)
                return
            found = StoreRecord.read(self.store, patience)
            if found is None or found.save_id != self.save_id:
                return
            existing = [facts.key for facts in self.store.objects("", patience=patience)]
            remove_leftovers(self.store, record, existing, patience)
            if record.world_size == 1:
                self.store.delete([RECORD_NAME], patience=patience)
            else:
                replace(record, is_over=True).put(self.store, patience)
        except CheckpointError as error:
            _log.warning(
                "could not remove what the save left in %s (%s); the next save there tries again",
                self.target,
                error,
            )
