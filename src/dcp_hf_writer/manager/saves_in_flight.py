"""Find the saves that run in a directory, by their records and heartbeats."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.formats.names_on_disk import (
    HEARTBEATS_NAME,
    INCOMPLETE,
    MANIFEST_NAME,
    RECORD_NAME,
)
from dcp_hf_writer.save.owner_process import Owner, OwnerState, owner_state
from dcp_hf_writer.save.progress_heartbeat import MAX_HEARTBEAT_NBYTES, Heartbeat
from dcp_hf_writer.save.replace_target import read_json


@dataclass(frozen=True, slots=True)
class SaveInFlight:
    """A save whose directory is there, whether its process still lives or not."""

    save_id: str
    """Id of the save."""
    path: str
    """Its directory, or its prefix on a store."""
    target: str
    """Path or URL of the checkpoint, in the place that was listed."""
    owner: Owner | None
    """Process of the coordinator; `None` if the record does not tell."""
    heartbeats: tuple[Heartbeat, ...]
    """What its ranks told last, by rank; a rank that has told nothing is missing."""

    @property
    def state(self) -> OwnerState:
        """Whether the coordinator lives; `unknown` if it runs where this process cannot look."""
        return owner_state(self.save_id, self.owner)


@dataclass(frozen=True, slots=True)
class PublishedSave:
    """A save that is over, and whose checkpoint is visible."""

    nbytes: int
    """Size of all files but the manifest."""
    seconds: float | None
    """Duration of the save, without staging; `None` if the manifest does not tell."""
    has_export: bool
    """Whether the HuggingFace half is there."""


class LocalSaves:
    """The saves in a directory."""

    def __init__(self, root: str) -> None:
        """Touch nothing.

        Args:
            root: The directory; absolute.
        """
        self.root = root

    def in_flight(self) -> list[SaveInFlight]:
        """Return the saves that have a directory here, the oldest first.

        Raises:
            ReadError: If the directory cannot be listed.
        """
        return saves_in_flight(self.root)

    def is_there(self, save: SaveInFlight) -> bool:
        """Whether the directory of a save is still there."""
        return os.path.lexists(save.path)

    def published(self, save: SaveInFlight) -> PublishedSave | None:
        """Return what a save published; `None` if the checkpoint there is not its."""
        return find_published(save.target, save.save_id)


def saves_in_flight(root: str) -> list[SaveInFlight]:
    """Return the saves that have a directory in `root`, the oldest first.

    Raises:
        ReadError: If `root` cannot be listed.
    """
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise ReadError(
            "the directory cannot be listed",
            phase="read",
            path=root,
            found=error.strerror,
            errno=error.errno,
        ) from error
    found = (_save_in(root, name) for name in names if name.startswith(INCOMPLETE))
    return [save for save in found if save is not None]


def _save_in(root: str, name: str) -> SaveInFlight | None:
    path = os.path.join(root, name)
    record = read_json(os.path.join(path, RECORD_NAME)) or {}
    target, save_id = record.get("target"), record.get("save_id")
    if not isinstance(target, str) or save_id != name.removeprefix(INCOMPLETE):
        return None
    # Only the name counts: another host may have reached the directory by another path.
    target = os.path.join(root, os.path.basename(target))
    owner = Owner.from_json(record.get("owner"))
    return SaveInFlight(save_id, path, target, owner, _heartbeats(path, save_id))


def _heartbeats(path: str, save_id: str) -> tuple[Heartbeat, ...]:
    below = os.path.join(path, HEARTBEATS_NAME)
    try:
        names = [name for name in os.listdir(below) if name.endswith(".json")]
    except OSError:
        # There is none yet, or the save is being published at this moment.
        return ()
    found = (_heartbeat(os.path.join(below, name)) for name in names)
    mine = [one for one in found if one is not None and one.save_id == save_id]
    return tuple(sorted(mine, key=lambda one: one.rank))


def _heartbeat(path: str) -> Heartbeat | None:
    try:
        with open(path, "rb") as file:
            return Heartbeat.from_bytes(file.read(MAX_HEARTBEAT_NBYTES))
    except OSError:
        return None


_STORED = ("dcp", "hf", "digests", "other")
"""What a manifest counts that takes space on storage."""


def find_published(target: str, save_id: str) -> PublishedSave | None:
    """Return what a save published at `target`; `None` if the checkpoint there is not its."""
    manifest = read_json(os.path.join(target, MANIFEST_NAME))
    if manifest is None or manifest.get("save_id") != save_id:
        return None
    nbytes, timings = _object(manifest, "nbytes"), _object(manifest, "timings")
    total = _object(timings, "coordinator").get("total")
    return PublishedSave(
        # It also counts bytes that the halves share, and bytes that ranks sent each other.
        sum(one for one in map(nbytes.get, _STORED) if isinstance(one, int)),
        float(total) if isinstance(total, (int, float)) else None,
        manifest.get("hf") is not None,
    )


def _object(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}
