"""Which object store serves a URL."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.storage.fsspec_store import FsspecStore
from dcp_hf_writer.storage.s3_store import S3Store
from dcp_hf_writer.storage.store_urls import check_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.storage.object_contract import ObjectStore


def open_store(url: str, storage_options: Mapping[str, Any] | None = None) -> ObjectStore:
    """Open the object store below a URL. Sends no request.

    Choose a new backend for one protocol here, before the one for every file system of fsspec.

    Args:
        url: Such as `s3://bucket/run/step-100`.
        storage_options: What fsspec takes for this protocol: credentials, endpoint.

    Raises:
        ConfigError: If the URL names no bucket, if no file system is known for its protocol, or if
            a package for it is missing.
    """
    protocol, separator, rest = url.partition("://")
    if separator and protocol in {"s3", "s3a"}:
        return _open_s3(rest, storage_options)
    check_scheme(url)
    return FsspecStore(url, storage_options)


def _open_s3(rest: str, storage_options: Mapping[str, Any] | None) -> S3Store:
    if importlib.util.find_spec("s3fs") is None:
        raise ConfigError("the package s3fs is missing", hint="install it: pip install s3fs")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise ConfigError(
            "an s3:// URL must not hold credentials or a query",
            expected="s3://bucket/prefix",
            hint="pass credentials in storage_options or in the environment",
        )
    bucket, root = _split(rest)
    if not bucket:
        raise ConfigError("an s3:// URL must name a bucket", expected="s3://bucket/prefix")
    return S3Store(bucket, root.strip("/"), storage_options=storage_options)


def _split(rest: str) -> tuple[str, str]:
    if not rest.startswith("arn:"):
        bucket, _, root = rest.partition("/")
        return bucket, root
    # The ARN of an access point holds `:` and `/` of its own.
    from s3fs import S3FileSystem  # noqa: PLC0415 - takes a second

    anonymous = S3FileSystem(anon=True, skip_instance_cache=True, use_listings_cache=False)
    bucket, root, _ = anonymous.split_path(rest)
    return bucket, root
