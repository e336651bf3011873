"""S3Store when requests, answers and servers fail: the faults S1 to S20 of object stores."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import pickle
import random
import time
import traceback
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import CheckpointError, SaveTimeoutError, WriteError
from dcp_hf_writer.storage import object_retries, s3_probes, s3_store
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.open_store import open_store
from dcp_hf_writer.storage.s3_store import MIN_PART_NBYTES, S3Store
from support.fault_proxy import fault_proxy
from support.object_conformance import OTHER_TOKEN, TOKEN, patience, send_all, views
from support.s3_servers import ACCESS_KEY, SECRET_KEY, cached_session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.storage.object_contract import ObjectStore
    from support.fault_proxy import FaultProxy
    from support.s3_servers import S3Bucket, S3Server

PART = random.Random(0).randbytes(MIN_PART_NBYTES)
LAST = b"the last part"

PUT_PART = r"partNumber="
COMPLETE = r"uploadId="
CREATE = r"\?uploads"
OBJECT = r"/step/a$"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the waits between tries short; how long they are is tested in test_object_retries."""
    monkeypatch.setattr(object_retries, "_FIRST_WAIT_S", 0.005)
    monkeypatch.setattr(object_retries, "_LONGEST_WAIT_S", 0.05)


@pytest.fixture
def store(s3_bucket: S3Bucket, s3_proxy: FaultProxy) -> Iterator[ObjectStore]:
    """A store that reaches its server through the proxy."""
    options = cached_session(s3_bucket.at(s3_proxy.endpoint).storage_options)
    store = open_store(f"{s3_bucket.url}/step", options)
    yield store
    store.close()


def put(store: ObjectStore, data: bytes = b"data", seconds: float = 60) -> bool:
    return store.put("a", views(data), token=TOKEN, patience=patience(seconds))


def connect(store: ObjectStore) -> None:
    """Let the store make its client now: that can take longer than the deadline of a test."""
    assert store.facts_of("nothing", patience=patience()) is None


def save_parts(store: ObjectStore, seconds: float = 60) -> None:
    upload = store.begin_upload("a", token=TOKEN, patience=patience())
    parts = send_all(store, upload, [PART, LAST])
    store.complete(upload, parts, patience=patience(seconds))


@pytest.mark.parametrize("status", [503, 500])
@pytest.mark.parametrize("times", [1, 8])
def test_request_is_sent_again_when_the_server_fails(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore, status: int, times: int
) -> None:
    # S1, S2
    code = {503: "SlowDown", 500: "InternalError"}[status]
    fault = s3_proxy.add("answer", "PUT", OBJECT, status=status, code=code, times=times)
    assert put(store) is True
    assert s3_bucket.content("step/a") == b"data"
    assert fault.hits == times
    # No client library sends it again on its own.
    assert s3_proxy.count("PUT") == times + 1


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError")])
def test_call_ends_at_the_deadline_when_the_server_always_fails(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore, status: int, code: str
) -> None:
    # S1, S2
    connect(store)
    fault = s3_proxy.add("answer", "PUT", OBJECT, status=status, code=code, times=math.inf)
    begun = time.monotonic()
    with pytest.raises(SaveTimeoutError, match=f"{status} {code}") as raised:
        put(store, seconds=1.5)
    assert time.monotonic() - begun < 10
    assert fault.hits > 1
    assert f"{s3_bucket.url}/step/a" in str(raised.value)
    assert s3_bucket.keys() == []


