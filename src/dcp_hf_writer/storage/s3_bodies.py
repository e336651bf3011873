"""Bodies of S3 requests, made of buffers without copies, and the digests that confirm them."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

# The event loop sends one slice at a time: small enough to serve other connections in between,
# large enough that their number does not matter.
_SLICE_NBYTES = 1 << 20
_MD5 = re.compile(r"[0-9a-f]{32}")

Verdict = Literal["same", "other", "unknown"]


class BufferBody:
    """Buffers as one body of known size. It can be sent again: each iteration begins anew.

    botocore looks for `read`, `seek` and `tell`, and hashes the body with them. aiohttp sends the
    slices of the asynchronous iterator. It would read a file in pieces of 64 KiB, each by another
    thread.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        """Keep references to the buffers: the caller must not change them before the request ends.

        Args:
            buffers: Contiguous buffers, one after another.
        """
        self._slices = [
            flat[start : start + _SLICE_NBYTES]
            for flat in (buffer.cast("B") for buffer in buffers if buffer.nbytes)
            for start in range(0, flat.nbytes, _SLICE_NBYTES)
        ]
        self.nbytes = sum(piece.nbytes for piece in self._slices)
        self._position = 0

    def read(self, nbytes: int | None = -1) -> bytes:
        """Return the next bytes, at most `nbytes`; all that are left if it is negative."""
        left = self.nbytes - self._position
        wanted = left if nbytes is None or nbytes < 0 else min(nbytes, left)
        found, start = [], 0
        for piece in self._slices:
            first = max(0, self._position - start)
            last = min(piece.nbytes, self._position + wanted - start)
            if first < last:
                found.append(piece[first:last])
            start += piece.nbytes
        self._position += wanted
        return b"".join(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte, as files do."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.nbytes}[whence]
        self._position = min(max(0, origin + offset), self.nbytes)
        return self._position

    def tell(self) -> int:
        """Return the position, in bytes."""
        return self._position

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for piece in self._slices:
            yield piece


class BodyDigest:
    """Digests of the bytes of a request, to be compared with what the store returns."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        """Compute the MD5 digest; the CRC only when a store asks for it."""
        self._buffers = buffers
        md5 = hashlib.md5(usedforsecurity=False)
        for buffer in buffers:
            md5.update(buffer)
        self.md5_hex = md5.hexdigest()
        self.md5_base64 = base64.b64encode(md5.digest()).decode()
        self._refuted: set[str] = set()

    def crc32_base64(self) -> str:
        """Return the CRC-32 as S3 writes it."""
        crc = 0
        for buffer in self._buffers:
            crc = zlib.crc32(buffer, crc)
        return base64.b64encode(crc.to_bytes(4, "big")).decode()

    def differs(self, head: Mapping[str, Any]) -> bool:
        """Whether a HEAD request shows an object of other bytes, made in one request."""
        etag = _etag(head)
        return not is_encrypted(head) and bool(_MD5.fullmatch(etag)) and etag != self.md5_hex

    def compare(self, answer: Mapping[str, Any], *, crc32: str | None) -> Verdict:
        """Compare with the answer to the request that sent the bytes.

        Args:
            answer: The answer.
            crc32: What `crc32_base64` returned, if the request has sent it.

        Returns:
            `unknown` if the answer holds no digest that can be compared. This is so for ETags
            of encrypted objects, and for an ETag that the store returned twice for these bytes:
            it is no digest, because damage on the way would differ from try to try.

        Source:
            Amazon S3 API reference, "Object": an ETag is the MD5 digest only for objects that are
            neither encrypted with SSE-C or SSE-KMS nor made of parts.
        """
        returned = answer.get("ChecksumCRC32")
        if crc32 is not None and returned is not None:
            return "same" if returned == crc32 else "other"
        etag = _etag(answer)
        if etag == self.md5_hex:
            return "same"
        if is_encrypted(answer) or not _MD5.fullmatch(etag) or etag in self._refuted:
            return "unknown"
        self._refuted.add(etag)
        return "other"


def has_etag_of_parts(answer: Mapping[str, Any], etags: Sequence[str]) -> bool:
    """Whether the answer to a completed upload names the digest of exactly these parts.

    Args:
        answer: The answer.
        etags: ETag of each part, in order.

    Returns:
        False also if the store's ETags are no digests: then the answer proves nothing.

    Source:
        Amazon S3 does not document it: the ETag of an object made of parts is the MD5 digest of
        their MD5 digests, then `-` and their number. Other servers do the same.
    """
    digests = [etag.strip('"').lower() for etag in etags]
    if not all(map(_MD5.fullmatch, digests)):
        return False
    joined = hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False)
    return _etag(answer) == f"{joined.hexdigest()}-{len(digests)}"


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"').lower()


def is_encrypted(answer: Mapping[str, Any]) -> bool:
    """Whether the store encrypts in a way that makes an ETag useless as a digest."""
    by_kms = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return by_kms or "SSECustomerAlgorithm" in answer
