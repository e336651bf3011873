"""FsspecFiles: what every backend promises, on several stores, and what fsspec makes harder."""

from __future__ import annotations

import errno
import os
import random
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError, ReadError
from dcp_hf_writer.storage.fsspec_inputs import FsspecFiles
from support.input_conformance import InputConformance, RawDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class KeptListings(MemoryFileSystem):
    """A store that answers from the listings it has kept, as s3fs does."""

    protocol = "kept"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("kept://"))
        return stripped

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:  # noqa: FBT001, FBT002 - fsspec's
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path)
        entries = self.dircache[path]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> Any:
        path = self._strip_protocol(path)
        listing = self.dircache.get(path.rpartition("/")[0])
        if listing is None:
            return super().info(path)
        for entry in listing:
            if entry["name"] == path:
                return entry
        raise FileNotFoundError(path)

    def find(self, path: str, **options: Any) -> Any:
        return fsspec.AbstractFileSystem.find(self, path, **options)

    def invalidate_cache(self, path: str | None = None) -> None:
        # As in s3fs: the listings of the directory and of those above it, not of those below it.
        if path is None:
            self.dircache.clear()
        while path:
            self.dircache.pop(path, None)
            path = path.rpartition("/")[0]


fsspec.register_implementation("kept", KeptListings, clobber=True)


class MemoryDirectory(RawDirectory):
    """Writes into the dictionary of a store in memory, past all that it has kept."""

    def __init__(self, protocol: str) -> None:
        self.fs = fsspec.filesystem(protocol)
        self.root = f"/{uuid.uuid4()}"
        self.path = f"{protocol}:/{self.root}"

    def files(self) -> FsspecFiles:
        return FsspecFiles(self.path)

    def write(self, name: str, content: bytes) -> None:
        MemoryFileSystem.pipe_file(self.fs, f"{self.root}/{name}", content)

    def remove(self, name: str) -> None:
        del self.fs.store[f"{self.root}/{name}"]

    def empty(self) -> None:
        for name in [name for name in self.fs.store if name.startswith(self.root)]:
            del self.fs.store[name]


class FileDirectory(RawDirectory):
    """Writes below a local directory, whichever URL reads it."""

    def __init__(self, directory: Path, url: str, options: dict[str, Any] | None = None) -> None:
        self.directory, self.path, self.options = directory, url, options

    def files(self) -> FsspecFiles:
        return FsspecFiles(self.path, self.options)

    def write(self, name: str, content: bytes) -> None:
        (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_bytes(content)

    def remove(self, name: str) -> None:
        (self.directory / name).unlink()


def cached(tmp_path: Path, url: str) -> FileDirectory:
    (tmp_path / "remote").mkdir()
    options = {"simplecache": {"cache_storage": str(tmp_path / "cache")}}
    return FileDirectory(tmp_path / "remote", url.format(tmp_path), options)


class TestMemory(InputConformance):
    @pytest.fixture(params=["memory", "kept"])
    def raw(self, request: pytest.FixtureRequest) -> Iterator[MemoryDirectory]:
        raw = MemoryDirectory(request.param)
        yield raw
        raw.empty()


class TestFile(InputConformance):
    @pytest.fixture
    def raw(self, tmp_path: Path) -> FileDirectory:
        (tmp_path / "raw").mkdir()
        return FileDirectory(tmp_path / "raw", f"file://{tmp_path}/raw")


class TestCache(InputConformance):
    @pytest.fixture(
        params=["simplecache::file://{}/remote", "dir://remote::simplecache::file://{}"]
    )
    def raw(self, request: pytest.FixtureRequest, tmp_path: Path) -> FileDirectory:
        return cached(tmp_path, request.param)


# -- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["simplecache::file://{}/remote", "dir://remote::simplecache::file://{}"]
)
def test_threads_that_read_through_a_cache_wait_for_its_download(tmp_path: Path, url: str) -> None:
    content = random.Random(0).randbytes(32 << 20)
    raw = cached(tmp_path, url)
    raw.write("large", content)
    starts = [len(content) - (i + 1) * 4096 for i in range(16)]
    with raw.files().open("large") as file, ThreadPoolExecutor(len(starts)) as pool:
        found = list(pool.map(lambda start: file.read(start, 4096), starts))
    assert found == [content[start : start + 4096] for start in starts]


def test_one_reader_is_in_flight_when_there_is_a_cache_and_many_when_not(tmp_path: Path) -> None:
    assert cached(tmp_path, "simplecache::file://{}/remote").files().readers == 1
    files = FsspecFiles("memory://x")
    assert (files.readers, files.reads_ahead, files.prefers_large_reads) == (16, False, True)


# -- what the store says ---------------------------------------------------------------------------


