"""Read the manifest of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest

if TYPE_CHECKING:
    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.input_contract import InputFiles


def manifest_of(files: InputFiles) -> Manifest | None:
    """Read the manifest of a checkpoint; `None` if `HFDualWriter` did not write the checkpoint.

    Raises:
        ReadError: If the manifest cannot be read.
        CorruptCheckpointError: If the manifest is damaged.
    """
    if not files.has(MANIFEST_NAME):
        return None
    data = files.read_whole(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
    return parse_manifest(data, path=f"{files.path}/{MANIFEST_NAME}")
