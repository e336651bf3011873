"""What an S3 server really does, found out once for each bucket and process.

Some servers ignore headers that they do not know. So whether one works shows only in an answer that
refuses.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from base64 import b64encode
from typing import TYPE_CHECKING

from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.object_retries import RequestFault, Retries
from dcp_hf_writer.storage.s3_faults import NO_DIGEST_MATCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.storage.s3_requests import S3Requests

_log = logging.getLogger(__name__)

_PROBE_S = 60.0
_known: dict[tuple[int, str, str, str], bool] = {}
_turn = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_turn=threading.Lock()))


def creates_if_absent(requests: S3Requests, endpoint: str, bucket: str, prefix: str) -> bool:
    """Whether the server refuses to create an object that is there.

    Args:
        requests: Sends the requests.
        endpoint: URL of the server; only compared.
        bucket: Name of the bucket.
        prefix: Prefix of the probe's key. The probe is deleted.

    Raises:
        WriteError: If the store refuses the probe.
        SaveTimeoutError: If the store does not answer within a minute.
    """
    patience = Patience(time.monotonic() + _PROBE_S)

    def probe() -> bool:
        key = f"{prefix}.dcp-hf-probe-{uuid.uuid4().hex}"
        path = f"s3://{bucket}/{key}"
        try:
            for _ in range(2):
                retries = Retries(patience, path=path, what="put_object")
                params = {"Bucket": bucket, "Key": key, "Body": b"", "IfNoneMatch": "*"}
                while True:
                    answer = requests.send("put_object", patience, **params)
                    if not isinstance(answer, RequestFault):
                        break
                    if answer.code in {"PreconditionFailed", "412"}:
                        return True
                    if answer.code in {"NotImplemented", "501"}:
                        return False
                    retries.wait_after(answer)
            return False
        finally:
            _remove(requests, bucket, key, patience)

    return _once("create-if-absent", endpoint, bucket, probe)


def refuses_wrong_digest(
    requests: S3Requests, endpoint: str, bucket: str, prefix: str, patience: Patience
) -> bool:
    """Whether the server refuses bytes that differ from the digest in `Content-MD5`."""

    def probe() -> bool:
        key = f"{prefix}.dcp-hf-probe-{uuid.uuid4().hex}"
        wrong = b64encode(hashlib.md5(b"other", usedforsecurity=False).digest()).decode()
        answer = requests.send(
            "put_object", patience, Bucket=bucket, Key=key, Body=b"probe", ContentMD5=wrong
        )
        if isinstance(answer, RequestFault):
            return answer.code == NO_DIGEST_MATCH
        _remove(requests, bucket, key, patience)
        return False

    return _once("check of Content-MD5", endpoint, bucket, probe)


def _once(what: str, endpoint: str, bucket: str, probe: Callable[[], bool]) -> bool:
    place = (os.getpid(), what, endpoint, bucket)
    with _turn:
        if place not in _known:
            _known[place] = probe()
            found = "works" if _known[place] else "is ignored by the server"
            _log.info("s3://%s: %s %s", bucket, what, found)
        return _known[place]


def _remove(requests: S3Requests, bucket: str, key: str, patience: Patience) -> None:
    """Delete a probe. A probe that stays does no harm: it holds a few bytes at most."""
    answer = requests.send("delete_object", patience, Bucket=bucket, Key=key)
    if isinstance(answer, RequestFault):
        _log.warning("the probe s3://%s/%s is left: %s", bucket, key, answer.text)
