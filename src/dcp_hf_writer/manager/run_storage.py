"""The contract of the storage of a run: a local directory, or a prefix of an object store.

`open_run` chooses the class. Every answer comes from a fresh listing; no file says which step is
the latest. Methods that change something are for the coordinator alone.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from dcp_hf_writer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.manager.quick_check import StoredFacts
    from dcp_hf_writer.manager.step_names import StepNames
    from dcp_hf_writer.save.owner_process import OwnerState


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A directory of a run that is named like a step or a snapshot."""

    step: int
    """Number of the step."""
    path: str
    """Absolute path of the directory, or its URL without credentials."""
    is_snapshot: bool
    """Whether it is the snapshot slot."""
    facts: StoredFacts | None
    """What a quick look tells; `None` if there is no whole checkpoint."""
    problem: str | None = None
    """Why there is no whole checkpoint."""


@dataclass(frozen=True, slots=True)
class StepNotes:
    """What the manager notes about a step beside its checkpoint."""

    save_id: str | None = None
    """Save that the metrics belong to; notes of another save do not count."""
    is_pinned: bool = False
    """Whether the user asked to keep the step."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step."""
    export_leaves: str | None = None
    """Directory of an export that is being deleted."""

    def to_json(self) -> dict[str, Any]:
        """Return the notes as `parse_notes` reads them."""
        return {
            "save_id": self.save_id,
            "pinned": self.is_pinned,
            "metrics": dict(self.metrics),
            "export_leaves": self.export_leaves,
        }

    def changed(
        self,
        save_id: str | None,
        *,
        is_pinned: bool | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> StepNotes:
        """Return the notes of a save with another pin or other metrics; `None` changes nothing."""
        return StepNotes(
            save_id,
            self.is_pinned if is_pinned is None else is_pinned,
            self.metrics if metrics is None else metrics,
            self.export_leaves,
        )


def parse_notes(value: Any, save_id: str | None) -> StepNotes:
    """Read notes. A pin counts for the step, metrics only for the save that they belong to.

    Args:
        value: What the file of the notes holds, as JSON.
        save_id: Save of the checkpoint beside the notes.
    """
    if not isinstance(value, dict):
        return StepNotes()
    is_pinned = value.get("pinned") is True
    if value.get("save_id") != save_id:
        return StepNotes(save_id, is_pinned)
    metrics = value.get("metrics")
    leaves = value.get("export_leaves")
    return StepNotes(
        save_id,
        is_pinned,
        {str(k): float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        if isinstance(metrics, dict)
        else {},
        leaves if isinstance(leaves, str) and "/" not in leaves and leaves[:1] != "." else None,
    )


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a save in flight, a dead save or a deletion has in a run."""

    name: str
    """Name of its directory."""
    state: OwnerState
    """Whether a process still works on it; `unknown` if it runs where this process cannot look."""
    nbytes: int
    """Size of its files."""


class Address(NamedTuple):
    """How a writer or reader reaches a checkpoint; may hold credentials, so it is never shown."""

    place: str
    """Local path, or URL."""
    storage_options: dict[str, Any] | None
    """Options of the URL, as fsspec takes them."""


class RunStorage(ABC):
    """The storage of one run. Thread-safe."""

    root: str
    """Absolute path, or URL without credentials."""
    names: StepNames
    overwrites: bool
    """Whether a save can replace a checkpoint in the step that publishes. If not, `make_way`."""

    def __init__(self, root: str, names: StepNames) -> None:
        """Keep where the run is and how its steps are named."""
        self.root, self.names = root, names
        self.lock = threading.RLock()
        """Held while notes are changed, and while what was read before is looked up."""

    def path_of(self, step: int, *, is_snapshot: bool = False) -> str:
        """Return the path of the directory of a step, as it is shown."""
        name = self.names.snapshot_name_of(step) if is_snapshot else self.names.name_of(step)
        return os.path.join(self.root, name)

    def named(self, names: list[str]) -> list[tuple[int, bool, str]]:
        """Return number, whether it is no snapshot, and name of each step, ascending."""
        found = []
        for name in names:
            step, snapshot = self.names.step_of(name), self.names.snapshot_step_of(name)
            if step is not None:
                found.append((step, True, name))
            elif snapshot is not None:
                found.append((snapshot, False, name))
        return sorted(found)

    def latest(self) -> int | None:
        """Return the newest step with a whole checkpoint; `None` if there is none."""
        whole = [one for one in self.listing(newest_only=True) if one.facts is not None]
        return whole[-1].step if whole else None

    def steps(self) -> list[int]:
        """Return the steps with a whole checkpoint, ascending."""
        return sorted({one.step for one in self.listing() if one.facts is not None})

    def candidates(self, step: int | None) -> list[StoredStep]:
        """Return what a restore may load, oldest first: all steps, or the one that is asked for."""
        return [one for one in self.listing() if step in {None, one.step}]

    def find(self, step: int) -> str:
        """Return the path of the checkpoint of a step: of the snapshot if there is no other."""
        path, snapshot = self.path_of(step), self.path_of(step, is_snapshot=True)
        return snapshot if not self.exists(path) and self.exists(snapshot) else path

    def pin(self, step: int, *, is_pinned: bool, may_write: bool) -> None:
        """Pin a step, or undo it.

        Args:
            step: The step.
            is_pinned: Whether it is pinned from now on.
            may_write: Whether this rank writes the note; the others only check the step.

        Raises:
            ConfigError: If there is no whole checkpoint of the step.
            StorageError: If the note cannot be written.
        """
        stored = self.look_at(step)
        if stored.facts is None:
            msg = "there is no checkpoint of this step to pin"
            raise ConfigError(msg, path=stored.path, found=stored.problem)
        if may_write:
            self.note(stored, is_pinned=is_pinned)

    @abstractmethod
    def address(self, path: str) -> Address:
        """Return how to reach a path of this run."""

    @abstractmethod
    def listing(self, *, newest_only: bool = False) -> list[StoredStep]:
        """Return the step directories, by step; of one step, the snapshot comes first.

        Args:
            newest_only: Stop at the newest whole checkpoint: older ones are left out.

        Raises:
            StorageError: If the storage refuses.
        """

    @abstractmethod
    def look_at(self, step: int, *, is_snapshot: bool = False) -> StoredStep:
        """Look at one step directory; it need not exist.

        Raises:
            StorageError: If a store refuses. What a local file system refuses is the `problem`.
        """

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether anything is at the path of a step."""

    @abstractmethod
    def make_way(self, step: int, *, is_snapshot: bool) -> None:
        """Delete the checkpoint of a step that a save replaces, if `overwrites` is false.

        Raises:
            TargetExistsError: If it is the only checkpoint of the run.
            StorageError: If the storage refuses.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Make the directory of the run, and check that it can be written.

        Raises:
            StorageError: If the storage refuses.
        """

    @abstractmethod
    def leave_token(self, token: str) -> None:
        """Write a small file by which other ranks see that they share this storage.

        Raises:
            StorageError: If the storage refuses.
        """

    @abstractmethod
    def has_token(self, token: str) -> bool:
        """Whether this rank sees the token that the coordinator left."""

    @abstractmethod
    def remove_token(self, token: str) -> None:
        """Remove the token again."""

    @abstractmethod
    def free_nbytes(self) -> int | None:
        """Return the bytes that this user can still write; `None` if the storage has no limit.

        Raises:
            ReadError: If the file system cannot tell.
        """

    @abstractmethod
    def remove(self, stored: StoredStep) -> bool:
        """Delete a checkpoint, so that a half-deleted one is never taken for one.

        Returns:
            Whether it is gone. If the storage refuses, a warning says why; try again later.
        """

    @abstractmethod
    def remove_export(self, stored: StoredStep) -> bool:
        """Delete the HuggingFace half of a checkpoint; the DCP half stays whole at every moment.

        A note tells what is going on, so that `finish_deletions` can end it after a crash.

        Returns:
            Whether it is gone. If the storage refuses, a warning says why; try again later.
        """

    @abstractmethod
    def finish_deletions(self) -> None:
        """End the deletions that a crash or the storage interrupted."""

    @abstractmethod
    def remove_dead_saves(self) -> None:
        """Delete what dead saves left; never anything of a save that may still run."""

    @abstractmethod
    def leftovers(self) -> list[Leftover]:
        """Return what saves in flight, dead saves and deletions have in the run, by name."""

    @abstractmethod
    def sizes_of(self, stored: StoredStep) -> dict[str, int]:
        """Return the size of every file of a step, by name."""

    @abstractmethod
    def point_latest_to(self, stored: StoredStep) -> None:
        """Let `latest` and, if there is an export, `hf-latest` name a committed checkpoint.

        They are for people and scripts; the manager never reads them.
        """

    @abstractmethod
    def notes_of(self, stored: StoredStep) -> StepNotes:
        """Return the notes about a checkpoint; empty if there are none."""

    @abstractmethod
    def write_notes(self, stored: StoredStep, notes: StepNotes) -> None:
        """Replace the notes about a checkpoint, whole or not at all.

        Raises:
            StorageError: If they cannot be written.
        """

    def note(
        self,
        stored: StoredStep,
        *,
        is_pinned: bool | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Note a pin or metrics of a checkpoint; what is not given stays as it is.

        Raises:
            StorageError: If the notes cannot be written.
        """
        with self.lock:
            save_id = None if stored.facts is None else stored.facts.save_id
            old = self.notes_of(stored)
            self.write_notes(stored, old.changed(save_id, is_pinned=is_pinned, metrics=metrics))

    def close(self) -> None:  # noqa: B027 - a directory holds nothing open
        """Give back connections; the next call connects again."""
