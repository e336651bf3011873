"""FsspecStore: what every object store promises, and what happens without commit and discard."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from dcp_hf_writer.errors import ConfigError, SaveAbortedError, SaveTimeoutError, WriteError
from dcp_hf_writer.storage.fsspec_store import FsspecStore
from dcp_hf_writer.storage.object_contract import ObjectStore, Patience
from dcp_hf_writer.storage.open_store import open_store
from dcp_hf_writer.storage.store_urls import shown_url, without_secrets
from support import shared_store
from support.object_conformance import TOKEN, ObjectConformance, RawStore, patience


class RawMemory(RawStore):
    def __init__(self, root: str) -> None:
        self.root = root

    def store(self) -> ObjectStore:
        return open_store(f"memory:/{self.root}")

    def content(self, key: str) -> bytes | None:
        found = MemoryFileSystem.store.get(f"{self.root}/{key}")
        return None if found is None else found.getvalue()

    def keys(self) -> list[str]:
        start = f"{self.root}/"
        return sorted(
            name[len(start) :] for name in MemoryFileSystem.store if name.startswith(start)
        )

    def write_beside(self, name: str, data: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(self.root + name, data)


class RawDirectory(RawStore):
    def __init__(self, root: Path) -> None:
        self.root = root

    def store(self) -> ObjectStore:
        shared_store.register()
        return open_store(shared_store.url_of(self.root))

    def content(self, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def keys(self) -> list[str]:
        found = [path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file()]
        return sorted(str(path) for path in found if "upload" not in path.name)

    def write_beside(self, name: str, data: bytes) -> None:
        path = Path(f"{self.root}{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class TestMemory(ObjectConformance):
    @pytest.fixture
    def raw(self, tmp_path: Path) -> RawMemory:
        return RawMemory(f"/run{tmp_path}")


class TestDirectory(ObjectConformance):
    @pytest.fixture
    def raw(self, tmp_path: Path) -> RawDirectory:
        return RawDirectory(tmp_path / "store")

    def test_upload_of_a_dead_process_is_listed_and_aborted(self, raw: RawDirectory) -> None:
        (raw.root / "hf").mkdir(parents=True)
        (raw.root / "hf" / "a.dcp-hf-upload-1").write_bytes(b"half")
        store = raw.store()
        (upload,) = store.uploads("", patience=patience())
        assert upload.key == "hf/a"
        store.abort(upload, patience=patience())
        assert [path for path in raw.root.rglob("*") if path.is_file()] == []


class ShowsAtOnce(AbstractFileSystem):
    """A file system whose files have no commit, as some of fsspec."""

    uploaded: ClassVar[list[str]] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - fsspec's
        """Have no directories."""

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return Uncommitted(self, path, mode)


class Uncommitted(AbstractBufferedFile):
    """A file that is there as soon as it is closed."""

    def _initiate_upload(self) -> None:
        ShowsAtOnce.uploaded.append(self.path)

    def _upload_chunk(self, final: bool = False) -> bool:  # noqa: FBT001, FBT002 - fsspec's
        return final


class Unsteady:
    """Fails some times, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def info(self, *_: Any) -> dict[str, Any]:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return {"type": "file", "size": 3}

    def invalidate_cache(self, *_: Any) -> None:
        """Nothing is cached."""


def unsteady(*errors: Exception) -> tuple[FsspecStore, Unsteady]:
    store = FsspecStore("memory://run", {"secret": "hidden-secret"})
    store._fs = Unsteady(*errors)
    return store, store._fs


def test_call_is_repeated_when_the_error_may_pass() -> None:
    store, fs = unsteady(TimeoutError(), ConnectionResetError())
    facts = store.facts_of("a", patience=patience())
    assert facts is not None
    assert (facts.nbytes, fs.calls) == (3, 3)


def test_call_is_not_repeated_when_the_store_refuses() -> None:
    store, fs = unsteady(PermissionError("not with hidden-secret"))
    with pytest.raises(WriteError) as raised:
        store.facts_of("a", patience=patience())
    assert fs.calls == 1
    assert "hidden-secret" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_call_ends_at_the_deadline_when_the_error_stays() -> None:
    store, fs = unsteady(*[TimeoutError("not with hidden-secret")] * 100)
    began = time.monotonic()
    with pytest.raises(SaveTimeoutError, match="request facts_of in time") as raised:
        store.facts_of("a", patience=Patience(began + 0.5))
    assert fs.calls > 1
    assert "hidden-secret" not in str(raised.value)
    assert raised.value.__context__ is None


def test_waiting_ends_when_the_save_is_given_up() -> None:
    store, fs = unsteady(*[TimeoutError()] * 100)

    def check() -> None:
        if fs.calls:
            msg = "given up"
            raise SaveAbortedError(msg)

    with pytest.raises(SaveAbortedError):
        store.facts_of("a", patience=Patience(time.monotonic() + 60, check))
    assert fs.calls == 1


def test_file_system_that_cannot_hold_a_file_back_is_refused() -> None:
    store = FsspecStore("memory://run")
    store._fs = ShowsAtOnce(skip_instance_cache=True)
    with pytest.raises(ConfigError, match="cannot hold a file back"):
        store.begin_upload("a", token=TOKEN, patience=patience())
    gc.collect()
    assert ShowsAtOnce.uploaded == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nowhere://x", "no file system is known for nowhere://"),
        ("gs://bucket/x", "gcsfs"),
        ("simplecache::memory://x", "chain"),
    ],
)
def test_url_is_refused_when_nothing_can_write_there(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://me:pass-word@host/a/b?key=hidden", "sftp://host/a/b"),
        ("memory://run/step-1/", "memory://run/step-1"),
        ("shareddir:///a/b@c", "shareddir:///a/b@c"),
    ],
)
def test_url_is_shown_without_credentials(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_text_of_an_error_loses_every_secret() -> None:
    text = "403 for me:pass-word with a-token and nested-key"
    options = {"token": "a-token", "client": {"keys": [b"nested-key"]}, "flag": True}
    url = "sftp://me:pass-word@host/a"
    assert without_secrets(text, url=url, options=options) == "403 for *** with *** and ***"
