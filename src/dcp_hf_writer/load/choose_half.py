"""Find the half of a checkpoint that a load reads, and open it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.formats.names_on_disk import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    METADATA_NAME,
    SUFFIX,
    is_hf_directory,
)
from dcp_hf_writer.formats.parse_dcp_metadata import MAX_METADATA_NBYTES, parse_metadata
from dcp_hf_writer.load.halves_apart import check_same_save, open_half, open_other_half
from dcp_hf_writer.load.hf_directory import (
    conversion_hint,
    open_hf_directory,
    other_files_found,
)
from dcp_hf_writer.load.hf_source import HFSource
from dcp_hf_writer.load.read_manifest import manifest_of
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.wrong_paths import hint_for, wrong_path_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.input_contract import InputFiles

SourceName = Literal["auto", "dcp", "hf"]

_SUBDIR = "hf"
"""Usual directory of the export. If it holds no weights, the manifest names the directory."""


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """The files of one half of a checkpoint."""

    files: InputFiles
    """All files of the checkpoint, or of a HuggingFace directory outside any checkpoint."""
    subdir: str | None
    """Directory of the HuggingFace half within `files`.

    `""` if `files` is that directory; `None` for the DCP half.
    """
    only: str | None = None
    """Name of the one file of weights, or of the index, to read; `None` finds the files."""
    manifest: Manifest | None = None
    """The manifest of the checkpoint, if it was read."""

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
) -> CheckpointPlace:
    """Find the half of a checkpoint that a load reads.

    Args:
        path: A checkpoint, a HuggingFace directory, or a file in one.
        source: `"dcp"` or `"hf"`; `"auto"` is the DCP half if there is one, else the other half.
        storage_options: Options for fsspec, if `path` is a URL.
        with_manifest: Read the manifest, and fail if there is none.

    Raises:
        ConfigError: If `path` is not a path or a URL that fsspec supports.
        ReadError: If the HuggingFace half has no weights, if `with_manifest` finds no manifest,
            or if the storage refuses.
        CorruptCheckpointError: If the manifest is damaged.
    """
    text = plain_path(path)
    if source != "dcp" and text.endswith((SUFFIX, INDEX_SUFFIX)):
        directory, _, name = text.rpartition("/")
        return CheckpointPlace(open_directory(directory or ".", storage_options), "", name)
    files = open_half(text, storage_options)
    was_auto = source == "auto"
    if was_auto:
        source = "dcp" if files.has(METADATA_NAME) else "hf"
    manifest = manifest_of(files) if with_manifest else None
    if with_manifest and manifest is None:
        raise ReadError(
            "verify needs the digests of a manifest, and there is no manifest",
            phase="read",
            path=files.path,
            expected=MANIFEST_NAME,
            hint="pass verify=False; only checkpoints of HFDualWriter have digests",
        )
    if source == "dcp":
        return CheckpointPlace(files, None, manifest=manifest)
    with wrong_path_errors(files.path, os.fspath(path)):
        names = files.names()
    if is_hf_directory(names):
        return CheckpointPlace(files, "", manifest=manifest)
    place = CheckpointPlace(files, _SUBDIR, manifest=manifest)
    if not has_weights(place.weights):
        manifest = manifest or manifest_of(files)
        apart = _export_apart(manifest, storage_options)
        if apart is not None:
            return apart if with_manifest else replace(apart, manifest=None)
        hf = None if manifest is None else manifest.hf
        place = CheckpointPlace(files, _SUBDIR if hf is None else hf.subdir, manifest=manifest)
    if not has_weights(place.weights):
        raise _no_weights(place, names, os.fspath(path), was_auto=was_auto)
    return place


def _export_apart(
    manifest: Manifest | None, storage_options: Mapping[str, Any] | None
) -> CheckpointPlace | None:
    """Return the export that lies apart from its DCP half; `None` if the manifest names none.

    Raises:
        ReadError: If it is not there.
        CorruptCheckpointError: If its place holds another save.
    """
    if manifest is None or manifest.other_half is None or manifest.is_export_alone:
        return None
    files = open_other_half(manifest.other_half, storage_options)
    found = manifest_of(files)
    check_same_save(manifest, found, path=files.path)
    return CheckpointPlace(files, "", manifest=found)


def _no_weights(
    place: CheckpointPlace, names: Sequence[str], given: str, *, was_auto: bool
) -> ReadError:
    files, manifest = place.files, place.manifest
    hint = None if manifest is None else manifest.export_error
    if hint is None:
        hint = hint_for(files.path, given)
    if hint is None and METADATA_NAME in names:
        hint = "it has a DCP half only, which dcp.load reads"
    return ReadError(
        "there are no weights in the HuggingFace format",
        phase="read",
        path=files.path,
        expected=f"*{SUFFIX}, or a directory {place.subdir!r} with such files"
        + (f"; or {METADATA_NAME}, which DCP writes" if was_auto else ""),
        found=other_files_found(names) if names else "no file in this directory",
        hint=hint or conversion_hint(names),
    )


def has_weights(files: InputFiles) -> bool:
    """Whether a directory can be listed and holds weights in the HuggingFace format."""
    try:
        return is_hf_directory(files.names())
    except ReadError:
        return False


def read_dcp_metadata(files: InputFiles, rank: int | None = None) -> Metadata:
    """Read the metadata of the DCP half, or the metadata that `rank` saved without collectives.

    Raises:
        ReadError: If the file is missing, or cannot be read.
        CorruptCheckpointError: If the file is not valid DCP metadata.
    """
    name = METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"
    with wrong_path_errors(files.path, files.path, expected=f"a directory with {name}"):
        data = files.read_whole(name, max_nbytes=MAX_METADATA_NBYTES)
    return parse_metadata(data, path=f"{files.path}/{name}")


def open_hf_source(
    place: CheckpointPlace, specs: Mapping[str, LoadSpec], *, names: Collection[str]
) -> tuple[HFSource, OpenInputs]:
    """Open the HuggingFace half.

    Raises:
        ReadError: If it has no weights, or a file cannot be read.
        CorruptCheckpointError: If a file is damaged, or index, headers and files contradict each
            other.
        PlanningError: If it is quantised in a way that this package cannot read.
    """
    inputs = OpenInputs(place.weights)
    try:
        directory = open_hf_directory(inputs, only=place.only)
        source = HFSource(directory, specs, names=names, tied={})
        if place.only is None and any(source.missing_keys(name) for name in names):
            # The export leaves tied tensors out, and the manifest lists them. The manifest is
            # large, so read it only if a tensor is missing.
            manifest = place.manifest or manifest_of(place.files)
            if manifest is not None and manifest.hf is not None:
                source = HFSource(directory, specs, names=names, tied=manifest.hf.tied)
    except BaseException:
        inputs.close()
        raise
    return source, inputs
