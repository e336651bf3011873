"""What every backend for reading promises, as tests that each of them inherits.

A backend's test module subclasses `InputConformance` and gives it a fixture `raw`. `raw` writes
into the storage by other means than the code under test.
"""

from __future__ import annotations

import errno
import itertools
import random
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcp_hf_writer.errors import CorruptCheckpointError, ReadError
from dcp_hf_writer.storage.input_contract import MAX_BUFFERS

if TYPE_CHECKING:
    from dcp_hf_writer.storage.input_contract import InputFile, InputFiles

CONTENT = random.Random(0).randbytes(100_000)

MODEL_NAMES = ("a", "b.bin", "sub/a", "sub/deep/c")

FOREIGN_NAMES = (
    *("", ".", "..", "/", "/a", "a/", "a//b", "./a", "a/.", "../a", "a/..", "a/../b", "a/../../b"),
    *("..\\a", "\\a", "a\\..\\b", "a\\\\b", "C:\\..\\a"),
    *("a\0", "a\nb", "\x1b[0m", "a\x7f", "\u202ea", "\udc80"),
    *(None, 3, b"a", ("a",)),
)
"""What a hostile checkpoint may hold where the name of a file should be."""

# A directory of its own for each example of hypothesis: some backends keep what they have read.
_numbers = itertools.count()


class RawDirectory(ABC):
    """A directory on some storage, which the code under test reads and this writes."""

    path: str
    """What errors should call it."""

    @abstractmethod
    def files(self) -> InputFiles:
        """Open the directory with the backend under test."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file, in place if it is there, and the directories above it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file."""


def read(file: InputFile, start: int, *lengths: int) -> list[bytes]:
    """Read into buffers of these lengths; each has a neighbour that must stay as it is."""
    memory = [bytearray(b"\xee" * (length + 1)) for length in lengths]
    views = [memoryview(one)[:-1] for one in memory]
    file.read_into(views, start)
    assert all(one[-1] == 0xEE for one in memory)
    return [bytes(view) for view in views]


def cut(content: bytes, start: int, *lengths: int) -> list[bytes]:
    """Return what `read` should find."""
    stops = list(itertools.accumulate(lengths, initial=start))
    return [content[a:b] for a, b in itertools.pairwise(stops)]


