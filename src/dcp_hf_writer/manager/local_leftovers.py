"""What saves in flight, dead saves and deletions have in the directory of a run.

It imports no torch, so that `dcp-hf ls` starts at once.
"""

from __future__ import annotations

import json
import os
from typing import Any

from dcp_hf_writer.errors import CheckpointError, ReadError
from dcp_hf_writer.formats.names_on_disk import INCOMPLETE, RECORD_NAME
from dcp_hf_writer.manager.run_storage import Leftover
from dcp_hf_writer.manager.step_names import DELETED_PREFIX
from dcp_hf_writer.save.owner_process import Owner, OwnerState, owner_state
from dcp_hf_writer.storage.open_directory import open_directory

_MAX_NBYTES = 64 << 20


def local_leftovers(root: str) -> list[Leftover]:
    """Return the leftovers in a directory, by name.

    Raises:
        OSError: If the directory cannot be listed.
    """
    names = sorted(n for n in os.listdir(root) if n.startswith((INCOMPLETE, DELETED_PREFIX)))
    return [Leftover(name, _state(root, name), _nbytes(os.path.join(root, name))) for name in names]


def _state(root: str, name: str) -> OwnerState:
    if name.startswith(DELETED_PREFIX):
        return "dead"
    owner = Owner.from_json(_record(os.path.join(root, name)).get("owner"))
    return owner_state(name.removeprefix(INCOMPLETE), owner)


def _record(path: str) -> dict[str, Any]:
    try:
        value = json.loads(open_directory(path).read_whole(RECORD_NAME, max_nbytes=_MAX_NBYTES))
    except (CheckpointError, ValueError):
        # There is none yet, or none any more: then nobody can tell.
        return {}
    return value if isinstance(value, dict) else {}


def _nbytes(path: str) -> int:
    try:
        return sum(open_directory(path).tree().values())
    except ReadError:
        # The save was published or deleted at this moment, so nothing is left over.
        return 0
