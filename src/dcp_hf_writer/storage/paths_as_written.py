"""Paths as users write them: text or `os.PathLike`, with `~`, or as a `file://` URL."""

from __future__ import annotations

import os
import re
from typing import Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.mapping.option_values import shown

# fsspec takes both for local files, and decodes nothing in them: "%20" is part of a name.
_LOCAL_SCHEME = re.compile(r"(?:file|local)://")
_LOCAL_HOSTS = ("", "localhost")

# `Path("s3://bucket/x")` keeps one slash only. As a path, it would name a local directory "s3:".
_CUT_URL = re.compile(r"(s3a?|gc?s|az|abfss?|adl|hf|https?|hdfs|r2|oci|oss|memory):/[^/]")
# An id of the HuggingFace hub: `gpt2` or `owner/name`; a relative path looks the same.
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_CUT_FILE_URL = re.compile(r"(?:file|local):(?=/[^/])")


def plain_path(value: Any, *, option: str = "path") -> str:
    """Return a path as plain text; expands `~` and removes `file://`.

    A URL of another scheme stays as it is. Reads nothing but the home directory of `~`.

    Args:
        value: A `str`, or an `os.PathLike` of one.
        option: Name of the option that holds the path, for the message.

    Raises:
        ConfigError: If the value is no path, is empty, or names an unknown home or another host.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        msg = f"{option} must be a path"
        raise ConfigError(msg, expected="text or a pathlib.Path, not empty", found=shown(value))
    scheme = _LOCAL_SCHEME.match(text)
    if scheme is not None:
        return _local_part(text, text[scheme.end() :], option=option)
    if _CUT_URL.match(text):
        msg = f"{option} is a URL that has lost a slash"
        raise ConfigError(
            msg, path=text, expected="scheme://...", hint="pass the URL as text, not as a Path"
        )
    text = _CUT_FILE_URL.sub("", text, count=1) if _CUT_FILE_URL.match(text) else text
    # A path of pathlib has lost the "./" that would mark a directory called "~".
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and "://" not in expanded:
        msg = f"{option} begins with ~, but this home directory is not known"
        raise ConfigError(
            msg,
            path=text,
            expected="~ or ~user of a user of this machine",
            hint=f"write the whole path, or ./{text} for a directory of that name",
        )
    return expanded


def hub_hint(path: Any) -> str | None:
    """Return the advice for a path that is not there but looks like the id of a hub repository."""
    text = os.fspath(path)
    if not isinstance(text, str) or not _HUB_ID.fullmatch(text):
        return None
    return (
        f"if {text!r} is the id of a hub repository, pass the directory that "
        f"huggingface_hub.snapshot_download({text!r}) returns"
    )


def _local_part(url: str, rest: str, *, option: str) -> str:
    """Return the path of a `file://` URL; `file://x/y` names the host `x`, and is refused."""
    host, slash, below = rest.partition("/")
    if not slash or not below or host not in _LOCAL_HOSTS:
        msg = f"{option} is not the URL of a local path"
        raise ConfigError(
            msg,
            path=url,
            expected="file:///absolute/path",
            found=f"the host {host!r}" if host else "no path",
            hint="write three slashes, or the path without file://",
        )
    return f"/{below}"