class InputConformance:
    """The promises of `InputFiles` and `InputFile`."""

    @pytest.fixture
    def raw(self) -> RawDirectory:
        """Return an empty directory; every backend overrides this."""
        raise NotImplementedError

    # -- listing -----------------------------------------------------------------------------------

    def test_names_are_sorted_and_without_directories(self, raw: RawDirectory) -> None:
        for name in ("b", "a", "B", "sub/c", "sub.x", "10", "9"):
            raw.write(name, b"x")
        assert raw.files().names() == ["10", "9", "B", "a", "b", "sub.x"]

    def test_names_are_empty_when_there_are_directories_only(self, raw: RawDirectory) -> None:
        raw.write("sub/a", b"x")
        assert raw.files().names() == []

    def test_tree_has_the_size_of_every_file_sorted_by_name(self, raw: RawDirectory) -> None:
        for name, nbytes in {"b": 3, "a": 0, "sub/x": 5, "sub/deep/y": 1, "sub.z": 2}.items():
            raw.write(name, bytes(nbytes))
        assert list(raw.files().tree().items()) == [
            *[("a", 0), ("b", 3), ("sub.z", 2), ("sub/deep/y", 1), ("sub/x", 5)]
        ]

    @pytest.mark.parametrize("listing", ["names", "tree"])
    def test_listing_is_refused_when_the_directory_is_missing(
        self, raw: RawDirectory, listing: str
    ) -> None:
        raw.write("a", b"x")
        with pytest.raises(ReadError) as caught:
            getattr(raw.files().below("absent"), listing)()
        assert caught.value.path == f"{raw.path}/absent"
        assert caught.value.errno == errno.ENOENT

    @pytest.mark.parametrize("listing", ["names", "tree"])
    def test_listing_is_refused_when_the_directory_is_a_file(
        self, raw: RawDirectory, listing: str
    ) -> None:
        raw.write("a", b"x")
        with pytest.raises(ReadError) as caught:
            getattr(raw.files().below("a"), listing)()
        assert caught.value.path == f"{raw.path}/a"
        assert caught.value.errno == errno.ENOTDIR

    def test_every_call_sees_a_file_written_after_a_listing(self, raw: RawDirectory) -> None:
        raw.write("a", b"x")
        raw.write("sub/a", b"x")
        files = raw.files()
        assert (files.names(), files.below("sub").names()) == (["a"], ["a"])
        assert files.tree() == {"a": 1, "sub/a": 1}
        raw.write("sub/b", b"xy")
        assert files.tree() == {"a": 1, "sub/a": 1, "sub/b": 2}
        raw.write("sub/c", b"xyz")
        assert files.has("sub/c")
        assert files.below("sub").names() == ["a", "b", "c"]
        raw.write("sub/d", b"four")
        assert files.read_whole("sub/d", max_nbytes=4) == b"four"
        raw.write("e", b"five")
        assert files.names() == ["a", "e"]

    def test_every_call_misses_a_file_removed_after_a_listing(self, raw: RawDirectory) -> None:
        for name in ("a", "b", "sub/a", "sub/b"):
            raw.write(name, b"x")
        files = raw.files()
        assert len(files.tree()) == 4
        raw.remove("b")
        raw.remove("sub/b")
        assert files.names() == ["a"]
        assert files.tree() == {"a": 1, "sub/a": 1}
        assert [files.has(name) for name in ("a", "b", "sub/b")] == [True, False, False]

    # -- finding -----------------------------------------------------------------------------------

    def test_has_tells_files_and_directories_from_nothing(self, raw: RawDirectory) -> None:
        raw.write("a", b"")
        raw.write("sub/b", b"x")
        files = raw.files()
        found = {name: files.has(name) for name in ("a", "sub", "sub/b", "b", "sub/a", "absent/a")}
        present = dict.fromkeys(("a", "sub", "sub/b"), True)
        assert found == present | dict.fromkeys(("b", "sub/a", "absent/a"), False)

    def test_below_reads_the_files_of_a_directory(self, raw: RawDirectory) -> None:
        raw.write("a", b"outer")
        raw.write("sub/deep/a", b"inner")
        deep = raw.files().below("sub").below("deep")
        assert (deep.path, deep.names(), deep.tree()) == (f"{raw.path}/sub/deep", ["a"], {"a": 5})
        assert deep.read_whole("a", max_nbytes=5) == b"inner"
        assert raw.files().below("sub/deep").read_whole("a", max_nbytes=5) == b"inner"

    def test_below_may_be_missing_until_it_is_read(self, raw: RawDirectory) -> None:
        sub = raw.files().below("sub")
        assert not sub.has("a")
        raw.write("sub/a", b"x")
        assert sub.has("a")

    @pytest.mark.parametrize("name", FOREIGN_NAMES, ids=ascii)
    def test_name_is_refused_when_it_is_not_one_of_the_directory(
        self, raw: RawDirectory, name: Any
    ) -> None:
        raw.write("a", b"x")
        raw.write("b", b"x")
        files = raw.files()
        for refuse in (files.open, files.has, files.below):
            with pytest.raises(CorruptCheckpointError, match="outside its directory") as caught:
                refuse(name)
            assert (caught.value.path, caught.value.found) == (raw.path, ascii(name))
        with pytest.raises(CorruptCheckpointError, match="outside its directory"):
            files.read_whole(name, max_nbytes=10)

    @pytest.mark.parametrize(
        "name", ["a b", ".hidden", "ä→語", "a..b", "x=1,y#2?", "%2e%2e", "[a]"]
    )
    def test_name_is_read_when_it_is_merely_unusual(self, raw: RawDirectory, name: str) -> None:
        raw.write(name, b"content")
        files = raw.files()
        assert (files.names(), files.tree(), files.has(name)) == ([name], {name: 7}, True)
        assert files.read_whole(name, max_nbytes=7) == b"content"

    # -- opening -----------------------------------------------------------------------------------

    def test_open_gives_the_path_and_the_size(self, raw: RawDirectory) -> None:
        raw.write("sub/a", CONTENT)
        with raw.files().open("sub/a") as file:
            assert (file.path, file.nbytes) == (f"{raw.path}/sub/a", len(CONTENT))

    @pytest.mark.parametrize("name", ["absent", "sub/absent", "absent/a"])
    def test_open_is_refused_when_the_file_is_missing(self, raw: RawDirectory, name: str) -> None:
        raw.write("sub/a", b"x")
        with pytest.raises(ReadError) as caught:
            raw.files().open(name)
        assert (caught.value.path, caught.value.errno) == (f"{raw.path}/{name}", errno.ENOENT)
        assert caught.value.hint == "is this the path of a checkpoint?"

    def test_open_is_refused_when_the_directory_of_the_file_is_a_file(
        self, raw: RawDirectory
    ) -> None:
        raw.write("a", b"x")
        with pytest.raises(ReadError) as caught:
            raw.files().open("a/b")
        assert caught.value.path == f"{raw.path}/a/b"

    def test_open_is_refused_when_the_file_is_a_directory(self, raw: RawDirectory) -> None:
        raw.write("sub/a", b"x")
        with pytest.raises(CorruptCheckpointError, match="not a") as caught:
            raw.files().open("sub")
        assert caught.value.path == f"{raw.path}/sub"

    def test_close_does_nothing_when_the_file_is_closed(self, raw: RawDirectory) -> None:
        raw.write("a", b"x")
        file = raw.files().open("a")
        file.close()
        file.close()
        with raw.files().open("a") as file:
            file.close()

    # -- reading -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 100_000), (0, 1), (99_999, 100_000), (4095, 4097), (1, 99_999), (0, 65_537)],
    )
    def test_read_returns_the_bytes_of_a_range(
        self, raw: RawDirectory, start: int, stop: int
    ) -> None:
        raw.write("a", CONTENT)
        with raw.files().open("a") as file:
            assert file.read(start, stop - start) == CONTENT[start:stop]

    def test_read_fills_as_many_buffers_as_are_allowed(self, raw: RawDirectory) -> None:
        raw.write("a", CONTENT)
        lengths = [number % 90 for number in range(MAX_BUFFERS)]
        with raw.files().open("a") as file:
            assert read(file, 17, *lengths) == cut(CONTENT, 17, *lengths)

    @pytest.mark.parametrize("start", [0, 3, 5, 6, 1 << 40])
    def test_read_of_nothing_succeeds_anywhere(self, raw: RawDirectory, start: int) -> None:
        raw.write("a", b"12345")
        with raw.files().open("a") as file:
            assert file.read(start, 0) == b""
            assert read(file, start) == []
            assert read(file, start, 0, 0) == [b"", b""]

    def test_read_of_an_empty_file_gives_nothing(self, raw: RawDirectory) -> None:
        raw.write("a", b"")
        with raw.files().open("a") as file:
            assert (file.nbytes, file.read(0, 0)) == (0, b"")
            with pytest.raises(ReadError, match="ends too early"):
                file.read(0, 1)

    @pytest.mark.parametrize(("start", "nbytes"), [(0, 6), (4, 2), (5, 1), (9, 1), (1 << 40, 1)])
    def test_read_is_refused_when_it_passes_the_end(
        self, raw: RawDirectory, start: int, nbytes: int
    ) -> None:
        raw.write("a", b"12345")
        with raw.files().open("a") as file, pytest.raises(ReadError) as caught:
            file.read(start, nbytes)
        error = caught.value
        assert (error.problem, error.path) == ("a file ends too early", f"{raw.path}/a")
        assert (error.expected, error.found) == (f"at least {start + nbytes} bytes", "5 bytes")

    def test_read_is_refused_beyond_the_size_that_open_gave_when_the_file_has_grown(
        self, raw: RawDirectory
    ) -> None:
        raw.write("a", b"12345")
        with raw.files().open("a") as file:
            raw.write("a", b"1234567890")
            assert file.read(3, 2) == b"45"
            with pytest.raises(ReadError, match="ends too early") as caught:
                file.read(3, 3)
        assert (file.nbytes, caught.value.found) == (5, "5 bytes")

    @pytest.mark.parametrize("left", [0, 40_000, 90_000, 99_999])
    def test_read_is_refused_when_the_file_has_become_shorter(
        self, raw: RawDirectory, left: int
    ) -> None:
        raw.write("a", CONTENT)
        with raw.files().open("a") as file:
            raw.write("a", CONTENT[:left])
            with pytest.raises(ReadError) as caught:
                read(file, 50_000, 10_000, 40_000)
        error = caught.value
        assert (error.problem, error.path) == ("a file ends too early", f"{raw.path}/a")
        assert error.expected == "at least 100000 bytes"
        # A store that returned nothing leaves open how much less there is.
        exact = f"{left} bytes"
        assert error.found in ({exact} if left > 50_000 else {exact, "at most 50000 bytes"})

    def test_read_sees_the_content_when_the_file_was_removed_or_is_refused(
        self, raw: RawDirectory
    ) -> None:
        raw.write("a", b"12345")
        with raw.files().open("a") as file:
            raw.remove("a")
            try:
                assert file.read(0, 5) == b"12345"
            except ReadError as error:
                assert error.path == f"{raw.path}/a"  # noqa: PT017 - either outcome is right

    def test_threads_read_from_one_file_at_the_same_time(self, raw: RawDirectory) -> None:
        raw.write("a", CONTENT)
        starts = [number * 997 % (len(CONTENT) - 5000) for number in range(200)]
        with raw.files().open("a") as file, ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda start: read(file, start, 1, 4000, 999), starts))
        assert found == [cut(CONTENT, start, 1, 4000, 999) for start in starts]

    def test_threads_open_files_of_one_directory_at_the_same_time(self, raw: RawDirectory) -> None:
        contents = {f"{number}": CONTENT[: number * 1000] for number in range(20)}
        for name, content in contents.items():
            raw.write(name, content)
        files = raw.files()

        def whole(name: str) -> bytes:
            return files.read_whole(name, max_nbytes=len(CONTENT))

        with ThreadPoolExecutor(8) as pool:
            names = list(contents) * 3
            assert list(pool.map(whole, names)) == [contents[name] for name in names]

    def test_read_whole_returns_a_file_up_to_the_limit(self, raw: RawDirectory) -> None:
        raw.write("a", b"12345")
        raw.write("empty", b"")
        files = raw.files()
        assert files.read_whole("a", max_nbytes=5) == b"12345"
        assert files.read_whole("empty", max_nbytes=0) == b""

    def test_read_whole_is_refused_when_the_file_is_larger_than_the_limit(
        self, raw: RawDirectory
    ) -> None:
        raw.write("a", b"12345")
        with pytest.raises(CorruptCheckpointError, match="larger") as caught:
            raw.files().read_whole("a", max_nbytes=4)
        error = caught.value
        assert (error.path, error.expected) == (f"{raw.path}/a", "at most 4 bytes")
        assert error.found == "5 bytes"

    # Function-scoped: each example writes into a directory of its own. Executors: hypothesis sees
    # one test run by several classes, and the failures that it keeps suit all of them.
    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
    )
    @given(
        model=st.dictionaries(st.sampled_from(MODEL_NAMES), st.binary(max_size=120), min_size=1),
        reads=st.lists(
            st.tuples(st.integers(0, 130), st.lists(st.integers(0, 60), max_size=5)), max_size=8
        ),
    )
    def test_backend_agrees_with_a_model_in_memory(
        self, raw: RawDirectory, model: dict[str, bytes], reads: list[tuple[int, list[int]]]
    ) -> None:
        folder = f"model-{next(_numbers)}"
        for name, content in model.items():
            raw.write(f"{folder}/{name}", content)
        files = raw.files().below(folder)
        assert files.names() == sorted(name for name in model if "/" not in name)
        sizes = {name: len(content) for name, content in model.items()}
        assert list(files.tree().items()) == sorted(sizes.items())
        for name in MODEL_NAMES:
            assert files.has(name) == (name in model)
        for name, content in model.items():
            with files.open(name) as file:
                for start, lengths in reads:
                    self._check_read(file, content, start, lengths)

    def _check_read(self, file: InputFile, content: bytes, start: int, lengths: list[int]) -> None:
        if sum(lengths) and start + sum(lengths) > len(content):
            with pytest.raises(ReadError, match="ends too early"):
                read(file, start, *lengths)
        else:
            assert read(file, start, *lengths) == cut(content, start, *lengths)
