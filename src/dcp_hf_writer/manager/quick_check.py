"""Tell quickly whether a directory holds a whole checkpoint: its manifest, and the size of files.

This is the check behind `latest` and `steps`. It reads no tensor data; `verify` does. It imports
torch only for a checkpoint without a manifest, so that `dcp-hf ls` starts at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import xxhash

from dcp_hf_writer.errors import CheckpointError, SaveTimeoutError, WriteError
from dcp_hf_writer.formats.names_on_disk import (
    MANIFEST_NAME,
    METADATA_NAME,
    RECORD_NAME,
    is_hf_directory,
)
from dcp_hf_writer.load.read_manifest import manifest_of
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.plan.encode_manifest import WholeFile
    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.input_contract import InputFiles

StoredKind = Literal["manifest", "dcp", "parts", "hf"]
"""Who wrote it: this package; DCP alone; DCP into several subdirectories; nobody but an export."""

PART_NAMES = ("model", "optimizer", "weights", "model_optim", "lr_scheduler", "dataloader")
"""Subdirectories into which other trainers save parts of the state by DCP."""


@dataclass(frozen=True, slots=True)
class StoredFacts:
    """What a quick look at a whole checkpoint tells."""

    kind: StoredKind
    """Who wrote it."""
    save_id: str | None = None
    """Id of the save, if this package wrote it."""
    world_size: int | None = None
    """Number of ranks that saved it, if this package wrote it."""
    export_subdir: str | None = None
    """Directory of the HuggingFace half; `None` without one."""
    needs_export: bool = False
    """Whether the DCP half stores weights only in the HuggingFace half."""
    nbytes: int = 0
    """Size of all files, in bytes."""
    other_half: str | None = None
    """Place of the other half, if the halves lie apart; an export alone has the kind `"hf"`."""
    parts: tuple[str, ...] = ()
    """Subdirectories with a DCP checkpoint each, if `kind` is `"parts"`."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """What a manifest says; kept, because a manifest may be large and never changes in place."""

    facts: StoredFacts
    sizes: Mapping[str, int]


_Stamp = tuple[int, int, int] | str
"""Tells whether a manifest was replaced: inode, time and size, or the digest of its bytes."""


class QuickCheck:
    """Checks directories, and remembers the manifests that it has read. One thread at a time."""

    def __init__(self) -> None:
        """Remember nothing."""
        self._known: dict[str, tuple[_Stamp, _Listed]] = {}

    def run(self, path: str) -> StoredFacts | str:
        """Look at a directory.

        Returns:
            The facts, or why the directory holds no whole checkpoint.
        """
        files = open_directory(path)
        try:
            return self.run_in(files, files.tree())
        except CheckpointError as error:
            return str(error)

    def run_in(self, files: InputFiles, sizes: Mapping[str, int]) -> StoredFacts | str:
        """Look at a directory whose files are known.

        Args:
            files: The directory.
            sizes: Size of every file in it and below it, by name.

        Returns:
            As `run`.

        Raises:
            WriteError: If an object store refuses, which tells nothing about the checkpoint.
            SaveTimeoutError: If an object store does not answer.
        """
        try:
            if MANIFEST_NAME in sizes:
                return self._by_manifest(files, sizes)
            return _without_manifest(files, sizes)
        except (WriteError, SaveTimeoutError):
            raise
        except CheckpointError as error:
            return str(error)

    def forget_all_but(self, paths: set[str]) -> None:
        """Drop what is known of directories that are gone."""
        self._known = {path: known for path, known in self._known.items() if path in paths}

    def _by_manifest(self, files: InputFiles, sizes: Mapping[str, int]) -> StoredFacts | str:
        listed = self._listed(files)
        if isinstance(listed, str):
            return listed
        for name, nbytes in listed.sizes.items():
            found = sizes.get(name)
            if found != nbytes:
                state = "is missing" if found is None else f"has {found} bytes"
                return f"{name} {state}; the manifest lists {nbytes} bytes"
        return listed.facts

    def _listed(self, files: InputFiles) -> _Listed | str:
        data = None
        stamp: _Stamp
        if is_url(files.path):
            # A store tells no stamp in a listing. DCP's metadata, which is larger, is read once.
            data = files.read_whole(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
            stamp = xxhash.xxh3_64_hexdigest(data)
        else:
            try:
                stat = os.stat(os.path.join(files.path, MANIFEST_NAME))
            except OSError as error:
                return f"{MANIFEST_NAME}: {error.strerror}"
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        known = self._known.get(files.path)
        if known is not None and known[0] == stamp:
            return known[1]
        manifest = manifest_of(files) if data is None else _parsed(files, data)
        listed = f"{MANIFEST_NAME} is gone" if manifest is None else _listed_in(files, manifest)
        if not isinstance(listed, str):
            self._known[files.path] = (stamp, listed)
        return listed


def _parsed(files: InputFiles, data: bytes) -> Manifest:
    return parse_manifest(data, path=f"{files.path}/{MANIFEST_NAME}")


def _listed_in(files: InputFiles, manifest: Manifest) -> _Listed | str:
    sizes = manifest.sizes()
    metadata = manifest.files.get(METADATA_NAME)
    problem = None if metadata is None else _other_bytes(files, metadata)
    if problem is not None:
        return problem
    other = manifest.other_half
    facts = StoredFacts(
        "hf" if manifest.is_export_alone else "manifest",
        manifest.save_id,
        manifest.world_size,
        None if manifest.hf is None else manifest.hf.subdir,
        bool(manifest.once),
        sum(sizes.values()),
        None if other is None else other.path,
    )
    return _Listed(facts, sizes)


def _other_bytes(files: InputFiles, listed: WholeFile) -> str | None:
    """Say how a small file differs from what the manifest lists; `None` if it does not."""
    with files.open(listed.name) as file:
        if file.nbytes != listed.nbytes:
            return (
                f"{listed.name} has {file.nbytes} bytes; the manifest lists {listed.nbytes} bytes"
            )
        found = xxhash.xxh3_64_hexdigest(file.read(0, file.nbytes))
    if found != listed.digest:
        return f"{listed.name} has the digest {found}; the manifest lists {listed.digest}"
    return None


def _without_manifest(files: InputFiles, sizes: Mapping[str, int]) -> StoredFacts | str:
    nbytes = sum(sizes.values())
    if RECORD_NAME in sizes:
        # On a store, a save has the name of its target from the start.
        return f"there is no {MANIFEST_NAME}, but the record of a save that did not publish it"
    if METADATA_NAME in sizes:
        problem = _dcp_problem(files, sizes)
        return problem or StoredFacts("dcp", nbytes=nbytes)
    parts = tuple(name for name in PART_NAMES if f"{name}/{METADATA_NAME}" in sizes)
    for part in parts:
        below = f"{part}/"
        inside = {n[len(below) :]: size for n, size in sizes.items() if n.startswith(below)}
        problem = _dcp_problem(files.below(part), inside)
        if problem is not None:
            return f"{part}: {problem}"
    if parts:
        return StoredFacts("parts", nbytes=nbytes, parts=parts)
    for subdir in ("", "hf"):
        below = f"{subdir}/" if subdir else ""
        names = [n[len(below) :] for n in sizes if n.startswith(below)]
        if is_hf_directory([name for name in names if "/" not in name]):
            return StoredFacts("hf", export_subdir=subdir, nbytes=nbytes)
    return f"there is neither {MANIFEST_NAME} nor {METADATA_NAME}: no save was committed here"


def _dcp_problem(files: InputFiles, sizes: Mapping[str, int]) -> str | None:
    # Not at the top: both import torch, which takes seconds.
    from dcp_hf_writer.check.check_dcp import dcp_problems  # noqa: PLC0415
    from dcp_hf_writer.load.choose_half import read_dcp_metadata  # noqa: PLC0415

    # torch writes the metadata last, so it is the commit of a checkpoint without a manifest.
    problem = next(dcp_problems(read_dcp_metadata(files), sizes), None)
    return None if problem is None else str(problem)
