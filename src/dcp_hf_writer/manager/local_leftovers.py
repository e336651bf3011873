"""What saves in flight, dead saves and deletions have in the directory of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dcp_hf_writer.formats.names_on_disk import INCOMPLETE, RECORD_NAME
from dcp_hf_writer.manager.run_storage import Leftover
from dcp_hf_writer.manager.step_names import DELETED_PREFIX
from dcp_hf_writer.save.owner_process import Owner, is_abandoned
from dcp_hf_writer.save.replace_target import read_json
from dcp_hf_writer.storage.open_directory import open_directory

if TYPE_CHECKING:
    from typing import Literal


def local_leftovers(root: str) -> list[Leftover]:
    """Return the leftovers in a directory, by name.

    Raises:
        OSError: If the directory cannot be listed.
    """
    names = sorted(n for n in os.listdir(root) if n.startswith((INCOMPLETE, DELETED_PREFIX)))
    return [Leftover(name, _state(root, name), _nbytes(os.path.join(root, name))) for name in names]


def _state(root: str, name: str) -> Literal["dead", "alive", "unknown"]:
    if name.startswith(DELETED_PREFIX):
        return "dead"
    record = read_json(os.path.join(root, name, RECORD_NAME)) or {}
    owner = Owner.from_json(record.get("owner"))
    if owner is None:
        return "unknown"
    abandoned = is_abandoned(name.removeprefix(INCOMPLETE), owner)
    return "unknown" if abandoned is None else "dead" if abandoned else "alive"


def _nbytes(path: str) -> int:
    return sum(open_directory(path).tree().values()) if os.path.isdir(path) else 0
