"""Object store for any file system of fsspec: whole objects, and parts that come in order.

fsspec has no call that sends a part. So an upload is a file that fsspec opens without
`autocommit` and publishes when asked to. Two file systems do not hold such a file back, so they
have a way of their own: memory and local files.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar

from dcp_hf_writer.errors import CheckpointError, ConfigError, SaveTimeoutError, WriteError
from dcp_hf_writer.storage.object_contract import (
    Abilities,
    ObjectFacts,
    ObjectStore,
    SentPart,
    Upload,
)
from dcp_hf_writer.storage.object_retries import RequestFault, Retries
from dcp_hf_writer.storage.posix_outputs import number_and_text
from dcp_hf_writer.storage.store_urls import shown_url, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dcp_hf_writer.storage.object_contract import Patience

_T = TypeVar("_T")

_MAX_PARTS = 1 << 31

# Errors that may be over soon. The second try may find that the first one worked: all calls that
# are tried again give the same result twice.
_PASSING = (TimeoutError, ConnectionError)

_HELD_BACK = ".dcp-hf-upload-"
"""Begins the last part of the name of a local file that is not published yet."""


class FsspecStore(ObjectStore):
    """The objects below a URL of any file system of fsspec.

    Only the process that began an upload can send its parts. The store keeps no tokens.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Connect to the file system of `url`.

        Raises:
            ConfigError: If fsspec does not support the protocol, or a package for it is missing.
        """
        # Not at the top: savers to local paths do not need it.
        import fsspec.core  # noqa: PLC0415

        self.url = shown_url(url).rstrip("/")
        self._options = dict(storage_options or {})
        self._given_url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **self._options)
        except (ValueError, ImportError) as error:
            msg = "fsspec cannot open this URL"
            found = self._text_of(error)
            raise ConfigError(msg, path=self.url, found=found) from None
        self._root = root.rstrip("/")
        self.abilities = Abilities(
            shares_uploads=False, creates_if_absent=False, part_nbytes=1, max_parts=_MAX_PARTS
        )
        self._open: dict[str, _HeldBack] = {}
        self._lock = threading.Lock()

    def put(
        self,
        key: str,
        data: Sequence[memoryview],
        *,
        token: str,
        patience: Patience,
        if_absent: bool = False,
    ) -> bool:
        """Make an object; see `ObjectStore.put`. Without the ability, `if_absent` looks first."""
        if if_absent and self.facts_of(key, patience=patience) is not None:
            return False
        upload = self.begin_upload(key, token=token, patience=patience)
        try:
            sent = [self.send_part(upload, 1, data, patience=patience)]
            self.complete(upload, sent, patience=patience)
        except BaseException:
            self.abort(upload, patience=patience)
            raise
        return True

    def begin_upload(self, key: str, *, token: str, patience: Patience) -> Upload:
        """Open a file that is not visible yet; see `ObjectStore.begin_upload`.

        Raises:
            ConfigError: If the file system shows a file before it is complete.
        """
        upload = Upload(key, uuid.uuid4().hex, token)
        held = self._run(
            "begin_upload", key, patience, lambda: self._held_back(key, upload.upload_id)
        )
        with self._lock:
            self._open[upload.upload_id] = held
        return upload

    def _held_back(self, key: str, upload_id: str) -> _HeldBack:
        path = self._path(key)
        if _is_memory(self._fs):
            return _InMemory(self._fs, path)
        if _is_local(self._fs):
            return _Renamed(self._fs, path, upload_id)
        return _Uncommitted(self._fs, path, self._shown(key))

    def send_part(
        self, upload: Upload, number: int, data: Sequence[memoryview], *, patience: Patience
    ) -> SentPart:
        """Append a part; see `ObjectStore.send_part`. Not tried again: it would append twice."""
        held = self._upload(upload)
        self._begin_call(upload.key, patience)
        if number != held.parts + 1:
            msg = "a part of an object did not come in order"
            expected, found = f"part {held.parts + 1}", f"part {number}"
            raise self._error(msg, upload.key, found, expected=expected)
        with self._errors(upload.key):
            for one in data:
                held.write(one.cast("B"))
        held.parts, nbytes = number, sum(one.nbytes for one in data)
        held.nbytes += nbytes
        return SentPart(number, nbytes, "")

    def complete(self, upload: Upload, parts: Sequence[SentPart], *, patience: Patience) -> None:
        """Publish the file, then compare its size; see `ObjectStore.complete`."""
        held = self._upload(upload)
        nbytes = sum(part.nbytes for part in parts)
        if [part.number for part in parts] != list(range(1, held.parts + 1)):
            msg = "an upload was completed with other parts than it has"
            raise self._error(msg, upload.key, f"{len(parts)} parts", expected=f"{held.parts}")
        self._begin_call(upload.key, patience)
        with self._errors(upload.key):
            held.publish()
        with self._lock:
            self._open.pop(upload.upload_id, None)
        facts = self.facts_of(upload.key, patience=patience)
        if facts is None or facts.nbytes != nbytes:
            msg = "an object does not have the size that was sent"
            found = "no object" if facts is None else f"{facts.nbytes} bytes"
            raise self._error(msg, upload.key, found, expected=f"{nbytes} bytes")

    def abort(self, upload: Upload, *, patience: Patience) -> None:
        """Throw the file away; see `ObjectStore.abort`."""
        with self._lock:
            held = self._open.pop(upload.upload_id, None)
        if held is None and not _is_local(self._fs):
            return
        path = self._path(upload.key)
        discard = held.discard if held else functools.partial(_discard_left, path, upload.upload_id)
        self._run("abort", upload.key, patience, discard)

    def facts_of(self, key: str, *, patience: Patience) -> ObjectFacts | None:
        """Ask for the size of an object; see `ObjectStore.facts_of`."""

        def look() -> ObjectFacts | None:
            self._fs.invalidate_cache(self._path(key).rpartition("/")[0])
            try:
                found = self._fs.info(self._path(key))
            except (FileNotFoundError, NotADirectoryError):
                return None
            is_file = found.get("type") != "directory"
            return ObjectFacts(key, int(found["size"])) if is_file else None

        return self._run("facts_of", key, patience, look)

    def read(self, key: str, *, max_nbytes: int, patience: Patience) -> bytes | None:
        """Read a small object; see `ObjectStore.read`."""
        facts = self.facts_of(key, patience=patience)
        if facts is None:
            return None
        if facts.nbytes > max_nbytes:
            found = f"{facts.nbytes} bytes"
            raise self._error(
                "an object is too large", key, found, expected=f"at most {max_nbytes} bytes"
            )

        def cat() -> bytes | None:
            try:
                return bytes(self._fs.cat_file(self._path(key)))
            except FileNotFoundError:
                return None

        return self._run("read", key, patience, cat)

    def objects(self, prefix: str, *, patience: Patience) -> Iterator[ObjectFacts]:
        """List the objects below the root; see `ObjectStore.objects`."""
        for key, nbytes in self._listed(patience):
            if key.startswith(prefix) and _upload_in(key) is None:
                yield ObjectFacts(key, nbytes)

    def uploads(self, prefix: str, *, patience: Patience) -> Iterator[Upload]:
        """List the uploads of this process, and local files that a process left unpublished."""
        with self._lock:
            held = {upload_id: self._key(one.path) for upload_id, one in self._open.items()}
        for key, _ in self._listed(patience):
            left = _upload_in(key)
            if left is not None:
                held[left[1]] = left[0]
        for upload_id, key in held.items():
            if key.startswith(prefix):
                yield Upload(key, upload_id, "")

    def _listed(self, patience: Patience) -> list[tuple[str, int]]:
        def find() -> list[tuple[str, int]]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
            return [(self._key(name), int(entry["size"])) for name, entry in found.items()]

        return sorted(one for one in self._run("list", "", patience, find) if one[0])

    def delete(self, keys: Sequence[str], *, patience: Patience) -> None:
        """Delete objects one by one; see `ObjectStore.delete`."""
        for key in keys:
            self._run("delete", key, patience, functools.partial(self._remove, self._path(key)))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def close(self) -> None:
        """Throw away what was not published; the file system belongs to fsspec."""
        with self._lock:
            held, self._open = list(self._open.values()), {}
        for one in held:
            one.discard()

    def _upload(self, upload: Upload) -> _HeldBack:
        with self._lock:
            held = self._open.get(upload.upload_id)
        if held is None:
            msg = "an upload is gone, or another process began it"
            raise self._error(msg, upload.key, "no such upload in this process")
        return held

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _key(self, path: str) -> str:
        return path[len(self._root) :].lstrip("/")

    def _shown(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _begin_call(self, key: str, patience: Patience) -> None:
        patience.check()
        if time.monotonic() > patience.deadline:
            msg = "the store did not answer by the deadline of the save"
            raise SaveTimeoutError(msg, path=self._shown(key))

    def _run(self, what: str, key: str, patience: Patience, call: Callable[[], _T]) -> _T:
        """Make a call, and repeat it after errors that pass."""
        retries = Retries(patience, path=self._shown(key), what=what)
        while True:
            self._begin_call(key, patience)
            try:
                return call()
            except CheckpointError:
                raise
            except _PASSING as error:
                fault = self._passing_fault(error)
            except Exception as error:  # noqa: BLE001 - each file system has errors of its own
                raise self._refused(error, key) from None
            # Out of the `except` block: an error raised in it would carry the one of the file
            # system, whose text may hold a credential.
            retries.wait_after(fault)

    def _passing_fault(self, error: Exception) -> RequestFault:
        number = error.errno if isinstance(error, OSError) else None
        return RequestFault(passes=True, text=self._text_of(error), errno=number)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - each file system has errors of its own
            raise self._refused(error, key) from None

    def _refused(self, error: Exception, key: str) -> WriteError:
        # Without the cause: its text, or an error below it, may hold a credential.
        found, number = self._text_of(error), None
        if isinstance(error, OSError) and error.errno is not None:
            found, number = number_and_text(error), error.errno
        made = self._error("the store refused a request", key, found)
        made.errno = number
        return made

    def _text_of(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        return without_secrets(text, url=self._given_url, options=self._options)

    def _error(
        self, problem: str, key: str, found: str, *, expected: str | None = None
    ) -> WriteError:
        return WriteError(
            problem, phase="write", path=self._shown(key), expected=expected, found=found
        )


class _HeldBack(ABC):
    """A file in the making that nobody sees."""

    path: str
    parts = 0
    nbytes = 0

    @abstractmethod
    def write(self, data: memoryview) -> None:
        """Append bytes."""

    @abstractmethod
    def publish(self) -> None:
        """Make the file visible in one step."""

    @abstractmethod
    def discard(self) -> None:
        """Throw the file away; does nothing if it is gone."""


class _InMemory(_HeldBack):
    """For `memory://`, whose files are visible from the moment they are opened."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self.path = fs, path
        self._data = bytearray()

    def write(self, data: memoryview) -> None:
        self._data += data

    def publish(self) -> None:
        self._fs.pipe_file(self.path, self._data)

    def discard(self) -> None:
        self._data = bytearray()


