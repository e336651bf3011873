"""What every object store promises, as tests that each of them inherits.

A store's test module subclasses `ObjectConformance` and gives it a fixture `raw`. `raw` looks at
the storage by other means than the code under test.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import SaveTimeoutError, WriteError
from dcp_hf_writer.storage.object_contract import ObjectFacts, Patience

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.storage.object_contract import ObjectStore, SentPart, Upload

TOKEN = "save-1"  # noqa: S105 - no secret
OTHER_TOKEN = "save-2"  # noqa: S105 - no secret


class RawStore(ABC):
    """The storage below one URL, which the code under test writes and this looks at."""

    @abstractmethod
    def store(self) -> ObjectStore:
        """Open the store under test."""

    @abstractmethod
    def content(self, key: str) -> bytes | None:
        """Return the bytes of an object; `None` if there is none."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Return the keys of all objects below the root."""

    @abstractmethod
    def write_beside(self, name: str, data: bytes) -> None:
        """Write an object whose key is that of the root with `name` appended."""


def patience(seconds: float = 60) -> Patience:
    return Patience(time.monotonic() + seconds)


def views(*pieces: bytes) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


def send_all(store: ObjectStore, upload: Upload, pieces: list[bytes]) -> list[SentPart]:
    return [
        store.send_part(upload, number, views(piece), patience=patience())
        for number, piece in enumerate(pieces, 1)
    ]