def test_fewer_requests_are_in_flight_when_the_server_asks_for_less(
    s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S1
    limit = store._requests._client().limit  # type: ignore[attr-defined]
    fault = s3_proxy.add("answer", "PUT", OBJECT, status=503, times=3)
    assert put(store) is True
    assert fault.hits == 3
    assert int(limit.limit) == limit.most // 8
    for _ in range(5):
        put(store)
    assert int(limit.limit) > limit.most // 8


def test_part_is_sent_again_when_the_connection_breaks_in_its_body(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S3
    fault = s3_proxy.add("abort", "PUT", PUT_PART, after_nbytes=64 * 1024, times=2)
    save_parts(store)
    assert fault.hits == 2
    assert s3_bucket.content("step/a") == PART + LAST
    assert s3_bucket.open_uploads() == []


def test_part_is_sent_again_when_its_answer_is_lost(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S4
    fault = s3_proxy.add("lose_answer", "PUT", PUT_PART, times=2)
    save_parts(store)
    assert fault.hits == 2
    assert s3_bucket.content("step/a") == PART + LAST


def test_complete_asks_for_no_object_when_its_answer_names_the_digest_of_the_parts(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    save_parts(store)
    assert s3_proxy.count("POST", COMPLETE) == 1
    assert s3_proxy.count("HEAD") == 0
    assert s3_bucket.content("step/a") == PART + LAST


def test_complete_succeeds_when_its_answer_is_lost(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S5: rclone answers a second `complete` with NoSuchUpload; the token on the object decides.
    fault = s3_proxy.add("lose_answer", "POST", COMPLETE)
    save_parts(store)
    assert fault.hits == 1
    assert s3_bucket.content("step/a") == PART + LAST
    assert s3_bucket.open_uploads() == []


def test_complete_fails_when_its_answer_is_lost_and_another_object_came(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S5, negative: an object of the same size that another save made does not count as ours.
    def replace() -> None:
        client = s3_bucket.client()
        metadata = {"dcp-hf-token": OTHER_TOKEN}
        body = b"x" * (len(PART) + len(LAST))
        client.put_object(Bucket=s3_bucket.name, Key="step/a", Body=body, Metadata=metadata)

    s3_proxy.add("lose_answer", "POST", COMPLETE)
    fault = s3_proxy.add("call", "HEAD", OBJECT, then=replace, times=math.inf)
    with pytest.raises(WriteError):
        save_parts(store)
    assert fault.hits >= 1


def test_complete_is_repeated_when_its_answer_is_200_with_an_error(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S6
    fault = s3_proxy.add("answer", "POST", COMPLETE, status=200, code="InternalError", times=2)
    save_parts(store)
    assert fault.hits == 2
    assert s3_bucket.content("step/a") == PART + LAST


def test_complete_does_not_succeed_when_every_answer_is_200_with_an_error(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S6
    fault = s3_proxy.add(
        "answer", "POST", COMPLETE, status=200, code="InternalError", times=math.inf
    )
    with pytest.raises(SaveTimeoutError):
        save_parts(store, seconds=1)
    assert fault.hits > 1
    assert s3_bucket.keys() == []


def test_no_orphan_stays_when_the_answer_of_create_is_lost(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S7. Uploads that others began before stay: of this key, and of a longer one.
    client = s3_bucket.client()
    foreign = {
        (key, client.create_multipart_upload(Bucket=s3_bucket.name, Key=key)["UploadId"])
        for key in ("step/a", "step/ab")
    }
    fault = s3_proxy.add("lose_answer", "POST", CREATE, times=2)
    upload = store.begin_upload("a", token=TOKEN, patience=patience())
    assert fault.hits == 2
    assert set(s3_bucket.open_uploads()) == foreign | {("step/a", upload.upload_id)}


def test_orphans_stay_when_it_is_unclear_whose_they_are(
    s3_bucket: S3Bucket,
    s3_proxy: FaultProxy,
    store: ObjectStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # S7: another party begins an upload of the same key at the same time.
    def begin() -> None:
        s3_bucket.client().create_multipart_upload(Bucket=s3_bucket.name, Key="step/a")

    s3_proxy.add("lose_answer", "POST", CREATE)
    s3_proxy.add("call", "POST", CREATE, then=begin)
    store.begin_upload("a", token=TOKEN, patience=patience())
    assert len(s3_bucket.open_uploads()) == 3
    assert "several owners" in caplog.text


def test_create_if_absent_succeeds_when_its_answer_is_lost(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S8: moto then refuses the second try, because the object is there: it is ours.
    fault = s3_proxy.add("lose_answer", "PUT", OBJECT)
    made = store.put("a", views(b"mine"), token=TOKEN, patience=patience(), if_absent=True)
    assert made is True
    assert fault.hits == 1
    assert s3_bucket.content("step/a") == b"mine"


def test_create_if_absent_fails_when_another_came_first_and_the_answer_is_lost(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S8, negative. Both objects have the same size.
    def create() -> None:
        metadata = {"dcp-hf-token": OTHER_TOKEN}
        client = s3_bucket.client()
        client.put_object(Bucket=s3_bucket.name, Key="step/a", Body=b"them", Metadata=metadata)

    # Twice: aiohttp sends a PUT once more on its own.
    s3_proxy.add("abort", "PUT", OBJECT, times=2)
    s3_proxy.add("call", "HEAD", OBJECT, then=create, skip=int(s3_bucket.kind == "rclone"))
    made = store.put("a", views(b"mine"), token=TOKEN, patience=patience(), if_absent=True)
    assert made is False
    assert s3_bucket.content("step/a") == b"them"


@pytest.mark.parametrize("target", [OBJECT, PUT_PART, COMPLETE])
def test_call_ends_at_the_deadline_when_no_answer_comes(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore, target: str
) -> None:
    # S9
    upload = store.begin_upload("a", token=TOKEN, patience=patience())
    part = store.send_part(upload, 1, views(LAST), patience=patience())
    fault = s3_proxy.add("hang", "PUT|POST", target, times=math.inf)
    begun = time.monotonic()
    calls = {
        OBJECT: lambda: put(store, seconds=1),
        PUT_PART: lambda: store.send_part(upload, 1, views(LAST), patience=patience(1)),
        COMPLETE: lambda: store.complete(upload, [part], patience=patience(1)),
    }
    with pytest.raises(SaveTimeoutError):
        calls[target]()
    assert time.monotonic() - begun < 10
    assert fault.hits == 1
    assert s3_bucket.keys() == []


def test_call_ends_at_the_deadline_when_the_body_is_slow(
    s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S9: 80 pieces of 64 KiB, so at least 40 seconds.
    connect(store)
    fault = s3_proxy.add("slow", "PUT", OBJECT, delay_s=0.5)
    begun = time.monotonic()
    with pytest.raises(SaveTimeoutError):
        put(store, PART, seconds=1)
    assert time.monotonic() - begun < 20
    assert fault.hits == 1


def test_waiting_ends_when_the_save_is_given_up(s3_proxy: FaultProxy, store: ObjectStore) -> None:
    # S9: the check is also called while a request runs.
    fault = s3_proxy.add("hang", "PUT", OBJECT)

    def check() -> None:
        if fault.hits:
            raise RuntimeError("given up")

    with pytest.raises(RuntimeError, match="given up"):
        store.put("a", views(b"x"), token=TOKEN, patience=Patience(time.monotonic() + 60, check))


def test_request_is_sent_again_when_one_hangs(s3_bucket: S3Bucket, s3_proxy: FaultProxy) -> None:
    # S9: a hang ends at the read timeout, which users may set.
    options = s3_bucket.at(s3_proxy.endpoint).storage_options
    store = open_store(f"{s3_bucket.url}/step", {**options, "config_kwargs": {"read_timeout": 1}})
    fault = s3_proxy.add("hang", "PUT", OBJECT)
    assert put(store) is True
    assert fault.hits == 1
    store.close()


def test_part_is_sent_again_when_a_bit_flips_on_the_way(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S10
    fault = s3_proxy.add("flip", "PUT", PUT_PART)
    if s3_bucket.kind == "rclone":
        # It has passed the part on already, and does not take it again: the save fails.
        with pytest.raises(WriteError, match="cannot be replaced"):
            save_parts(store)
        assert fault.hits == 1
        assert s3_bucket.keys() == []
        return
    save_parts(store)
    assert fault.hits == 1
    assert s3_proxy.count("PUT", PUT_PART) == 3
    assert s3_bucket.content("step/a") == PART + LAST


@pytest.mark.parametrize("if_absent", [False, True])
def test_object_is_sent_again_when_a_bit_flips_on_the_way(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore, *, if_absent: bool
) -> None:
    # S10: with a conditional put, the damaged object is already there.
    fault = s3_proxy.add("flip", "PUT", OBJECT)
    made = store.put("a", views(PART), token=TOKEN, patience=patience(), if_absent=if_absent)
    assert made is True
    assert fault.hits == 1
    assert s3_bucket.content("step/a") == PART


def test_save_fails_when_the_server_drops_an_upload_for_a_damaged_part(
    rclone: S3Server,
) -> None:
    # S10: rclone does so if the request has a Content-MD5, as requests over TLS do.
    bucket = rclone.new_bucket()
    with fault_proxy(rclone.endpoint) as proxy:
        store = S3Store(bucket.name, "", storage_options=bucket.at(proxy.endpoint).storage_options)
        store._sends_md5 = True
        fault = proxy.add("flip", "PUT", PUT_PART)
        with pytest.raises(WriteError, match="after a part that arrived damaged"):
            save_parts(store)
        assert fault.hits == 1
        assert bucket.keys() == []
        store.close()


@pytest.mark.parametrize(
    ("options", "sends"),
    [
        ({}, True),
        ({"use_ssl": False}, False),
        ({"endpoint_url": "https://host"}, True),
        ({"endpoint_url": "http://host"}, False),
        ({"client_kwargs": {"endpoint_url": "http://host"}}, False),
    ],
)
def test_digest_goes_with_the_request_when_there_is_tls(
    options: dict[str, object], *, sends: bool
) -> None:
    assert S3Store("bucket", "", storage_options=options)._sends_md5 is sends


def test_upload_is_begun_with_a_checksum_when_the_store_encrypts(
    moto: S3Server,
) -> None:
    # S10: the ETags of encrypted objects are no digests.
    bucket = moto.new_bucket()
    encrypted = {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms"}}
    with fault_proxy(moto.endpoint) as proxy:
        options = cached_session(bucket.at(proxy.endpoint).storage_options)
        store = open_store(f"{bucket.url}/step", {**options, **encrypted})
        save_parts(store)
        assert bucket.content("step/a") == PART + LAST
        assert bucket.open_uploads() == []
        # The first upload was begun without a checksum, and begun again.
        assert proxy.count("POST", CREATE) == 2
        save_parts(store)
        assert proxy.count("POST", CREATE) == 3
        # moto does not return the checksum of a part, so damage cannot be told from encryption.
        fault = proxy.add("flip", "PUT", PUT_PART)
        with pytest.raises(WriteError, match="confirms no digest"):
            save_parts(store)
        assert fault.hits == 1
        store.close()


def test_write_fails_when_the_store_confirms_no_digest(moto: S3Server) -> None:
    # S10: moto does not check Content-MD5 either.
    bucket = moto.new_bucket()
    with fault_proxy(moto.endpoint) as proxy:
        store = open_store(bucket.url, cached_session(bucket.at(proxy.endpoint).storage_options))
        fault = proxy.add("answer", "PUT", "/a$", status=200, body=b"", times=math.inf)
        with pytest.raises(WriteError, match="confirms no digest"):
            put(store)
        # The second time, it asks for a CRC.
        assert fault.hits == 2
        assert bucket.keys() == []
        store.close()


def test_plain_client_stores_a_flipped_bit(s3_bucket: S3Bucket, s3_proxy: FaultProxy) -> None:
    # S10, negative control: neither server notices on its own.
    s3_proxy.add("flip", "PUT", OBJECT)
    client = s3_bucket.at(s3_proxy.endpoint).client()
    client.put_object(Bucket=s3_bucket.name, Key="step/a", Body=PART)
    assert s3_bucket.content("step/a") != PART


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")]
)
def test_refusal_is_not_repeated(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore, status: int, code: str
) -> None:
    # S11: credentials end in the middle of a save.
    fault = s3_proxy.add(
        "answer", "PUT", PUT_PART, status=status, code=code, skip=1, times=math.inf
    )
    upload = store.begin_upload("a", token=TOKEN, patience=patience())
    with pytest.raises(WriteError, match=code):
        send_all(store, upload, [PART, LAST])
    assert fault.hits == 1
    store.abort(upload, patience=patience())
    assert s3_bucket.open_uploads() == []


def test_parts_fail_when_another_party_aborted_the_upload(
    s3_bucket: S3Bucket, store: ObjectStore
) -> None:
    # S12
    upload = store.begin_upload("a", token=TOKEN, patience=patience())
    parts = send_all(store, upload, [LAST])
    s3_bucket.client().abort_multipart_upload(
        Bucket=s3_bucket.name, Key="step/a", UploadId=upload.upload_id
    )
    with pytest.raises(WriteError, match="another party has aborted"):
        send_all(store, upload, [PART])
    with pytest.raises(WriteError, match="another party has aborted"):
        store.complete(upload, parts, patience=patience())
    assert s3_bucket.keys() == []


def test_probe_tells_whether_create_if_absent_works(
    s3_bucket: S3Bucket,
    store: ObjectStore,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # S15
    monkeypatch.setattr(s3_probes, "_known", {})
    caplog.set_level(logging.INFO, logger="dcp_hf_writer")
    works = s3_bucket.kind == "moto"
    assert [store.abilities.creates_if_absent for _ in range(2)] == [works, works]
    said = "create-if-absent " + ("works" if works else "is ignored by the server")
    assert caplog.text.count(said) == 1
    assert s3_bucket.keys() == []


def test_listings_go_through_all_pages(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # S19
    monkeypatch.setattr(s3_store, "_PAGE", 2)
    keys = [f"k{n}" for n in range(5)]
    for key in keys:
        store.put(key, views(b"x"), token=TOKEN, patience=patience())
        store.begin_upload(f"u/{key}", token=TOKEN, patience=patience())
    assert [one.key for one in store.objects("", patience=patience())] == keys
    found = [one.key for one in store.uploads("u/", patience=patience())]
    assert found == [f"u/{key}" for key in keys]
    assert s3_proxy.count("GET", "max-keys=2") == 3
    # moto lists all uploads at once.
    pages = 1 if s3_bucket.kind == "moto" else 3
    assert s3_proxy.count("GET", r"prefix=step%2Fu%2F&max-uploads=2") == pages
    store.delete(keys, patience=patience())
    assert s3_bucket.keys() == []
    assert s3_proxy.count("POST", r"\?delete") == 3


def deletion_error(code: str) -> bytes:
    error = f"<Error><Key>step/b</Key><Code>{code}</Code><Message>no</Message></Error>"
    return f"<DeleteResult>{error}</DeleteResult>".encode()


def test_delete_names_what_is_left_when_the_server_deletes_only_some(
    s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S19
    body = deletion_error("AccessDenied")
    fault = s3_proxy.add("answer", "POST", r"\?delete", status=200, body=body)
    with pytest.raises(WriteError, match=r"step/b\).*AccessDenied"):
        store.delete(["a", "b"], patience=patience())
    assert fault.hits == 1


def test_delete_repeats_for_what_is_left_when_the_error_passes(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    # S19
    store.put("b", views(b"x"), token=TOKEN, patience=patience())
    body = deletion_error("InternalError")
    fault = s3_proxy.add("answer", "POST", r"\?delete", status=200, body=body)
    store.delete(["a", "b"], patience=patience())
    assert fault.hits == 1
    assert s3_bucket.keys() == []


def test_delete_goes_one_by_one_when_the_server_has_no_batches(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy, store: ObjectStore
) -> None:
    put(store)
    fault = s3_proxy.add("answer", "POST", r"\?delete", status=501, code="NotImplemented")
    store.delete(["a", "gone"], patience=patience())
    assert fault.hits == 1
    assert s3_bucket.keys() == []


def test_nothing_appears_when_an_upload_is_dropped_half_way(
    s3_bucket: S3Bucket, store: ObjectStore
) -> None:
    # S20
    upload = store.begin_upload("a", token=TOKEN, patience=patience())
    send_all(store, upload, [PART, LAST])
    del upload
    gc.collect()
    assert s3_bucket.keys() == []
    # `gc` finds it.
    assert [one.key for one in store.uploads("", patience=patience())] == ["a"]


def test_file_of_s3fs_appears_when_it_is_dropped_half_way(s3_bucket: S3Bucket) -> None:
    # S20, negative control: this is why the store opens no file.
    import s3fs

    options = cached_session(s3_bucket.storage_options)
    fs = s3fs.S3FileSystem(**options, skip_instance_cache=True)
    with contextlib.suppress(RuntimeError), fs.open(f"{s3_bucket.name}/a", "wb") as file:
        file.write(b"x" * 100)
        raise RuntimeError
    assert s3_bucket.content("a") == b"x" * 100


def test_no_credential_is_shown_when_requests_fail(
    s3_bucket: S3Bucket,
    s3_proxy: FaultProxy,
    store: ObjectStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="dcp_hf_writer")
    echo = f"<Error><Code>InvalidArgument</Code><Message>key {ACCESS_KEY}</Message></Error>"
    errors = []
    for act, more in [
        ("answer", {"status": 400, "body": echo.encode()}),
        ("answer", {"status": 403, "body": echo.encode()}),
        ("abort", {}),
        ("hang", {}),
    ]:
        s3_proxy.faults.clear()
        fault = s3_proxy.add(act, "PUT", OBJECT, times=math.inf, **more)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError) as raised:
            put(store, seconds=0.5)
        assert fault.hits
        errors.append(raised.value)
    lost = {**s3_bucket.storage_options, "endpoint_url": "http://hidden-user:hidden-pw@127.0.0.1:9"}
    nowhere = open_store(f"{s3_bucket.url}/step", lost)
    with pytest.raises(CheckpointError) as raised:
        put(nowhere, seconds=0.5)
    errors.append(raised.value)
    signatures = {one.authorization.rpartition("=")[2] for one in s3_proxy.log}
    assert all(signatures)
    shown = [caplog.text, repr(store), repr(nowhere)]
    for error in errors:
        shown += [str(error), repr(error), str(pickle.dumps(error))]
        shown += traceback.format_exception(error)
    for secret in (ACCESS_KEY, SECRET_KEY, "hidden-user", "hidden-pw", *signatures):
        assert not [text for text in shown if secret in text]
