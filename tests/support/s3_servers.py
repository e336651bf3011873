"""S3 servers for tests, on 127.0.0.1: `moto_server`, and `rclone serve s3` over a directory.

The two differ where S3 servers differ: moto refuses small parts and honours conditional writes,
rclone does neither; a second `complete` succeeds on moto and fails on rclone.

`tests/conftest.py` makes fixtures of them. Each test gets a bucket of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.hosts import Host

ServerKind = Literal["moto", "rclone"]
SERVER_KINDS: tuple[ServerKind, ...] = ("moto", "rclone")

# rclone refuses keys of two characters.
ACCESS_KEY = "testaccesskey0123"
SECRET_KEY = "testsecretkey0123"  # noqa: S105 - of servers that only tests start
REGION = "us-east-1"

# Far more than a start takes on a busy machine.
START_S = 90.0
_LISTENS_ON = re.compile(r"http://[\d.]+:\d+")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server."""

    kind: ServerKind
    """Which program it is."""
    endpoint: str
    """Its URL, such as `http://127.0.0.1:40001`."""
    pid: int
    """Its process id."""

    def client(self) -> Any:
        """Return a plain botocore client: tests look at the server past the code under test."""
        return plain_client(self.endpoint)

    def new_bucket(self) -> S3Bucket:
        """Make an empty bucket."""
        name = f"bucket-{os.getpid()}-{next(_numbers)}"
        self.client().create_bucket(Bucket=name)
        return S3Bucket(self.kind, self.endpoint, name)


@dataclass(frozen=True, slots=True)
class S3Bucket:
    """A bucket of a test. Plain values: they pickle, so ranks may get it."""

    kind: ServerKind
    """Which server it is on."""
    endpoint: str
    """URL of the server, or of a proxy in front of it."""
    name: str
    """Name of the bucket."""

    @property
    def url(self) -> str:
        """URL of the bucket, for fsspec and for this package."""
        return f"s3://{self.name}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What users of fsspec would pass for this server."""
        return options_of(self.endpoint)

    def at(self, endpoint: str) -> S3Bucket:
        """Return the same bucket, reached through another endpoint, such as a proxy."""
        return S3Bucket(self.kind, endpoint, self.name)

    def client(self) -> Any:
        """Return a plain botocore client."""
        return plain_client(self.endpoint)

    def keys(self) -> list[str]:
        """Return the keys of all objects."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def open_uploads(self) -> list[tuple[str, str]]:
        """Return key and upload id of all open uploads."""
        client = self.client()
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name)
        try:
            found = [entry for page in pages for entry in page.get("Uploads", ())]
        except client.exceptions.NoSuchUpload:  # rclone, before the first upload of a bucket
            return []
        return [(entry["Key"], entry["UploadId"]) for entry in found]

    def content(self, key: str) -> bytes:
        """Return the bytes of an object."""
        data: bytes = self.client().get_object(Bucket=self.name, Key=key)["Body"].read()
        return data


def options_of(endpoint: str) -> dict[str, Any]:
    """Return the storage options of fsspec for a server of this module."""
    return {
        "key": ACCESS_KEY,
        "secret": SECRET_KEY,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": REGION},
    }


def cached_session(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with a session that this process shares: s3fs then connects faster."""
    return {**options, "session": _session_of(os.getpid())}


@functools.lru_cache(maxsize=2)
def _session_of(_pid: int) -> Any:
    import aiobotocore.session

    return aiobotocore.session.AioSession()


def plain_client(endpoint: str) -> Any:
    """Return a synchronous botocore client. To make one takes long, so processes keep them."""
    return _client_of(endpoint, os.getpid())


@functools.lru_cache(maxsize=8)
def _client_of(endpoint: str, _pid: int) -> Any:
    import botocore.config
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=botocore.config.Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


@contextlib.contextmanager
def serving(
    kind: ServerKind, *options: str, root: str | None = None, on: Host | None = None
) -> Iterator[S3Server]:
    """Run a server for the body of the `with` statement.

    Args:
        kind: Which program.
        *options: Further options of it.
        root: Directory that rclone serves; a temporary one if `None`.
        on: Host of `hosts.two_hosts` that it runs on; `None` for this machine.
    """
    with tempfile.TemporaryDirectory(prefix="s3-server-", dir=root) as work:
        log = Path(work, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *_dies_with_us(),
                    *([] if on is None else on.command),
                    *_command(kind, work, "127.0.0.1" if on is None else on.address),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        try:
            yield S3Server(kind, _endpoint(process, log), process.pid)
        finally:
            process.kill()
            process.wait()


def _command(kind: ServerKind, work: str, address: str) -> list[str]:
    if kind == "moto":
        return [_program("moto_server"), "-H", address, "-p", "0"]
    data = Path(work, "data")
    data.mkdir()
    keys = f"{ACCESS_KEY},{SECRET_KEY}"
    config = ["--config", os.devnull, "--cache-dir", str(Path(work, "cache"))]
    listen = ["--addr", f"{address}:0", "--auth-key", keys]
    return [_program("rclone"), "serve", "s3", *config, *listen, str(data)]


def _program(name: str) -> str:
    """Return the path of a program that a package for the tests has installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        msg = f"the program {name} is missing: install the extra `test` of this project"
        raise FileNotFoundError(msg)
    return found


def _dies_with_us() -> list[str]:
    """Return the command that ends a server when the tests are killed, where there is one."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "KILL"]


def _endpoint(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server says where it listens."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        text = log.read_text(errors="replace")
        found = _LISTENS_ON.search(text)
        if found:
            return found.group()
        if process.poll() is not None:
            break
        time.sleep(0.02)
    msg = f"the server did not start: {log.read_text(errors='replace')}"
    raise RuntimeError(msg)