class ObjectConformance:
    """The promises of `ObjectStore`."""

    @pytest.fixture
    def raw(self) -> RawStore:
        raise NotImplementedError

    @pytest.fixture
    def store(self, raw: RawStore) -> Iterator[ObjectStore]:
        store = raw.store()
        yield store
        store.close()

    def test_put_makes_the_object_of_all_buffers(self, raw: RawStore, store: ObjectStore) -> None:
        data = views(b"ab", b"", b"cde")
        assert store.put("d/a", data, token=TOKEN, patience=patience()) is True
        assert raw.content("d/a") == b"abcde"
        assert raw.keys() == ["d/a"]

    def test_put_makes_an_empty_object_when_there_is_no_byte(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        assert store.put("a", [], token=TOKEN, patience=patience()) is True
        assert raw.content("a") == b""

    def test_put_takes_buffers_of_any_format(self, raw: RawStore, store: ObjectStore) -> None:
        words = memoryview(bytes(range(16))).cast("I")
        store.put("a", [words], token=TOKEN, patience=patience())
        assert raw.content("a") == bytes(range(16))

    def test_put_replaces_an_object(self, raw: RawStore, store: ObjectStore) -> None:
        store.put("a", views(b"old"), token=OTHER_TOKEN, patience=patience())
        assert store.put("a", views(b"newer"), token=TOKEN, patience=patience()) is True
        assert raw.content("a") == b"newer"

    def test_put_if_absent_makes_the_object_when_there_is_none(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        made = store.put("a", views(b"x"), token=TOKEN, patience=patience(), if_absent=True)
        assert made is True
        assert raw.content("a") == b"x"
        assert raw.keys() == ["a"]

    def test_put_if_absent_leaves_the_object_of_another_call(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        store.put("a", views(b"old"), token=OTHER_TOKEN, patience=patience())
        made = store.put("a", views(b"new"), token=TOKEN, patience=patience(), if_absent=True)
        assert made is False
        assert raw.content("a") == b"old"

    def test_one_of_many_wins_when_they_create_at_the_same_moment(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        def create(number: int) -> bool:
            token, data = f"save-{number}", views(b"%d" % number)
            return store.put("a", data, token=token, patience=patience(), if_absent=True)

        if not store.abilities.creates_if_absent:
            # No promise at the same moment; one after another holds, see above.
            assert [create(0), create(1)] == [True, False]
            return
        with ThreadPoolExecutor(4) as threads:
            won = list(threads.map(create, range(4)))
        assert won.count(True) == 1
        assert raw.content("a") == b"%d" % won.index(True)

    def test_facts_hold_size_and_token_when_the_object_is_there(self, store: ObjectStore) -> None:
        store.put("d/a", views(b"abc"), token=TOKEN, patience=patience())
        facts = store.facts_of("d/a", patience=patience())
        assert facts is not None
        assert (facts.key, facts.nbytes) == ("d/a", 3)
        assert facts.token in {TOKEN, None}

    def test_facts_are_none_when_nothing_is_there(self, store: ObjectStore) -> None:
        assert store.facts_of("a", patience=patience()) is None

    def test_read_returns_the_bytes(self, store: ObjectStore) -> None:
        store.put("a", views(b"abc"), token=TOKEN, patience=patience())
        assert store.read("a", max_nbytes=3, patience=patience()) == b"abc"
        assert store.read("b", max_nbytes=3, patience=patience()) is None

    def test_read_refuses_an_object_that_is_too_large(self, store: ObjectStore) -> None:
        store.put("a", views(b"abcd"), token=TOKEN, patience=patience())
        with pytest.raises(WriteError, match="at most 3 bytes"):
            store.read("a", max_nbytes=3, patience=patience())

    def test_upload_is_invisible_until_it_is_complete(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        upload = store.begin_upload("d/a", token=TOKEN, patience=patience())
        parts = send_all(store, upload, [b"last"])
        assert raw.keys() == []
        assert store.facts_of("d/a", patience=patience()) is None
        store.complete(upload, parts, patience=patience())
        assert raw.content("d/a") == b"last"
        assert list(store.uploads("", patience=patience())) == []

    def test_upload_joins_its_parts_by_number(self, raw: RawStore, store: ObjectStore) -> None:
        size = max(1, store.abilities.part_nbytes)
        pieces = [random.Random(n).randbytes(size) for n in range(3)]
        pieces.append(b"end")
        upload = store.begin_upload("a", token=TOKEN, patience=patience())
        if store.abilities.shares_uploads:
            with ThreadPoolExecutor(4) as threads:
                parts = list(
                    threads.map(
                        lambda n: store.send_part(
                            upload, n, views(pieces[n - 1]), patience=patience()
                        ),
                        (4, 2, 3, 1),
                    )
                )
        else:
            parts = send_all(store, upload, pieces)
        store.complete(upload, parts, patience=patience())
        assert raw.content("a") == b"".join(pieces)
        facts = store.facts_of("a", patience=patience())
        assert facts is not None
        assert facts.nbytes == 3 * size + 3

    def test_part_counts_once_when_it_is_sent_twice(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        if not store.abilities.shares_uploads:
            # Parts come in order there, each once.
            return
        upload = store.begin_upload("a", token=TOKEN, patience=patience())
        # With other bytes, some servers refuse: they have passed the first ones on.
        parts = [store.send_part(upload, 1, views(b"same"), patience=patience()) for _ in range(2)]
        store.complete(upload, parts[1:], patience=patience())
        assert raw.content("a") == b"same"

    def test_complete_replaces_an_object(self, raw: RawStore, store: ObjectStore) -> None:
        store.put("a", views(b"old"), token=OTHER_TOKEN, patience=patience())
        upload = store.begin_upload("a", token=TOKEN, patience=patience())
        parts = send_all(store, upload, [b"new"])
        assert raw.content("a") == b"old"
        store.complete(upload, parts, patience=patience())
        assert raw.content("a") == b"new"

    @pytest.mark.parametrize("numbers", [[], [2], [1, 3], [1, 1]])
    def test_complete_refuses_parts_with_a_gap(
        self, raw: RawStore, store: ObjectStore, numbers: list[int]
    ) -> None:
        size = max(1, store.abilities.part_nbytes)
        upload = store.begin_upload("a", token=TOKEN, patience=patience())
        sent = send_all(store, upload, [b"x" * size] * 3)
        with pytest.raises(WriteError):
            store.complete(upload, [sent[n - 1] for n in numbers], patience=patience())
        assert raw.keys() == []
        store.abort(upload, patience=patience())

    def test_abort_leaves_nothing_and_may_be_repeated(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        upload = store.begin_upload("a", token=TOKEN, patience=patience())
        parts = send_all(store, upload, [b"x"])
        store.abort(upload, patience=patience())
        store.abort(upload, patience=patience())
        assert list(store.uploads("", patience=patience())) == []
        with pytest.raises(WriteError):
            store.complete(upload, parts, patience=patience())
        assert raw.keys() == []

    def test_send_part_fails_when_the_upload_was_aborted(self, store: ObjectStore) -> None:
        upload = store.begin_upload("a", token=TOKEN, patience=patience())
        store.abort(upload, patience=patience())
        with pytest.raises(WriteError):
            store.send_part(upload, 1, views(b"x"), patience=patience())

    def test_uploads_of_one_key_do_not_disturb_each_other(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        first = store.begin_upload("a", token=TOKEN, patience=patience())
        second = store.begin_upload("a", token=OTHER_TOKEN, patience=patience())
        parts = send_all(store, first, [b"first"])
        send_all(store, second, [b"second"])
        store.abort(second, patience=patience())
        store.complete(first, parts, patience=patience())
        assert raw.content("a") == b"first"

    def test_listings_hold_what_begins_with_the_prefix(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        raw.write_beside("-2/foreign", b"x")
        for key in ("a/1", "a/2", "ab", "b"):
            store.put(key, views(key.encode()), token=TOKEN, patience=patience())
        found = sorted(store.objects("a", patience=patience()), key=lambda one: one.key)
        assert found == [ObjectFacts("a/1", 3), ObjectFacts("a/2", 3), ObjectFacts("ab", 2)]
        every = sorted(one.key for one in store.objects("", patience=patience()))
        assert every == ["a/1", "a/2", "ab", "b"]
        assert list(store.objects("none/", patience=patience())) == []

    def test_listing_is_fresh_when_an_object_was_made_after_the_last(
        self, store: ObjectStore
    ) -> None:
        assert list(store.objects("", patience=patience())) == []
        store.put("a", views(b"x"), token=TOKEN, patience=patience())
        assert [one.key for one in store.objects("", patience=patience())] == ["a"]

    def test_delete_removes_these_objects_only(self, raw: RawStore, store: ObjectStore) -> None:
        for key in ("a", "b/c", "d"):
            store.put(key, views(b"x"), token=TOKEN, patience=patience())
        store.delete(["a", "b/c", "gone"], patience=patience())
        assert raw.keys() == ["d"]
        store.delete([], patience=patience())

    def test_nothing_is_sent_when_the_save_was_given_up(
        self, raw: RawStore, store: ObjectStore
    ) -> None:
        def given_up() -> None:
            raise RuntimeError("given up")

        stopped = Patience(time.monotonic() + 60, given_up)
        with pytest.raises(RuntimeError, match="given up"):
            store.put("a", views(b"x"), token=TOKEN, patience=stopped)
        with pytest.raises(RuntimeError, match="given up"):
            store.begin_upload("a", token=TOKEN, patience=stopped)
        assert raw.keys() == []

    def test_nothing_is_sent_after_the_deadline(self, raw: RawStore, store: ObjectStore) -> None:
        over = patience(-1)
        with pytest.raises(SaveTimeoutError):
            store.put("a", views(b"x"), token=TOKEN, patience=over)
        assert raw.keys() == []
