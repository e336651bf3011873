"""Where the files of a checkpoint may be: below a local directory, or on a store of fsspec's."""

from __future__ import annotations

import copy
import os
import stat
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError
from dcp_hf_writer.storage.input_contract import (
    InputFile,
    InputFiles,
    check_name,
    ended,
    read_errors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Of a store that is asked over a network most of the time is waiting.
_REMOTE_READERS = 16

# At least and at most: two, of which one copies while the other waits for the disk, and more where
# a rank has processors for them. Each is a stream of its own, and many are in each other's way.
_LOCAL_READERS = (2, 4)

# A caching file system of fsspec's downloads into the file that it reads from: a second thread that
# asks meanwhile gets the half that is there. And who asks the next reader shares the instance.
_DOWNLOAD = threading.Lock()


def open_directory(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> InputFiles:
    """Return the files below a local path or an fsspec URL.

    Raises:
        ConfigError: If the path cannot be one, or fsspec does not know its protocol.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError("path must be a path or a URL", found=repr(path))
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    if "://" in text:
        return FsspecFiles(text, storage_options)
    if storage_options:
        raise ConfigError(
            "storage_options are for URLs",
            expected="None for a path",
            found=sorted(storage_options),
        )
    return LocalFiles(os.path.abspath(text))


class LocalFiles(InputFiles):
    """Files below a directory of this host's file systems."""

    reads_ahead = True

    def __init__(self, path: str) -> None:
        """Read below `path`, which may itself be a link."""
        self.path = path
        self.readers = max(_LOCAL_READERS[0], min(_LOCAL_READERS[1], _cores() // _local_ranks()))
        self._root = os.path.realpath(path)

    def open(self, name: str) -> InputFile:
        """Open a file; see `InputFiles.open`."""
        path = os.path.join(self.path, check_name(name, path=self.path))
        real = os.path.realpath(os.path.join(self._root, name))
        if not self._is_ours(real):
            raise CorruptCheckpointError(
                "a symbolic link leads out of the checkpoint",
                phase="read",
                path=path,
                expected=f"a file below {self._root}",
                found=real,
                hint="put the file there; links are followed within it, and to the blobs of a "
                "HuggingFace cache",
            )
        return _LocalFile(path, real)

    def _is_ours(self, real: str) -> bool:
        if real.startswith(os.path.join(self._root, "")):
            return True
        # The cache of huggingface_hub: snapshots/<revision>/<file> -> ../../blobs/<digest>.
        snapshots = os.path.dirname(self._root)
        blobs = os.path.join(os.path.dirname(snapshots), "blobs")
        return os.path.basename(snapshots) == "snapshots" and os.path.dirname(real) == blobs

    def names(self) -> list[str]:
        """Return the names in the directory; see `InputFiles.names`."""
        with read_errors(self.path), os.scandir(self._root) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())

    def below(self, name: str) -> InputFiles:
        """Return the files of a directory within this one."""
        return LocalFiles(os.path.join(self.path, check_name(name, path=self.path)))

    def has(self, name: str) -> bool:
        """Whether a file of this name lies in the directory."""
        return os.path.lexists(os.path.join(self._root, name))


def _cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _local_ranks() -> int:
    """Return how many ranks share them, as far as torchrun told."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdecimal() else 1


class _LocalFile(InputFile):
    def __init__(self, path: str, real: str) -> None:
        self.path = path
        self._fd = -1
        with read_errors(path):
            # Not to wait for the writer of a named pipe; a regular file does not care.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._fd = os.open(real, flags)
            status = os.fstat(self._fd)
        self.nbytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CorruptCheckpointError(
                "a checkpoint names what is no regular file", phase="read", path=path
            )

    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill buffers; see `InputFile.read_into`."""
        wanted = sum(buffer.nbytes for buffer in buffers)
        with read_errors(self.path):
            done = os.preadv(self._fd, buffers, start)
            while done < wanted:
                more = os.preadv(self._fd, _rest(buffers, done), start + done)
                if not more:
                    raise ended(self.path, start + wanted, start + done)
                done += more

    def __del__(self) -> None:
        # Of a load that was given up, on another rank's account perhaps, nobody may be left to say.
        self.close()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of buffers of which the first `done` bytes are filled."""
    rest = []
    for buffer in buffers:
        skipped = min(done, buffer.nbytes)
        done -= skipped
        if skipped < buffer.nbytes:
            rest.append(buffer[skipped:])
    return rest


class FsspecFiles(InputFiles):
    """Files on a store that fsspec knows."""

    reads_ahead = False

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Connect to the store of `url`.

        Raises:
            ConfigError: If fsspec does not know the protocol, or lacks a package for it.
        """
        # A second of import that a local path does not need.
        import fsspec.implementations.cached  # noqa: PLC0415

        self.path = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **(storage_options or {}))
        except (ValueError, ImportError) as error:
            raise ConfigError("fsspec cannot read this URL", path=url, found=str(error)) from error
        self._root = root.rstrip("/")
        kind = fsspec.implementations.cached.CachingFileSystem
        self._is_cache = any(isinstance(fs, kind) for fs in _chain(self._fs))
        self.readers = 1 if self._is_cache else _REMOTE_READERS

    def open(self, name: str) -> InputFile:
        """Look a file up; see `InputFiles.open`."""
        inner = check_name(name, path=self.path)
        where = f"{self._root}/{inner}"
        return _FsspecFile(self._fs, where, f"{self.path}/{inner}", is_cache=self._is_cache)

    def names(self) -> list[str]:
        """Return the names in the directory; see `InputFiles.names`."""
        with read_errors(self.path):
            # A listing that fsspec kept may be older than the checkpoint.
            self._fs.invalidate_cache(self._root)
            entries = self._fs.ls(self._root, detail=True)
        names = (
            entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if _is_file(entry)
        )
        return sorted(filter(None, names))

    def below(self, name: str) -> InputFiles:
        """Return the files of a directory within this one."""
        inner = check_name(name, path=self.path)
        found = copy.copy(self)
        found.path = f"{self.path}/{inner}"
        found._root = f"{self._root}/{inner}"  # noqa: SLF001 - one of this class
        return found

    def has(self, name: str) -> bool:
        """Whether a file of this name lies in the directory."""
        with read_errors(self.path):
            return bool(self._fs.exists(f"{self._root}/{name}"))


def _chain(fs: Any) -> Iterator[Any]:
    """Yield a file system, and those that it passes calls on to."""
    while fs is not None:
        yield fs
        fs = getattr(fs, "fs", None)


def _is_file(entry: Mapping[str, Any]) -> bool:
    return entry.get("type") != "directory"


class _FsspecFile(InputFile):
    def __init__(self, fs: Any, where: str, path: str, *, is_cache: bool) -> None:
        self.path = path
        self._fs, self._where = fs, where
        self._turn = _DOWNLOAD if is_cache else nullcontext()
        with read_errors(path):
            entry = fs.info(where)
        if not _is_file(entry) or not isinstance(entry.get("size"), int):
            raise CorruptCheckpointError(
                "a checkpoint names what is no file of a known size", phase="read", path=path
            )
        self.nbytes = entry["size"]

    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill buffers; see `InputFile.read_into`."""
        wanted = sum(buffer.nbytes for buffer in buffers)
        with read_errors(self.path), self._turn:
            data = memoryview(self._fs.cat_file(self._where, start=start, end=start + wanted))
        if data.nbytes != wanted:
            raise ended(self.path, start + wanted, start + data.nbytes)
        for buffer in buffers:
            buffer[:] = data[: buffer.nbytes]
            data = data[buffer.nbytes :]
