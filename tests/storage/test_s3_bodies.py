"""Bodies of S3 requests and the digests that confirm them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random

import pytest

from dcp_hf_writer.storage.s3_bodies import BodyDigest, BufferBody, has_etag_of_parts

DATA = random.Random(0).randbytes(3_000_000)
PIECES = [memoryview(DATA)[:10], memoryview(b""), memoryview(DATA)[10:2_000_000]]
PIECES.append(memoryview(DATA)[2_000_000:])
MD5 = hashlib.md5(DATA, usedforsecurity=False).hexdigest()
OTHER = "0" * 32


async def collect(body: BufferBody) -> list[memoryview]:
    return [piece async for piece in body]


def test_body_yields_its_buffers_without_copies_each_time() -> None:
    body = BufferBody(PIECES)
    for _ in range(2):
        slices = asyncio.run(collect(body))
        assert b"".join(slices) == DATA
        assert all(piece.obj is DATA for piece in slices)


def test_body_reads_and_seeks_as_a_file_does() -> None:
    body, file = BufferBody(PIECES), io.BytesIO(DATA)
    steps = random.Random(1)
    for _ in range(50):
        whence = steps.choice((io.SEEK_SET, io.SEEK_CUR, io.SEEK_END))
        target = steps.randrange(len(DATA))
        offset = {0: target, 1: target - file.tell(), 2: target - len(DATA)}[whence]
        assert body.seek(offset, whence) == file.seek(offset, whence)
        nbytes = steps.choice((-1, 0, 1, 1_500_000))
        assert body.read(nbytes) == file.read(nbytes)
        assert body.tell() == file.tell()


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ({"ETag": f'"{MD5}"'}, "same"),
        ({"ETag": f'"{MD5.upper()}"'}, "same"),
        ({"ETag": f'"{OTHER}"'}, "other"),
        ({"ETag": f'"{OTHER}"', "ServerSideEncryption": "AES256"}, "other"),
        ({"ETag": f'"{OTHER}"', "ServerSideEncryption": "aws:kms"}, "unknown"),
        ({"ETag": f'"{OTHER}"', "SSECustomerAlgorithm": "AES256"}, "unknown"),
        ({"ETag": '"a-name-of-its-own"'}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_digest_compares_with_the_etag(answer: dict[str, str], verdict: str) -> None:
    assert BodyDigest(PIECES).compare(answer, crc32=None) == verdict


def test_digest_prefers_the_crc_that_was_asked_for() -> None:
    digest = BodyDigest(PIECES)
    crc = digest.crc32_base64()
    encrypted = {"ETag": OTHER, "ServerSideEncryption": "aws:kms"}
    assert digest.compare({**encrypted, "ChecksumCRC32": crc}, crc32=crc) == "same"
    assert digest.compare({**encrypted, "ChecksumCRC32": "AAAAAA=="}, crc32=crc) == "other"
    assert BodyDigest([memoryview(b"123456789")]).crc32_base64() == "y/Q5Jg=="


def test_etag_is_no_digest_when_it_comes_twice_for_the_same_bytes() -> None:
    digest = BodyDigest(PIECES)
    verdicts = [digest.compare({"ETag": OTHER}, crc32=None) for _ in range(2)]
    assert verdicts == ["other", "unknown"]


def test_etag_of_an_object_made_of_parts_names_its_parts_in_order() -> None:
    md5 = [hashlib.md5(piece, usedforsecurity=False) for piece in (b"first", b"last")]
    etags = [f'"{one.hexdigest()}"' for one in md5]
    whole = hashlib.md5(md5[0].digest() + md5[1].digest(), usedforsecurity=False).hexdigest()
    assert has_etag_of_parts({"ETag": f'"{whole.upper()}-2"'}, etags)
    assert not has_etag_of_parts({"ETag": f'"{whole}-2"'}, etags[::-1])
    assert not has_etag_of_parts({"ETag": f'"{whole}-1"'}, etags)
    assert not has_etag_of_parts({"ETag": f'"{whole}"'}, etags)
    assert not has_etag_of_parts({}, etags)


def test_etags_that_are_no_digests_prove_nothing() -> None:
    whole = hashlib.md5(b"", usedforsecurity=False).hexdigest()
    assert not has_etag_of_parts({"ETag": f"{whole}-1"}, ["opaque"])
