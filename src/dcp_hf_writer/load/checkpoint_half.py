"""Which half of a checkpoint a load reads, and what it says is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.formats.names_on_disk import INDEX_SUFFIX, MANIFEST_NAME, METADATA_NAME, SUFFIX
from dcp_hf_writer.formats.parse_dcp_metadata import MAX_METADATA_NBYTES, parse_metadata
from dcp_hf_writer.load.hf_directory import is_hf_directory, open_hf_directory
from dcp_hf_writer.load.hf_source import HFSource
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.plan.parse_manifest import Manifest
    from dcp_hf_writer.storage.input_contract import InputFiles

SourceName = Literal["auto", "dcp", "hf"]

_SUBDIR = "hf"
"""Where the export is when there is no manifest to say so."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of one half are."""

    files: InputFiles
    """Those of the checkpoint, or of a HuggingFace directory alone."""
    subdir: str | None
    """Where the HuggingFace half is within them; `None` for the DCP half, "" for all of it."""
    only: str | None = None
    """The one file of weights, or the index, that was asked for."""
    manifest: Manifest | None = None
    """What the checkpoint says of itself, if that was read."""

    @property
    def weights(self) -> InputFiles:
        """The files of the HuggingFace half."""
        return self.files.below(self.subdir) if self.subdir else self.files


def find_place(
    path: str | os.PathLike[str],
    source: SourceName,
    storage_options: Mapping[str, Any] | None,
    *,
    with_manifest: bool,
) -> Place:
    """Find the half to read.

    Args:
        path: A checkpoint, a HuggingFace directory, or a file in one.
        source: `"dcp"`, `"hf"`; `"auto"` is the DCP half where there is one, else the other.
        storage_options: Options of a store that fsspec knows.
        with_manifest: Whether the manifest is needed.

    Raises:
        ReadError: If there is nothing to read, or no manifest although it is needed.
        CorruptCheckpointError: If the manifest is damaged.
    """
    text = os.fspath(path)
    if source != "dcp" and isinstance(text, str) and text.endswith((SUFFIX, INDEX_SUFFIX)):
        directory, _, name = text.rpartition("/")
        return Place(open_directory(directory or ".", storage_options), "", name)
    files = open_directory(path, storage_options)
    was_auto = source == "auto"
    if was_auto:
        source = "dcp" if files.has(METADATA_NAME) else "hf"
    manifest = manifest_of(files) if with_manifest else None
    if with_manifest and manifest is None:
        raise ReadError(
            "there are no digests to verify what is read",
            phase="read",
            path=files.path,
            expected=MANIFEST_NAME,
            hint="load with verify=False; only checkpoints of HFDualWriter have digests",
        )
    if source == "dcp":
        return Place(files, None, manifest=manifest)
    names = files.names()
    if is_hf_directory(names):
        return Place(files, "", manifest=manifest)
    place = Place(files, _SUBDIR, manifest=manifest)
    if not _is_there(place.weights):
        manifest = manifest or manifest_of(files)
        if manifest is not None and manifest.hf is not None:
            place = Place(files, manifest.hf.subdir, manifest=manifest)
    if not _is_there(place.weights):
        raise ReadError(
            "there are no weights in the HuggingFace format here",
            phase="read",
            path=files.path,
            expected=f"*{SUFFIX}, or a directory {place.subdir!r} with them"
            + (f"; or {METADATA_NAME} of DCP" if was_auto else ""),
            found=f"{len(names)} other files" if names else "an empty directory",
            hint=None if manifest is None else manifest.export_error,
        )
    return place


def _is_there(files: InputFiles) -> bool:
    try:
        return is_hf_directory(files.names())
    except ReadError:
        return False


def manifest_of(files: InputFiles) -> Manifest | None:
    """Read what a checkpoint says of itself; `None` if it is not one of ours.

    Raises:
        CorruptCheckpointError: If it is damaged.
    """
    if not files.has(MANIFEST_NAME):
        return None
    data = files.read_whole(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
    return parse_manifest(data, path=f"{files.path}/{MANIFEST_NAME}")


def read_dcp_metadata(files: InputFiles, rank: int | None = None) -> Metadata:
    """Read the metadata of the DCP half, or what one rank wrote without collectives.

    Raises:
        ReadError: If it is not there.
        CorruptCheckpointError: If it is none.
    """
    name = METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"
    data = files.read_whole(name, max_nbytes=MAX_METADATA_NBYTES)
    return parse_metadata(data, path=f"{files.path}/{name}")


def open_hf_source(
    place: Place, specs: Mapping[str, LoadSpec], *, names: Collection[str]
) -> tuple[HFSource, OpenInputs]:
    """Open the HuggingFace half.

    Raises:
        ReadError: If it has no weights, or they cannot be read.
        CorruptCheckpointError: If index, headers and files contradict each other.
        PlanningError: If it is quantised in a way that is not known.
    """
    inputs = OpenInputs(place.weights)
    try:
        directory = open_hf_directory(inputs, only=place.only)
        source = HFSource(directory, specs, names=names, tied={})
        if place.subdir and any(source.missing_keys(name) for name in names):
            # What the export left out because it is tied: the manifest knows, and is large.
            manifest = place.manifest or manifest_of(place.files)
            if manifest is not None and manifest.hf is not None:
                source = HFSource(directory, specs, names=names, tied=manifest.hf.tied)
    except BaseException:
        inputs.close()
        raise
    return source, inputs