class Answers(MemoryFileSystem):
    """A store whose answers a test decides."""

    protocol = "answers"
    error: ClassVar[Exception | None] = None
    entries: ClassVar[list[dict[str, Any]]] = []
    calls: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("answers://").rstrip("/")

    def _answer(self) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        return self.entries

    def ls(self, *_: Any, **__: Any) -> Any:
        return self._answer()

    def find(self, *_: Any, **__: Any) -> Any:
        return {entry["name"]: entry for entry in self._answer()}

    def info(self, path: str, **_: Any) -> Any:
        return next(entry for entry in self._answer() if entry["name"] == path)

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        self._answer()
        self.calls.append((path, start, end))
        return bytes(end - start)


fsspec.register_implementation("answers", Answers, clobber=True)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> type[Answers]:
    monkeypatch.setattr(Answers, "error", None)
    monkeypatch.setattr(Answers, "entries", [{"name": "dir/a", "size": 9, "type": "file"}])
    monkeypatch.setattr(Answers, "calls", [])
    return Answers


@pytest.mark.parametrize(
    ("error", "number", "hint"),
    [
        (FileNotFoundError("dir/a"), errno.ENOENT, "is this the path of a checkpoint?"),
        (NotADirectoryError("dir"), errno.ENOTDIR, "is this the path of a checkpoint?"),
        (IsADirectoryError("dir/a"), errno.EISDIR, None),
        (PermissionError("dir/a"), errno.EACCES, "this user may not read it"),
        (OSError(errno.EIO, "broken"), errno.EIO, "the device may be failing; read another copy"),
        (OSError("strange"), None, None),
    ],
    ids=repr,
)
def test_error_of_the_store_is_raised_with_number_path_and_advice(
    answers: type[Answers], error: OSError, number: int | None, hint: str | None
) -> None:
    files = FsspecFiles("answers://dir")
    file = files.open("a")
    answers.error = error
    for call, path in (
        (files.names, "answers://dir"),
        (files.tree, "answers://dir"),
        (lambda: files.open("a"), "answers://dir/a"),
        (lambda: file.read(0, 1), "answers://dir/a"),
    ):
        with pytest.raises(ReadError) as caught:
            call()
        found = caught.value
        assert (found.path, found.errno, found.hint) == (path, number, hint)
        assert found.found == (
            f"{errno.errorcode[number] if number else 'OSError'}: {error.strerror or error}"
        )


def test_file_is_refused_when_the_store_does_not_say_its_size(answers: type[Answers]) -> None:
    answers.entries = [{"name": "dir/a", "size": None, "type": "file"}, {"name": "dir/b"}]
    files = FsspecFiles("answers://dir")
    assert files.tree() == {"a": -1, "b": -1}
    for name in ("a", "b"):
        with pytest.raises(CorruptCheckpointError, match="known size") as caught:
            files.open(name)
        assert caught.value.path == f"answers://dir/{name}"


def test_marker_of_a_directory_is_not_a_file(answers: type[Answers]) -> None:
    answers.entries = [
        {"name": "dir/", "size": 0, "type": "file"},
        {"name": "dir/a", "size": 9, "type": "file"},
    ]
    files = FsspecFiles("answers://dir")
    assert (files.names(), files.tree()) == (["a"], {"a": 9})


def test_store_is_not_asked_for_ranges_that_are_empty_or_pass_the_end(
    answers: type[Answers],
) -> None:
    file = FsspecFiles("answers://dir").open("a")
    file.read_into([], 3)
    file.read_into([memoryview(b"")], 9)
    with pytest.raises(ReadError, match="ends too early"):
        file.read(0, 10)
    assert answers.calls == []
    assert file.read(2, 7) == bytes(7)
    assert answers.calls == [("dir/a", 2, 9)]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("url", ["file://{}/remote", "simplecache::file://{}/remote"])
def test_pipe_is_refused_without_waiting(tmp_path: Path, url: str) -> None:
    raw = cached(tmp_path, url)
    raw.options = raw.options if "::" in url else None
    os.mkfifo(raw.directory / "pipe")
    with pytest.raises(CorruptCheckpointError, match="not a file"):
        raw.files().open("pipe")


# -- URLs ------------------------------------------------------------------------------------------


def test_files_at_the_root_of_a_store_have_their_whole_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", b"12")
        archive.writestr("sub/b", b"345")
    files = FsspecFiles(f"zip://::file://{tmp_path}/x.zip")
    assert (files.names(), files.tree()) == (["a"], {"a": 2, "sub/b": 3})
    assert files.below("sub").read_whole("b", max_nbytes=3) == b"345"


def test_slash_at_the_end_of_a_url_changes_nothing() -> None:
    raw = MemoryDirectory("memory")
    raw.write("a", b"x")
    files = FsspecFiles(f"{raw.path}/")
    assert (files.path, files.tree(), files.open("a").path) == (raw.path, {"a": 1}, f"{raw.path}/a")
    raw.empty()


def test_url_is_refused_when_fsspec_does_not_know_its_protocol() -> None:
    with pytest.raises(ConfigError, match="fsspec cannot read this URL") as caught:
        FsspecFiles("nowhere://x")
    assert caught.value.path == "nowhere://x"
