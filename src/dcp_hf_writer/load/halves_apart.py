"""The half of a checkpoint that lies in another place, which the manifest names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CorruptCheckpointError, ReadError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.load.read_manifest import manifest_of
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from dcp_hf_writer.plan.encode_manifest import OtherHalf
    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.input_contract import InputFiles


def open_other_half(other: OtherHalf, storage_options: Mapping[str, Any] | None) -> InputFiles:
    """Open the place of the other half; reads nothing.

    Args:
        other: The half, as a manifest names it.
        storage_options: Options for fsspec, if it is on a store.

    Raises:
        ConfigError: If fsspec does not support the protocol.
    """
    return open_directory(other.path, storage_options if is_url(other.path) else None)


def open_half(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None
) -> InputFiles:
    """Open the place of a checkpoint, or of the half that lies there.

    Args:
        path: A local path, or an fsspec URL.
        storage_options: Options for fsspec. With a local path, they are those of its other half.

    Raises:
        ConfigError: If the path cannot be used as given, or if a local path comes with options and
            has no other half on a store.
        ReadError: If such a path has a manifest that cannot be read.
        CorruptCheckpointError: If such a path has a damaged manifest.
    """
    if storage_options and not is_url(plain_path(path)):
        files = open_directory(path)
        manifest = manifest_of(files)
        other = None if manifest is None else manifest.other_half
        if other is not None and is_url(other.path):
            return files
    return open_directory(path, storage_options)


def check_same_save(manifest: Manifest, other: Manifest | None, *, path: str) -> None:
    """Check that the other half is there and belongs to the same save.

    Args:
        manifest: Manifest of one half.
        other: Manifest in the place of the other half; `None` without one.
        path: That place.

    Raises:
        ReadError: If there is no manifest.
        CorruptCheckpointError: If it is of another save.
    """
    holds = "" if manifest.other_half is None else manifest.other_half.holds
    name = "HuggingFace half" if holds == "hf" else "DCP half"
    if other is None:
        raise ReadError(
            f"the {name} of the checkpoint is not where the manifest says",
            phase="read",
            path=path,
            expected=f"{MANIFEST_NAME} of save {manifest.save_id}",
            found="no manifest",
            hint="it was deleted or moved; the two halves lie apart",
        )
    if other.save_id != manifest.save_id:
        raise CorruptCheckpointError(
            f"the {name} of the checkpoint was replaced by another save",
            phase="read",
            path=path,
            expected=f"save {manifest.save_id}",
            found=f"save {other.save_id}",
            hint="the two halves lie apart, and one of them was saved again",
        )
