"""The record of an unfinished mirror: a small file beside the local checkpoint.

The coordinator writes it before the commit, so no crash can lose a mirror. It goes when the mirror
is published. The next process finds by it what is left to do. It holds no credentials.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from dcp_hf_writer.formats.names_on_disk import MIRROR
from dcp_hf_writer.save.owner_process import Owner, is_abandoned
from dcp_hf_writer.save.replace_target import read_json, saved_id
from dcp_hf_writer.storage.posix_outputs import (
    number_and_text,
    replace_durably,
)

_log = logging.getLogger(__name__)

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class MirrorRecord:
    """What the record says."""

    save_id: str
    """Id of the save."""
    target: str
    """Absolute path of the local checkpoint."""
    url: str
    """URL of the mirror, without credentials."""
    owner: Owner
    """The process that uploads, or will."""
    error: str | None = None
    """Why the last upload failed; `None` while one runs, or before it."""

    @property
    def path(self) -> str:
        """The file."""
        return os.path.join(os.path.dirname(self.target), f"{MIRROR}{self.save_id}{_SUFFIX}")

    def write(self) -> None:
        """Write or replace the file in one step; durable on return.

        Raises:
            WriteError: If the file system refuses.
        """
        data = json.dumps(asdict(self)).encode()
        replace_durably(self.path, data, draft=f"{self.path}.{os.getpid()}.new")

    def remove(self) -> None:
        """Remove the file; a failure is logged. The next process then finds the mirror complete."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("could not remove %s (%s)", self.path, number_and_text(error))

    def is_committed(self) -> bool:
        """Whether the local checkpoint is the one of this save."""
        return saved_id(self.target) == self.save_id

    def has_dead_owner(self) -> bool | None:
        """Whether the process that uploads is gone; `None` if this process cannot tell."""
        return is_abandoned(self.save_id, self.owner)

    def read_again(self) -> MirrorRecord | None:
        """Return what the file says now; `None` without a file."""
        return _parsed(self.path)

    def mine(self) -> MirrorRecord:
        """Return the record with this process as owner, and without an error."""
        return replace(self, owner=Owner.me(), error=None)


def mirror_records(parent: str) -> list[MirrorRecord]:
    """Return the records of the unfinished mirrors of the checkpoints in a directory.

    Files that hold something else are left alone. Sorted by the id of the save, so by time.

    Raises:
        OSError: If the directory cannot be listed.
    """
    names = sorted(n for n in os.listdir(parent) if n.startswith(MIRROR) and n.endswith(_SUFFIX))
    found = (_parsed(os.path.join(parent, name)) for name in names)
    return [one for one in found if one is not None]


def _parsed(path: str) -> MirrorRecord | None:
    value: dict[str, Any] | None = read_json(path)
    if value is None:
        return None
    owner = Owner.from_json(value.get("owner"))
    save_id, target, url, error = (value.get(k) for k in ("save_id", "target", "url", "error"))
    is_text = all(isinstance(one, str) for one in (save_id, target, url))
    if owner is None or not is_text or not isinstance(error, (str, type(None))):
        return None
    # Where the file lies now: the run may have been moved.
    place = os.path.join(os.path.dirname(path), os.path.basename(str(target)))
    record = MirrorRecord(str(save_id), place, str(url), owner, error)
    return record if record.path == path else None
