"""All files below a directory, by one fresh listing."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.storage.input_contract import read_errors

if TYPE_CHECKING:
    from collections.abc import Mapping


def list_tree(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return the size of every file below a directory, by path within it, sorted.

    Links to files count as files; links to directories are not followed. What is neither a file
    nor a directory has the size -1.

    Raises:
        ReadError: If the directory cannot be listed.
    """
    text = os.fspath(path)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    found = _list_store(text, storage_options) if "://" in text else _list_local(text)
    return dict(sorted(found.items()))


def _list_local(path: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    todo = [""]
    while todo:
        below = todo.pop()
        with read_errors(path), os.scandir(os.path.join(path, below)) as entries:
            for entry in entries:
                name = os.path.join(below, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(name)
                else:
                    sizes[name] = _size(entry)
    return sizes


def _size(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
    except OSError:
        # A link to nothing, or a file that has gone since.
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _list_store(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, int]:
    import fsspec  # noqa: PLC0415 - a second of import that a local path does not need

    with read_errors(url):
        store, root = fsspec.core.url_to_fs(url, **(storage_options or {}))
        root = root.rstrip("/")
        # A listing that fsspec kept may be older than the checkpoint.
        store.invalidate_cache(root)
        entries = store.find(root, detail=True)
    if not entries:
        with read_errors(url):
            raise FileNotFoundError(2, "no such directory, or an empty one", url)
    start = len(root) + 1
    return {name[start:]: int(entry.get("size") or 0) for name, entry in entries.items()}
