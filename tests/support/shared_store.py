"""A store of the generic kind that several processes share: local files under a scheme of its own.

`memory://` exists in one process only, and `file://` is a local path. So tests of several ranks use
`shareddir:///path`. Each process that uses it calls `register` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

if TYPE_CHECKING:
    from pathlib import Path

SCHEME = "shareddir"


class SharedDirectory(LocalFileSystem):
    """Local files whose URLs begin with `shareddir://`."""

    protocol = SCHEME

    def __init__(self, *, key: str | None = None, **options: Any) -> None:
        """Take a `key`, as stores with credentials do; any will do."""
        super().__init__(auto_mkdir=True, **options)
        self.key = key

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        stripped: str = super()._strip_protocol(str(path).removeprefix(f"{SCHEME}://"))
        return stripped


def register() -> None:
    """Let fsspec know the scheme, in this process."""
    fsspec.register_implementation(SCHEME, SharedDirectory, clobber=True)


def url_of(path: Path) -> str:
    """Return the URL of a directory."""
    return f"{SCHEME}://{path}"
