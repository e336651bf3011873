"""Small files of an object store, read whole and fresh.

`FsspecFiles` reads tensors. This backend reads manifests and metadata: it takes nothing from a
cached listing, tries again after errors that pass, and tells a store that refuses (`WriteError`,
`SaveTimeoutError`) from a checkpoint that is damaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.storage.input_contract import InputFile, InputFiles, check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcp_hf_writer.storage.object_contract import ObjectStore, Patience

# Larger than the largest metadata that this package parses.
_MAX_NBYTES = 1 << 31


class ListedObjects(InputFiles):
    """The objects below a prefix of a store. Each `open` reads the object into memory."""

    readers = 1
    reads_ahead = False
    prefers_large_reads = True

    def __init__(
        self, store: ObjectStore, patience: Callable[[], Patience], *, below: str = ""
    ) -> None:
        """Read nothing yet.

        Args:
            store: The store.
            patience: Makes the limit of each call.
            below: Prefix of all keys, without `/` at its end; may be empty.
        """
        self._store, self._patience, self._below = store, patience, below
        self.path = f"{store.url}/{below}".rstrip("/")

    def _key(self, name: str) -> str:
        inner = check_name(name, path=self.path)
        return f"{self._below}/{inner}" if self._below else inner

    def open(self, name: str) -> InputFile:
        """Read an object; see `InputFiles.open`."""
        key, path = self._key(name), f"{self.path}/{name}"
        data = self._store.read(key, max_nbytes=_MAX_NBYTES, patience=self._patience())
        if data is None:
            raise ReadError("an object is missing", phase="read", path=path, found="no such object")
        return _ReadObject(path, data)

    def names(self) -> list[str]:
        """Return the names right below the prefix; see `InputFiles.names`."""
        return [name for name in self.tree() if "/" not in name]

    def tree(self) -> dict[str, int]:
        """Return the size of every object by a fresh listing; see `InputFiles.tree`."""
        prefix = f"{self._below}/" if self._below else ""
        listed = self._store.objects(prefix, patience=self._patience())
        sizes = {facts.key[len(prefix) :]: facts.nbytes for facts in listed}
        # Some tools mark a directory with an object of the same name.
        sizes.pop("", None)
        if not sizes:
            raise ReadError(
                "there is nothing below this URL", phase="read", path=self.path, found="no object"
            )
        return dict(sorted(sizes.items()))

    def below(self, name: str) -> InputFiles:
        """Return the objects below a longer prefix; see `InputFiles.below`."""
        return ListedObjects(self._store, self._patience, below=self._key(name))

    def has(self, name: str) -> bool:
        """Ask for an object; see `InputFiles.has`."""
        return self._store.facts_of(self._key(name), patience=self._patience()) is not None


class _ReadObject(InputFile):
    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.nbytes = path, len(data)
        self._data = memoryview(data)

    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill buffers; see `InputFile.read_into`."""
        self.check_range(start, sum(buffer.nbytes for buffer in buffers))
        for buffer in buffers:
            buffer[:] = self._data[start : start + buffer.nbytes]
            start += buffer.nbytes
