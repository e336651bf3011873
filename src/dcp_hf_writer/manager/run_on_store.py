"""The storage of a run below a URL of an object store.

A step counts if its manifest is there. Deleting begins with the manifest, after a record that says
so; by this record, whatever a crash leaves is removed later, and nothing else.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError, ConfigError, TargetExistsError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.manager.check_run_root import check_run_root
from dcp_hf_writer.manager.quick_check import QuickCheck
from dcp_hf_writer.manager.run_storage import (
    Address,
    Leftover,
    RunStorage,
    StepNotes,
    StoredStep,
    parse_notes,
)
from dcp_hf_writer.manager.step_names import HF_LATEST, LATEST, NOTES
from dcp_hf_writer.manager.store_deletions import StoreDeletions
from dcp_hf_writer.plan.encode_manifest import without_export
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES
from dcp_hf_writer.storage.listed_objects import ListedObjects
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.open_store import open_store
from dcp_hf_writer.storage.store_urls import shown_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.manager.step_names import StepNames

_log = logging.getLogger(__name__)

_ANSWER_S = 60.0
"""Seconds for one question to the store, all its tries together."""
_MAX_NOTES_NBYTES = 1 << 20

Tree = dict[str, dict[str, int]]
"""Size of every object, by its first part and the rest of its key."""


class RunOnStore(RunStorage):
    """The prefix of one run on an object store. Thread-safe.

    Besides what `RunStorage` says, every method that asks the store raises `WriteError` if the
    store refuses, and `SaveTimeoutError` if it does not answer within a minute.
    """

    overwrites = False

    def __init__(
        self,
        url: str,
        names: StepNames,
        storage_options: Mapping[str, Any] | None = None,
        *,
        answer_s: float = _ANSWER_S,
    ) -> None:
        """Work below `url`; sends no request.

        Args:
            url: Such as `s3://bucket/run`.
            names: Names of the step directories.
            storage_options: What fsspec takes for this protocol: credentials, endpoint.
            answer_s: Seconds for one question to the store.

        Raises:
            ConfigError: If the store cannot be opened.
        """
        if "?" in url:
            raise ConfigError(
                "the URL of a run must not hold a query",
                path=shown_url(url),
                expected="scheme://place/prefix",
                hint="pass options in storage_options",
            )
        super().__init__(shown_url(url), names)
        self._url, self._options = url.rstrip("/"), dict(storage_options or {})
        self._store = open_store(self._url, self._options)
        self._answer_s = answer_s
        self._check = QuickCheck()
        self._deletions = StoreDeletions(self._store, self.root)

    def address(self, path: str) -> Address:
        """Return the URL with its credentials, and the options; see `RunStorage.address`."""
        return Address(self._url + path[len(self.root) :], self._options or None)

    def _patience(self) -> Patience:
        return Patience(time.monotonic() + self._answer_s)

    def tree(self) -> Tree:
        """Return the size of every object by a fresh listing, page after page.

        Raises:
            ConfigError: If this is the prefix of a checkpoint, and not of a run.
            StorageError: If the store refuses.
        """
        found: Tree = {}
        at_root: set[str] = set()
        for facts in self._store.objects("", patience=self._patience()):
            name, slash, within = facts.key.partition("/")
            if slash and within:
                found.setdefault(name, {})[within] = facts.nbytes
            else:
                at_root.add(name)
        check_run_root(self.root, at_root, has_steps=bool(self.named(list(found))))
        return found

    def listing(self, *, newest_only: bool = False) -> list[StoredStep]:
        """Return the steps; see `RunStorage.listing`."""
        tree = self.tree()
        found: list[StoredStep] = []
        with self.lock:
            named = self.named(list(tree))
            self._check.forget_all_but({f"{self.root}/{name}" for *_, name in named})
            for step, is_step, name in reversed(named):
                found.append(self._look(step, name, tree[name], is_snapshot=not is_step))
                if newest_only and found[-1].facts is not None:
                    break
        return found[::-1]

    def _look(
        self, step: int, name: str, sizes: Mapping[str, int], *, is_snapshot: bool
    ) -> StoredStep:
        files = ListedObjects(self._store, self._patience, below=name)
        facts = self._check.run_in(files, sizes)
        path = f"{self.root}/{name}"
        if isinstance(facts, str):
            return StoredStep(step, path, is_snapshot, None, facts)
        return StoredStep(step, path, is_snapshot, facts)

    def look_at(self, step: int, *, is_snapshot: bool = False) -> StoredStep:
        """Look at one step; see `RunStorage.look_at`."""
        path = self.path_of(step, is_snapshot=is_snapshot)
        name = _name_of(path)
        sizes = self._sizes(name)
        if not sizes:
            return StoredStep(step, path, is_snapshot, None, "there is nothing below this URL")
        with self.lock:
            return self._look(step, name, sizes, is_snapshot=is_snapshot)

    def _sizes(self, name: str) -> dict[str, int]:
        below = f"{name}/"
        listed = self._store.objects(below, patience=self._patience())
        return {one.key[len(below) :]: one.nbytes for one in listed if one.key != below}

    def sizes_of(self, stored: StoredStep) -> dict[str, int]:
        """Return the size of every object of a step; see `RunStorage.sizes_of`."""
        return self._sizes(_name_of(stored.path))

    def exists(self, path: str) -> bool:
        """Whether anything is there; see `RunStorage.exists`."""
        return bool(self._sizes(_name_of(path)))

    def make_way(self, step: int, *, is_snapshot: bool) -> None:
        """Delete what a save replaces; see `RunStorage.make_way`.

        What has no manifest is left to the save: it takes over a dead save, and refuses the rest.
        """
        stored = self.look_at(step, is_snapshot=is_snapshot)
        name = _name_of(stored.path)
        sizes = self._sizes(name)
        if MANIFEST_NAME not in sizes:
            return
        if stored.facts is not None and not any(
            one.facts is not None and one.path != stored.path for one in self.listing()
        ):
            raise TargetExistsError(
                "the only checkpoint of the run is not deleted to make way for another",
                phase="plan",
                path=stored.path,
                expected="another whole checkpoint in the run",
                found="none",
                hint="save under another step, or in another run",
            )
        self._deletions.remove(name, sizes)

    def prepare(self) -> None:
        """Check that the store can be written, read, listed and deleted from."""
        key, token = f"{NOTES}/probe-{uuid.uuid4().hex}", uuid.uuid4().hex
        self._put(key, token.encode(), token=token)
        found = self._store.read(key, max_nbytes=_MAX_NOTES_NBYTES, patience=self._patience())
        listed = [one.key for one in self._store.objects(key, patience=self._patience())]
        self._store.delete([key], patience=self._patience())
        if found != token.encode() or listed != [key]:
            raise CheckpointError(
                "the store does not show what was just written to it",
                phase="plan",
                path=f"{self.root}/{key}",
                expected=f"an object of {len(token)} bytes, also in a listing",
                found=f"{'other bytes' if found else 'no object'}; listed: {listed}",
                hint="use a store with strong consistency, without a cache in front of it",
            )
        if not self._store.abilities.creates_if_absent:
            _log.info(
                "%s cannot refuse to replace an object, so two jobs that save to one step at the "
                "same moment are not noticed",
                self.root,
            )

    def leave_token(self, token: str) -> None:
        """Put a small object; see `RunStorage.leave_token`."""
        self._put(_token_key(token), b"{}", token=token)

    def has_token(self, token: str) -> bool:
        """Whether this rank sees the token; see `RunStorage.has_token`."""
        return self._store.facts_of(_token_key(token), patience=self._patience()) is not None

    def remove_token(self, token: str) -> None:
        """Delete the token; see `RunStorage.remove_token`."""
        try:
            self._store.delete([_token_key(token)], patience=self._patience())
        except CheckpointError as error:
            _log.warning("could not delete %s/%s: %s", self.root, _token_key(token), error)

    def free_nbytes(self) -> None:
        """Return `None`: stores have no limit that one could ask for."""

    def remove(self, stored: StoredStep) -> bool:
        """Delete a checkpoint, its manifest first; see `RunStorage.remove`."""
        name = _name_of(stored.path)
        try:
            self._deletions.remove(name, self._sizes(name))
            self._store.delete([_notes_key(stored)], patience=self._patience())
        except CheckpointError as error:
            _log.warning("could not delete %s (%s); the next save tries again", stored.path, error)
            return False
        return True

    def remove_export(self, stored: StoredStep) -> bool:
        """Replace the manifest, then delete the export; see `RunStorage.remove_export`."""
        facts = stored.facts
        if facts is None or not facts.export_subdir or facts.needs_export:
            return False
        try:
            with self.lock:
                notes = self.notes_of(stored)
                leaving = StepNotes(
                    facts.save_id, notes.is_pinned, notes.metrics, facts.export_subdir
                )
                self.write_notes(stored, leaving)
            self._take_away_export(stored, leaving)
        except CheckpointError as error:
            _log.warning("could not delete the export of %s: %s", stored.path, error)
            return False
        return True

    def _take_away_export(self, stored: StoredStep, notes: StepNotes) -> None:
        name, subdir = _name_of(stored.path), notes.export_leaves
        key = f"{name}/{MANIFEST_NAME}"
        data = self._store.read(key, max_nbytes=MAX_MANIFEST_NBYTES, patience=self._patience())
        if data is not None and without_export(data) != data:
            self._put(key, without_export(data), token=notes.save_id or "")
        gone = [f"{name}/{one}" for one in self._sizes(name) if one.startswith(f"{subdir}/")]
        if gone:
            self._store.delete(gone, patience=self._patience())
        with self.lock:
            pinned, metrics = notes.is_pinned, notes.metrics
            self.write_notes(stored, StepNotes(notes.save_id, pinned, metrics))

    def finish_deletions(self) -> None:
        """End deletions, and delete what dead saves left; see `RunStorage.finish_deletions`."""
        tree = self.tree()
        steps = {name: tree[name] for *_, name in self.named(list(tree))}
        self._deletions.remove_dead(steps)
        noted = tree.get(NOTES, {})
        for step, is_step, name in self.named(list(tree)):
            # Of few steps there are notes, so few are looked at.
            if f"{name}.json" in noted:
                self._finish_export(self.look_at(step, is_snapshot=not is_step))

    def _finish_export(self, stored: StoredStep) -> None:
        notes, facts = self.notes_of(stored), stored.facts
        if notes.export_leaves is None or facts is None or facts.save_id != notes.save_id:
            return
        self._take_away_export(stored, notes)

    def remove_dead_saves(self) -> None:
        """Do nothing: `finish_deletions` does it; see `RunStorage.remove_dead_saves`."""

    def leftovers(self) -> list[Leftover]:
        """Return what saves and deletions have here; see `RunStorage.leftovers`."""
        tree = self.tree()
        return self._deletions.leftovers({n: tree[n] for *_, n in self.named(list(tree))})

    def point_latest_to(self, stored: StoredStep) -> None:
        """Put small JSON objects; see `RunStorage.point_latest_to`."""
        self._point(LATEST, stored, _name_of(stored.path))
        if stored.facts is not None and stored.facts.export_subdir is not None:
            path = f"{_name_of(stored.path)}/{stored.facts.export_subdir}"
            self._point(HF_LATEST, stored, path)

    def _point(self, key: str, stored: StoredStep, path: str) -> None:
        save_id = None if stored.facts is None else stored.facts.save_id
        value = {"step": stored.step, "path": path, "save_id": save_id}
        try:
            found = self._store.read(key, max_nbytes=_MAX_NOTES_NBYTES, patience=self._patience())
            if found is not None and not _is_pointer(found):
                _log.warning("%s/%s is another's object, so it is not replaced", self.root, key)
                return
            self._put(key, json.dumps(value).encode(), token=save_id or "")
        except CheckpointError as error:
            _log.warning("could not make %s/%s name %s: %s", self.root, key, path, error)

    def notes_of(self, stored: StoredStep) -> StepNotes:
        """Return the notes about a step; see `RunStorage.notes_of`."""
        data = self._store.read(
            _notes_key(stored), max_nbytes=_MAX_NOTES_NBYTES, patience=self._patience()
        )
        if data is None:
            return StepNotes()
        try:
            value = json.loads(data)
        except ValueError as error:
            _log.warning("the notes about %s cannot be read: %s", stored.path, error)
            return StepNotes()
        return parse_notes(value, None if stored.facts is None else stored.facts.save_id)

    def write_notes(self, stored: StoredStep, notes: StepNotes) -> None:
        """Replace the notes; see `RunStorage.write_notes`."""
        data = json.dumps(notes.to_json()).encode()
        self._put(_notes_key(stored), data, token=notes.save_id or "")

    def _put(self, key: str, data: bytes, *, token: str) -> None:
        self._store.put(key, [memoryview(data)], token=token, patience=self._patience())

    def close(self) -> None:
        """Close the connections; the next call connects again."""
        self._store.close()


def _name_of(path: str) -> str:
    return path.rpartition("/")[2]


def _notes_key(stored: StoredStep) -> str:
    return f"{NOTES}/{_name_of(stored.path)}.json"


def _token_key(token: str) -> str:
    return f"{NOTES}/token-{token}"


def _is_pointer(data: bytes) -> bool:
    """Whether an object is a pointer that a manager has put."""
    try:
        value = json.loads(data)
    except ValueError:
        return False
    return isinstance(value, dict) and {"step", "path", "save_id"} <= value.keys()
