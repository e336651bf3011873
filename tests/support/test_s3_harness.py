"""The servers and the proxy that tests of object stores rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from support.fault_proxy import FaultProxy
    from support.s3_servers import S3Bucket


def test_proxy_forwards_and_logs_when_no_fault_is_set(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy
) -> None:
    client = s3_bucket.at(s3_proxy.endpoint).client()
    client.put_object(Bucket=s3_bucket.name, Key="a/b", Body=b"x" * 200_000)
    assert s3_bucket.content("a/b") == b"x" * 200_000
    assert s3_bucket.keys() == ["a/b"]
    assert s3_bucket.open_uploads() == []
    assert [(one.method, one.nbytes) for one in s3_proxy.log] == [("PUT", 200_000)]


def test_proxy_acts_as_often_as_asked_when_a_request_matches(
    s3_bucket: S3Bucket, s3_proxy: FaultProxy
) -> None:
    fault = s3_proxy.add("answer", "PUT", "/k$", status=403, code="AccessDenied", skip=1)
    client = s3_bucket.at(s3_proxy.endpoint).client()
    client.put_object(Bucket=s3_bucket.name, Key="k", Body=b"1")
    with pytest.raises(ClientError, match="AccessDenied"):
        client.put_object(Bucket=s3_bucket.name, Key="k", Body=b"2")
    client.put_object(Bucket=s3_bucket.name, Key="k", Body=b"3")
    assert s3_bucket.content("k") == b"3"
    assert (fault.seen, fault.hits) == (3, 1)
