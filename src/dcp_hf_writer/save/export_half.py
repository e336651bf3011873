"""The export as a place of its own, apart from the DCP half: a directory, or a prefix of a store.

It is published before the DCP half, with a manifest that names the place of the DCP half. Without a
DCP half of the same save there, it is an orphan: the next save to that place replaces it.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.save.object_target import ObjectTarget
from dcp_hf_writer.save.owner_process import Owner
from dcp_hf_writer.save.posix_target import PosixTarget
from dcp_hf_writer.save.replace_target import discard, read_json, saved_id
from dcp_hf_writer.save.store_record import StoreRecord, object_in, remove_leftovers
from dcp_hf_writer.save.target_contents import has_files_of_others, own_files
from dcp_hf_writer.storage.posix_outputs import sync_directory

if TYPE_CHECKING:
    from collections.abc import Collection

    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.save_target import Publication
    from dcp_hf_writer.storage.object_contract import Patience

_log = logging.getLogger(__name__)

# Part of the time of a save that an export on a store may not use.
_LEFT_FOR_DCP = 0.25
_LEAST_CLEAN_UP_S = 1.0


def orphan_of(fields: dict[str, Any] | None, *, dcp: str, place: str) -> StoreRecord | None:
    """Return the record of a published export whose DCP half was never published.

    The caller has taken the place of the DCP half, so there is no checkpoint in it.

    Args:
        fields: The manifest in the place of the export, as JSON; `None` without one.
        dcp: Place of the DCP half.
        place: Place of the export.

    Returns:
        The record, which lists no files yet; `None` if there is no manifest, or it belongs to
        another checkpoint.

    Raises:
        TargetExistsError: If the process that published it is alive and saving.
    """
    if fields is None or fields.get("other_half") != {"holds": "dcp", "path": dcp}:
        return None
    owner, save_id = Owner.from_json(fields.get("owner")), fields.get("save_id")
    if owner is None or not isinstance(save_id, str):
        return None
    record = StoreRecord(save_id, place, owner, 0, ())
    record.check_takeover()
    _log.info("%s: replacing the export of save %s, which ended early", place, record.save_id)
    return record


class ExportDirectory(PosixTarget):
    """An export in a directory of its own."""

    dcp = ""
    """Place of the DCP half."""
    replaces = False
    """Whether it replaces an orphan."""

    def make(self, attempt: Attempt, *, overwrite: bool, new_files: Collection[str]) -> None:
        """Make the directory; an orphan in its place will be replaced."""
        manifest = read_json(os.path.join(self.target, MANIFEST_NAME))
        self.replaces = orphan_of(manifest, dcp=self.dcp, place=self.target) is not None
        super().make(attempt, overwrite=overwrite or self.replaces, new_files=new_files)

    def publish(self, attempt: Attempt, what: Publication) -> None:
        """Publish the directory; see `SaveTarget.publish`."""
        super().publish(attempt, replace(what, overwrite=self.replaces))

    def settle(self, attempt: Attempt) -> None:
        """Do nothing: the DCP half is committed, and nothing else says that the save runs."""
        del attempt

    def remove(self) -> None:
        """Remove the export, even if it is published; the DCP half is not."""
        if saved_id(self.target) == self.save_id:
            self._withdraw()
        super().remove()

    def _withdraw(self) -> None:
        try:
            if has_files_of_others(self.target, own_files(self.target)):
                _log.warning("%s stays without a DCP half: it has files of others", self.target)
                return
            os.rename(self.target, self.directory.path)
            sync_directory(os.path.dirname(self.target))
            discard(self.directory.path)
        except OSError as error:
            _log.warning("%s stays without a DCP half: %s", self.target, error)


class ExportPrefix(ObjectTarget):
    """An export in a prefix of its own."""

    dcp = ""
    """Place of the DCP half."""

    _deadline = 0.0

    def _patience(self, attempt: Attempt) -> Patience:
        """Leave time to publish the DCP half if this store does not answer."""
        whole, context = attempt.patience(), attempt.context
        total_s = context.deadline - context.began
        return replace(whole, deadline=whole.deadline - _LEFT_FOR_DCP * total_s)

    def _clean_up_patience(self) -> Patience:
        """Leave time to tell the other ranks how the save ended."""
        now, usual = time.monotonic(), super()._clean_up_patience()
        mine = now + max((self._deadline - now) / 2, _LEAST_CLEAN_UP_S)
        return replace(usual, deadline=min(mine, usual.deadline))

    def make(self, attempt: Attempt, *, overwrite: bool, new_files: Collection[str]) -> None:
        """Remove an orphan, then take the prefix."""
        self._deadline = attempt.context.deadline
        self._remove_orphan(self._patience(attempt))
        super().make(attempt, overwrite=overwrite, new_files=new_files)

    def _remove_orphan(self, patience: Patience) -> None:
        data = self.store.read(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, patience=patience)
        fields = None if data is None else object_in(data)
        record = orphan_of(fields, dcp=self.dcp, place=self.target)
        if record is None or data is None:
            return
        path = f"{self.target}/{MANIFEST_NAME}"
        files = tuple(parse_manifest(data, path=path).sizes())
        record = replace(record, files=files)
        remove_leftovers(self.store, record, [*files, MANIFEST_NAME], patience)

    def settle(self, attempt: Attempt) -> None:
        """Remove the record: the DCP half is committed."""
        self._forget_record(attempt.last_patience())

    def is_committed(self) -> bool:
        """Whether the export is to stay if the DCP half is not committed: never."""
        return False
