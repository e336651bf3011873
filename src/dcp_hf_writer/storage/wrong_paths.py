"""What is at a path that should be a checkpoint and is none, and which path may be meant."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.formats.names_on_disk import (
    MANIFEST_NAME,
    METADATA_NAME,
    SUFFIX,
    is_hf_directory,
)
from dcp_hf_writer.storage.paths_as_written import hub_hint
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator

EITHER_HALF = f"a directory with {METADATA_NAME}, or with *{SUFFIX} files"
"""What a checkpoint has, if a load may read either half."""

_MOST_NAMES = 4
# Entries of a directory that are looked at for an advice.
_MOST_ENTRIES = 2000

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


@contextmanager
def wrong_path_errors(path: str, given: str, *, expected: str = EITHER_HALF) -> Iterator[None]:
    """Say what is at a path if the read of it fails because there is no such directory.

    Args:
        path: The path, as the reading backend names it.
        given: The path as the user gave it.
        expected: What a checkpoint would have, for the message.
    """
    try:
        yield
    except ReadError as error:
        if error.errno not in _NOT_THERE or is_url(path):
            raise
        msg = "there is no checkpoint at this path"
        raise ReadError(
            msg,
            phase="read",
            path=path,
            expected=expected,
            found=_found(path),
            errno=error.errno,
            hint=hint_for(path, given),
        ) from error


def _found(path: str) -> str:
    if os.path.isdir(path):
        return "a directory without that"
    if os.path.lexists(path):
        return "a symbolic link to nothing" if os.path.islink(path) else "a file"
    return "nothing"


def hint_for(path: str, given: str) -> str | None:
    """Return which path may be meant; `None` if there is nothing to say.

    Args:
        path: Absolute local path, or a URL, about which there is nothing to say.
        given: The path as the user gave it.
    """
    if is_url(path):
        return None
    if os.path.isdir(path):
        inside = [name for name in _names(path) if is_checkpoint(os.path.join(path, name))]
        return f"pass one of the checkpoints in it: {_some(inside)}" if inside else None
    if os.path.lexists(path):
        parent = os.path.dirname(path)
        return f"pass the directory: {parent}" if is_checkpoint(parent) else "pass a directory"
    parent = os.path.dirname(path)
    while not os.path.isdir(parent):
        if os.path.lexists(parent):
            return f"{parent} is not a directory"
        parent = os.path.dirname(parent)
    beside = [name for name in _names(parent) if is_checkpoint(os.path.join(parent, name))]
    if beside:
        return f"checkpoints in {parent}: {_some(beside)}"
    return hub_hint(given)


def is_checkpoint(path: str) -> bool:
    """Whether a local directory looks like a checkpoint, or like a HuggingFace directory."""
    if not os.path.isdir(path):
        return False
    if any(os.path.lexists(os.path.join(path, name)) for name in (METADATA_NAME, MANIFEST_NAME)):
        return True
    return is_hf_directory(_names(path))


def _names(path: str) -> list[str]:
    """Return the names in a directory that are not hidden; none if it cannot be listed."""
    try:
        with os.scandir(path) as entries:
            found = [entry.name for entry, _ in zip(entries, range(_MOST_ENTRIES), strict=False)]
    except OSError:
        return []
    return sorted(name for name in found if not name.startswith("."))


def _some(names: list[str]) -> str:
    """Return the last names: those of the latest steps."""
    ordered = sorted(names, key=lambda name: (len(name), name), reverse=True)
    return some_of(ordered, most=_MOST_NAMES)
