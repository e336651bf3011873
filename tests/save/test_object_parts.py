"""One object that a rank sends in order: whole, or in parts on a grid."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import WriteError
from dcp_hf_writer.save.object_parts import SentObject, in_flight_of, part_nbytes_of
from dcp_hf_writer.storage.object_contract import Abilities, ObjectStore, Patience
from dcp_hf_writer.storage.open_store import open_store

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

MIB = 1 << 20
S3 = Abilities(shares_uploads=True, creates_if_absent=True, part_nbytes=5 * MIB, max_parts=10_000)


@pytest.mark.parametrize(
    ("nbytes", "usual", "expected"),
    [
        (0, 64 * MIB, 64 * MIB),
        (100 << 30, 64 * MIB, 64 * MIB),
        (10_000 * 64 * MIB, 64 * MIB, 64 * MIB),
        (10_000 * 64 * MIB + 1, 64 * MIB, 65 * MIB),
        (5 << 40, 64 * MIB, 525 * MIB),
        (1, MIB, 5 * MIB),
    ],
)
def test_parts_grow_until_they_are_few_enough(nbytes: int, usual: int, expected: int) -> None:
    found = part_nbytes_of(nbytes, S3, usual_nbytes=usual)
    assert found == expected
    assert -(-nbytes // found) <= S3.max_parts


def patience() -> Patience:
    return Patience(time.monotonic() + 60)


def begun(store: ObjectStore, part_nbytes: int) -> SentObject:
    return SentObject(
        store,
        "a",
        token="save",  # noqa: S106 - no secret
        patience=patience(),
        part_nbytes=part_nbytes,
        in_flight=in_flight_of(store.abilities),
    )


@pytest.fixture
def memory(tmp_path: Path) -> ObjectStore:
    return open_store(f"memory://run{tmp_path}")


@pytest.mark.parametrize("sizes", [[], [0], [3], [10], [4, 6], [4, 7], [25], [1] * 31, [10, 10]])
def test_object_holds_the_buffers_in_order(memory: ObjectStore, sizes: list[int]) -> None:
    pieces = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]
    sent, offset = begun(memory, 10), 0
    for piece in pieces:
        offset = sent.write_many([memoryview(piece)], offset)
    sent.finish()
    assert memory.read("a", max_nbytes=100, patience=patience()) == b"".join(pieces)
    assert offset == sum(sizes)


def test_buffers_out_of_order_are_refused(memory: ObjectStore) -> None:
    sent = begun(memory, 10)
    sent.write_many([memoryview(b"abc")], 0)
    with pytest.raises(WriteError, match="in the order of its bytes"):
        sent.write_many([memoryview(b"d")], 2)
    sent.discard(patience())


def test_nothing_is_left_when_an_object_is_given_up(memory: ObjectStore) -> None:
    sent = begun(memory, 10)
    sent.write_many([memoryview(bytes(35))], 0)
    sent.discard(patience())
    sent.discard(patience())
    assert list(memory.objects("", patience=patience())) == []
    assert list(memory.uploads("", patience=patience())) == []


def test_error_of_a_part_is_raised(memory: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WriteError("injected")

    monkeypatch.setattr(memory, "send_part", refuse)
    sent = begun(memory, 10)

    def send_all() -> None:
        # The part is refused in the background: a later write or the end raises it.
        sent.write_many([memoryview(bytes(35))], 0)
        sent.finish()

    with pytest.raises(WriteError, match="injected"):
        send_all()
    sent.discard(patience())
    assert list(memory.uploads("", patience=patience())) == []


def test_parts_of_an_s3_object_are_sent_at_the_same_time(moto: S3Server) -> None:
    bucket = moto.new_bucket()
    store = open_store(bucket.url, bucket.storage_options)
    data = random.Random(0).randbytes(12 * MIB)
    sent = begun(store, 5 * MIB)
    view, offset = memoryview(data), 0
    for start in range(0, len(data), 3 * MIB):
        offset = sent.write_many([view[start : start + 3 * MIB]], offset)
    sent.finish()
    assert bucket.content("a") == data
    assert bucket.open_uploads() == []
    store.close()
