"""S3Store: what every object store promises, on two servers, and what only S3 has."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import ConfigError, WriteError
from dcp_hf_writer.storage.object_contract import Abilities, SentPart, Upload
from dcp_hf_writer.storage.open_store import open_store
from dcp_hf_writer.storage.s3_store import MAX_PARTS, MIN_PART_NBYTES, S3Store
from support.object_conformance import (
    TOKEN,
    ObjectConformance,
    RawStore,
    patience,
    views,
)
from support.processes import status_of_fork
from support.s3_servers import cached_session

if TYPE_CHECKING:
    from dcp_hf_writer.storage.object_contract import ObjectStore
    from support.s3_servers import S3Bucket

ROOT = "run/step-1"


class RawS3(RawStore):
    def __init__(self, bucket: S3Bucket) -> None:
        self.bucket = bucket

    def store(self) -> ObjectStore:
        options = cached_session(self.bucket.storage_options)
        return open_store(f"{self.bucket.url}/{ROOT}", options)

    def content(self, key: str) -> bytes | None:
        return self.bucket.content(f"{ROOT}/{key}") if key in set(self.keys()) else None

    def keys(self) -> list[str]:
        every = self.bucket.keys()
        return sorted(key.removeprefix(f"{ROOT}/") for key in every if key.startswith(f"{ROOT}/"))

    def write_beside(self, name: str, data: bytes) -> None:
        self.bucket.client().put_object(Bucket=self.bucket.name, Key=f"{ROOT}{name}", Body=data)


class TestS3Store(ObjectConformance):
    @pytest.fixture
    def raw(self, s3_bucket: S3Bucket) -> RawS3:
        return RawS3(s3_bucket)

    def test_abilities_are_what_the_server_does(self, raw: RawS3, store: ObjectStore) -> None:
        # moto honours conditional writes, rclone ignores them: a probe finds out.
        honours = raw.bucket.kind == "moto"
        assert store.abilities == Abilities(
            shares_uploads=True,
            creates_if_absent=honours,
            part_nbytes=MIN_PART_NBYTES,
            max_parts=MAX_PARTS,
        )
        assert raw.bucket.keys() == []

    def test_objects_carry_the_token(self, store: ObjectStore) -> None:
        store.put("a", views(b"x"), token=TOKEN, patience=patience())
        upload = store.begin_upload("b", token=TOKEN, patience=patience())
        part = store.send_part(upload, 1, views(b"y"), patience=patience())
        store.complete(upload, [part], patience=patience())
        for key in ("a", "b"):
            facts = store.facts_of(key, patience=patience())
            assert facts is not None
            assert facts.token == TOKEN

    def test_another_store_sends_parts_of_an_upload(self, raw: RawS3, store: ObjectStore) -> None:
        upload = store.begin_upload("a", token=TOKEN, patience=patience())
        other = raw.store()
        given = pickle.loads(pickle.dumps(upload))
        first = other.send_part(given, 1, views(b"x" * MIN_PART_NBYTES), patience=patience())
        other.close()
        last = store.send_part(upload, 2, views(b"y"), patience=patience())
        store.complete(upload, [last, first], patience=patience())
        assert raw.content("a") == b"x" * MIN_PART_NBYTES + b"y"

    def test_uploads_lists_what_is_open_below_the_prefix(
        self, raw: RawS3, store: ObjectStore
    ) -> None:
        begun = [store.begin_upload(key, token=TOKEN, patience=patience()) for key in ("a/1", "b")]
        assert list(store.uploads("a/", patience=patience())) == [
            Upload("a/1", begun[0].upload_id, "")
        ]
        assert len(raw.bucket.open_uploads()) == 2

    def test_store_works_in_a_forked_child_that_inherits_it(
        self, raw: RawS3, store: ObjectStore
    ) -> None:
        # S18: the client of s3fs refuses to work there.
        store.put("a", views(b"x"), token=TOKEN, patience=patience())
        assert status_of_fork(_put_in_child, store) == 0
        assert raw.keys() == ["a", "child"]
        store.put("after", views(b"x"), token=TOKEN, patience=patience())


def _put_in_child(store: ObjectStore) -> None:
    inherited = store._requests._client()._fs  # type: ignore[attr-defined]
    assert inherited._pid  # a client of this process
    store.put("child", views(b"x"), token=TOKEN, patience=patience())


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([MIN_PART_NBYTES - 1, 5], "parts of 5242879 to 5242879 bytes"),
        ([MIN_PART_NBYTES, MIN_PART_NBYTES + 1, 5], "parts of 5242880 to 5242881 bytes"),
        ([MIN_PART_NBYTES, MIN_PART_NBYTES + 1], "a last part of 5242881 bytes"),
        ([MIN_PART_NBYTES] * (MAX_PARTS + 1), "10001 parts"),
    ],
)
def test_complete_refuses_parts_that_some_server_would(sizes: list[int], found: str) -> None:
    # S14. Nothing is sent, so there is no server.
    store = S3Store("bucket", "root")
    parts = [SentPart(number, nbytes, "etag") for number, nbytes in enumerate(sizes, 1)]
    with pytest.raises(WriteError, match=found):
        store.complete(Upload("a", "id", TOKEN), parts, patience=patience())


def test_store_is_not_pickled() -> None:
    store = S3Store("bucket", "root", storage_options={"secret": "hidden-secret"})
    with pytest.raises(TypeError, match="open the store in each process"):
        pickle.dumps(store)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///key", "s3://key:secret@bucket/a", "s3://bucket/a?versionId=1"]
)
def test_open_store_refuses_a_url_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_store(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [("s3://bucket", "s3://bucket"), ("s3a://b/run/step-1/", "s3://b/run/step-1")],
)
def test_open_store_takes_s3_urls(url: str, shown: str) -> None:
    assert open_store(url).url == shown


def test_open_store_names_no_option_when_s3fs_refuses_one() -> None:
    store = open_store("s3://bucket", {"key": "k", "username": "hidden-user", "secret": "hidden"})
    with pytest.raises(ConfigError) as raised:
        store.facts_of("a", patience=patience())
    assert "hidden" not in str(raised.value)