class _Renamed(_HeldBack):
    """For local files: fsspec would hold them back in another file system, and copy them later."""

    def __init__(self, fs: Any, path: str, upload_id: str) -> None:
        self.path, self._held = path, _held_name(path, upload_id)
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        self._file = open(self._held, "xb", buffering=0)  # noqa: SIM115 - until it is published

    def write(self, data: memoryview) -> None:
        while data.nbytes:
            data = data[self._file.write(data) :]

    def publish(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._held, self.path)

    def discard(self) -> None:
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._held)


def _held_name(path: str, upload_id: str) -> str:
    return f"{path}{_HELD_BACK}{upload_id}"


def _discard_left(path: str, upload_id: str) -> None:
    """Remove a local file that another process did not publish."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_held_name(path, upload_id))


class _Uncommitted(_HeldBack):
    """For every other file system: a file that fsspec commits or discards when it is told to."""

    def __init__(self, fs: Any, path: str, shown: str) -> None:
        self.path = path
        parent = path.rpartition("/")[0]
        if parent:
            fs.makedirs(parent, exist_ok=True)
        self._file = fs.open(path, "wb", autocommit=False)
        if not _commits(self._file):
            # Closing such a file would publish it, so its data is dropped first.
            self._drop()
            msg = "this file system cannot hold a file back until it is complete"
            raise ConfigError(
                msg,
                path=shown,
                expected="files with commit and discard, as fsspec opens them with "
                "autocommit=False",
                found=type(self._file).__name__,
                hint="save to a local path and copy the finished checkpoint",
            )

    def _drop(self) -> None:
        if hasattr(self._file, "buffer"):
            self._file.buffer, self._file.closed = None, True

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def publish(self) -> None:
        self._file.close()
        self._file.commit()

    def discard(self) -> None:
        self._file.discard()
        self._drop()


def _commits(file: Any) -> bool:
    """Whether an open file of fsspec has a `commit` that does anything."""
    from fsspec.spec import AbstractBufferedFile  # noqa: PLC0415 - as above

    commit = getattr(file, "commit", None)
    return commit is not None and getattr(commit, "__func__", commit) is not (
        AbstractBufferedFile.commit
    )


def _is_memory(fs: Any) -> bool:
    from fsspec.implementations.memory import MemoryFileSystem  # noqa: PLC0415 - as above

    return isinstance(fs, MemoryFileSystem)


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem  # noqa: PLC0415 - as above

    return isinstance(fs, LocalFileSystem)


def _upload_in(key: str) -> tuple[str, str] | None:
    """Return the key and id of the upload that a held-back local file belongs to."""
    name, found, upload_id = key.rpartition(_HELD_BACK)
    return (name, upload_id) if found else None
