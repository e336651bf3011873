"""The one place that chooses the backend for reading."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.storage.fsspec_inputs import FsspecFiles
from dcp_hf_writer.storage.local_inputs import LocalFiles
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.storage.input_contract import InputFiles


def open_directory(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> InputFiles:
    """Return the files below a local path or an fsspec URL; the path need not exist.

    Choose a new backend for one URL scheme here, before fsspec, which reads every other URL.

    Args:
        path: A local path, as `plain_path` takes it; a URL if it contains `://`.
        storage_options: Options of the URL, as fsspec takes them.

    Raises:
        ConfigError: If `path` is neither a path nor a URL, if fsspec does not support its protocol,
            or if a local path comes with options.
    """
    # `LocalFiles` reads file:// URLs too, because fsspec does not report where links lead.
    text = plain_path(path)
    if is_url(text):
        return FsspecFiles(text, storage_options)
    if storage_options:
        raise ConfigError(
            "storage_options are for URLs",
            expected="None for a path",
            found=sorted(storage_options),
        )
    return LocalFiles(os.path.abspath(text))


def is_readable(path: object) -> bool:
    """Whether `open_directory` can read from such a place; it does not look what is there.

    Args:
        path: Anything. A path or a URL is readable; of URLs, those whose protocol fsspec supports
            with the installed packages.
    """
    try:
        text = plain_path(path)
    except ConfigError:
        return False
    if "://" not in text:
        return True
    # Not at the top: see `FsspecFiles`.
    from fsspec import get_filesystem_class  # noqa: PLC0415

    try:
        # A URL may chain file systems: simplecache::s3://bucket/run.
        for part in text.split("::"):
            get_filesystem_class(part.partition("://")[0])
    except (ValueError, ImportError):
        return False
    return True
