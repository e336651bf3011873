"""Names of the files in a checkpoint.

Readers outside this package depend on all of these names, so none can change.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

METADATA_NAME = ".metadata"
"""DCP's own metadata; torch defines the name."""
DCP_SUFFIX = ".distcp"
"""Suffix of the files of DCP; torch defines it."""
MANIFEST_NAME = "dcp-hf.json"
"""The manifest of this package, published last."""
DIGESTS_DIRECTORY = "dcp-hf"
"""Directory of the digests files, one for each rank."""

SUFFIX = ".safetensors"
"""Suffix of files that hold weights in the HuggingFace format."""
INDEX_SUFFIX = ".safetensors.index.json"
"""Suffix of an index, which maps each tensor to its file."""
SINGLE_NAME = "model.safetensors"
"""The weights, if one file holds all of them."""
INDEX_NAME = "model.safetensors.index.json"
"""The index, if several files hold the weights."""
CONFIG_NAME = "config.json"
"""The config of a HuggingFace model."""

INCOMPLETE = ".incomplete-"
"""Begins the name of the directory of a save; the id of the save follows."""
RECORD_NAME = ".dcp-hf-save.json"
"""The record in the directory of a save, or in its prefix on a store, until it is published."""
MIRROR = ".mirror-"
"""Begins the name of the record of an unfinished mirror, beside its checkpoint; the id of the save
follows."""
REPLACED = ".replaced-"
"""Begins the name of a directory that was renamed aside; the id of the save follows."""


HEARTBEATS_NAME = ".dcp-hf-live"
"""Directory of the heartbeats of a save, in its directory or in its prefix on a store; it is never
published."""

_HEARTBEAT = re.compile(re.escape(HEARTBEATS_NAME) + r"/(\d{5,})\.json")
_DIGESTS_FILE = re.compile(r"digests-\d{5,}\.safetensors")
_DCP_FILE = re.compile(r"__(\d+)_\d+\.distcp")


def rank_of_dcp_file(name: str) -> int | None:
    """Return the rank in the name of one of DCP's files; `None` if the name has another form."""
    found = _DCP_FILE.fullmatch(name)
    return None if found is None else int(found[1])


def heartbeat_key(rank: int) -> str:
    """Return the path of the heartbeat of a rank within the place of a save."""
    return f"{HEARTBEATS_NAME}/{rank:05d}.json"


def rank_of_heartbeat(name: str) -> int | None:
    """Return the rank in the path of a heartbeat; `None` if it has another form."""
    found = _HEARTBEAT.fullmatch(name)
    return None if found is None else int(found[1])


def path_in_export(subdir: str, name: str) -> str:
    """Return the path of a file of the export within its checkpoint.

    Args:
        subdir: Directory of the export; empty if the export has a place of its own.
        name: Path of the file within the export.
    """
    return f"{subdir}/{name}" if subdir else name


def is_hf_directory(names: Collection[str]) -> bool:
    """Whether a directory with these file names holds safetensors weights.

    Digests files have the same suffix and hold no weights.
    """
    return any(
        name.endswith((SUFFIX, INDEX_SUFFIX)) and not is_digests_file(name) for name in names
    )


def digests_file_name(rank: int) -> str:
    """Return the path within a checkpoint of the file with the digests of what a rank wrote."""
    return f"{DIGESTS_DIRECTORY}/digests-{rank:05d}{SUFFIX}"


def is_digests_file(name: str) -> bool:
    """Whether a file in `DIGESTS_DIRECTORY` has the name of a digests file."""
    return _DIGESTS_FILE.fullmatch(name) is not None


def weight_file_names(count: int) -> list[str]:
    """Return the names of the files that hold the weights, in order.

    Args:
        count: Number of files.

    Source:
        huggingface_hub, "Save a state dict": the pattern that `save_pretrained` uses.
    """
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}{SUFFIX}" for i in range(1, count + 1)]
