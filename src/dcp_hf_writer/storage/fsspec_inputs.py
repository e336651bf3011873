"""Backend for reading: files on any store that fsspec can open."""

from __future__ import annotations

import copy
import errno
import os
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError
from dcp_hf_writer.storage.input_contract import (
    InputFile,
    InputFiles,
    check_name,
    ends_too_early,
    read_errors,
)
from dcp_hf_writer.storage.reader_threads import REMOTE_READER_THREADS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


# A caching file system of fsspec downloads a file on the first read. Meanwhile a second reader
# would see a partial file. fsspec shares its instances, so one lock serves all of them.
_DOWNLOAD = threading.Lock()


class FsspecFiles(InputFiles):
    """Files on any store that fsspec can open.

    Links are not checked: fsspec follows them, and does not report where they lead. Object stores
    have no links, but a local directory behind a cache (`simplecache::file://`) may have some.

    `open` takes the size of a file from a listing that fsspec has cached, if there is one. Asking
    the store again would cost one request per file. So if a file was replaced after the listing,
    `open` may report its old size.
    """

    reads_ahead = False
    prefers_large_reads = True

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Connect to the store of `url`.

        Raises:
            ConfigError: If fsspec does not support the protocol, or a package for it is missing.
        """
        # Not at the top: this import takes a second, and readers of local paths do not need it.
        import fsspec.implementations.cached  # noqa: PLC0415

        self.path = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **(storage_options or {}))
        except (ValueError, ImportError) as error:
            raise ConfigError("fsspec cannot read this URL", path=url, found=str(error)) from error
        self._root = root.rstrip("/")
        kind = fsspec.implementations.cached.CachingFileSystem
        self._is_cache = any(isinstance(fs, kind) for fs in _chain(self._fs))
        self.readers = 1 if self._is_cache else REMOTE_READER_THREADS

    def open(self, name: str) -> InputFile:
        """Look up a file; see `InputFiles.open`."""
        where, path = self._find(name)
        with read_errors(path):
            entry = self._entry(where)
        nbytes = _size(entry)
        if entry.get("type") in _NOT_FILES or nbytes < 0:
            raise CorruptCheckpointError(
                "an entry of a checkpoint is not a file of known size",
                phase="read",
                path=path,
            )
        return _FsspecFile(self._fs, where, path, nbytes, is_cache=self._is_cache)

    def _find(self, name: str) -> tuple[str, str]:
        """Return the path of a file on the store, and its path for error messages."""
        inner = check_name(name, path=self.path)
        return f"{self._root}/{inner}", f"{self.path}/{inner}"

    def _entry(self, where: str) -> Mapping[str, Any]:
        try:
            entry: Mapping[str, Any] = self._fs.info(where)
        except FileNotFoundError:
            # fsspec may have used a cached listing that is older than the file.
            self._fs.invalidate_cache(_parent(where))
            entry = self._fs.info(where)
        return entry

    def names(self) -> list[str]:
        """Return the names in the directory; see `InputFiles.names`."""
        with read_errors(self.path):
            # fsspec may have cached a listing that is older than the checkpoint.
            self._fs.invalidate_cache(self._root)
            entries = self._fs.ls(self._root, detail=True)
            self._check_is_directory([entry["name"] for entry in entries])
        files = (entry for entry in entries if entry.get("type") != "directory")
        return sorted(filter(None, (self._name_of(entry["name"]) for entry in files)))

    def tree(self) -> dict[str, int]:
        """Return the size of every file; see `InputFiles.tree`."""
        with read_errors(self.path):
            # Drop all listings: given a directory, some stores keep the listings below it.
            self._fs.invalidate_cache()
            entries = self._fs.find(self._root, detail=True)
            if not entries:
                raise FileNotFoundError(errno.ENOENT, "no such directory, or an empty one")
            self._check_is_directory(list(entries))
        sizes = {self._name_of(name): _size(entry) for name, entry in entries.items()}
        # On object stores, some tools mark a directory with an object of the same name.
        sizes.pop("", None)
        return dict(sorted(sizes.items()))

    def _name_of(self, where: str) -> str:
        return where.rstrip("/")[len(self._root) :].lstrip("/")

    def _check_is_directory(self, listed: list[str]) -> None:
        """Raise if the path is a file: fsspec then lists only the file itself."""
        if listed == [self._root]:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def below(self, name: str) -> InputFiles:
        """Return the files of a directory within this one."""
        found = copy.copy(self)
        found._root, found.path = self._find(name)  # noqa: SLF001 - an instance of this class
        return found

    def has(self, name: str) -> bool:
        """Whether anything has this name; see `InputFiles.has`."""
        where, path = self._find(name)
        with read_errors(path):
            # fsspec may have cached a listing that is older than the checkpoint.
            self._fs.invalidate_cache(_parent(where))
            return bool(self._fs.exists(where))


# Types that `info` of fsspec reports for entries without content to read. "other" is a pipe or a
# device behind a cache: reading it might never end.
_NOT_FILES = frozenset({"directory", "other"})


def _chain(fs: Any) -> Iterator[Any]:
    """Yield a file system, then each file system that it wraps."""
    while fs is not None:
        yield fs
        fs = getattr(fs, "fs", None)


def _size(entry: Mapping[str, Any]) -> int:
    size = entry.get("size")
    return size if isinstance(size, int) else -1


def _parent(where: str) -> str:
    return where.rpartition("/")[0]


class _FsspecFile(InputFile):
    def __init__(self, fs: Any, where: str, path: str, nbytes: int, *, is_cache: bool) -> None:
        self.path, self.nbytes = path, nbytes
        self._fs, self._where = fs, where
        self._turn = _DOWNLOAD if is_cache else nullcontext()

    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill buffers; see `InputFile.read_into`."""
        wanted = sum(buffer.nbytes for buffer in buffers)
        # Stores answer differently to empty ranges and to ranges past the end: request neither.
        self.check_range(start, wanted)
        if not wanted:
            return
        with read_errors(self.path), self._turn:
            data = memoryview(self._fs.cat_file(self._where, start=start, end=start + wanted))
        if data.nbytes != wanted:
            found = f"{start + data.nbytes} bytes" if data.nbytes else f"at most {start} bytes"
            raise ends_too_early(self.path, start + wanted, found)
        for buffer in buffers:
            buffer[:] = data[: buffer.nbytes]
            data = data[buffer.nbytes :]
