"""Settings that hold for every test, and the servers that tests share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import hypothesis
import pytest

from support.fault_proxy import FaultProxy, fault_proxy
from support.s3_servers import SERVER_KINDS, S3Bucket, S3Server, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

# Before transformers is imported: no test may look for anything on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# A busy machine may take long for one example, and that says nothing about the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Its assertions are those of the test classes that inherit it.
pytest.register_assert_rewrite("support.input_conformance", "support.object_conformance")


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with serving("moto") as server:
        yield server


@pytest.fixture(scope="session")
def rclone() -> Iterator[S3Server]:
    with serving("rclone") as server:
        yield server


@pytest.fixture(params=SERVER_KINDS)
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> S3Bucket:
    """An empty bucket, on each server in turn."""
    return s3_server.new_bucket()


@pytest.fixture
def s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A fault proxy in front of the server of `s3_bucket`: `s3_bucket.at(s3_proxy.endpoint)`."""
    with fault_proxy(s3_server.endpoint) as proxy:
        yield proxy
