"""Directories that have the name of a checkpoint before a save: with files of others, or with one.

Also whole trees as values, to be compared before and after.
"""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from dcp_hf_writer.plan.encode_manifest import WholeFile, encode_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dcp_hf_writer.save.owner_process import Owner

Tree = dict[str, "bytes | str"]

FILES: Mapping[str, str] = {
    "trainer_state.json": "{}",
    "rng_state_0.pth": "rng",
    "tokenizer/vocab.txt": "a b",
    "runs/day 1/events.out": "events",
    "empty file": "",
}
"""What a trainer keeps beside its checkpoint, by path."""


def small_manifest(target: str, save_id: str, files: Sequence[str], owner: Owner) -> str:
    """Return a manifest that lists some files."""
    return encode_manifest(
        save_id=save_id,
        target=target,
        owner=owner.to_json(),
        step=None,
        subdir="hf",
        layout=None,
        reports=[],
        whole_files=[WholeFile(name, 1, "0" * 16) for name in files],
        seconds={},
        export_error=None,
    ).decode()


def small_metadata(files: Sequence[str]) -> bytes:
    """Return torch's metadata of values that are stored in some files."""
    entries = {name: MetadataIndex(name) for name in files}
    return pickle.dumps(
        Metadata(
            dict.fromkeys(entries, BytesStorageMetadata()),
            storage_data={entries[name]: _StorageInfo(name, 0, 1) for name in files},
        )
    )


def put_files(directory: Path, files: Mapping[str, str] = FILES) -> None:
    """Put files of a trainer into a directory, which is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def tree(root: Path) -> Tree:
    """Return all there is below a directory, with contents; links are not followed."""
    found: Tree = {}
    for parent, directories, files in os.walk(root):
        for name in sorted((*directories, *files)):
            path = os.path.join(parent, name)
            key = os.path.relpath(path, root)
            if os.path.islink(path):
                found[key] = f"-> {os.readlink(path)}"
            elif os.path.isdir(path):
                found[key] = "directory"
            else:
                with open(path, "rb") as file:
                    found[key] = file.read()
    return found


def files_of_others(root: Path, files: Mapping[str, str] = FILES) -> dict[str, str | None]:
    """Return the content of a trainer's files; `None` for one that is gone."""
    found = {}
    for name in files:
        path = root / name
        found[name] = path.read_text() if path.is_file() else None
    return found
