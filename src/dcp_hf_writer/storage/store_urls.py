"""URLs of object stores: which text is one, and how it is shown without credentials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from dcp_hf_writer.errors import ConfigError

# Shorter values, such as a region or a flag, are no secrets, and are part of many words.
_LEAST_SECRET = 6


def is_url(text: str) -> bool:
    """Whether a path, as `plain_path` returns it, is the URL of a store."""
    return "://" in text


def check_scheme(url: str) -> None:
    """Check that fsspec has a file system for a URL, without connecting to it.

    Raises:
        ConfigError: If it has none, if a package for it is missing (names the package), or if the
            URL chains several file systems.
    """
    # Not at the top: savers to local paths do not need it.
    from fsspec import get_filesystem_class  # noqa: PLC0415

    if "::" in url:
        msg = "a save cannot go through a chain of file systems"
        raise ConfigError(
            msg, path=shown_url(url), expected="one file system, such as s3://bucket/run"
        )
    scheme = url.partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except ValueError:
        msg = f"no file system is known for {scheme}:// URLs"
        hint = "pass a local path, or the URL of a store that fsspec supports"
        raise ConfigError(msg, path=shown_url(url), hint=hint) from None
    except ImportError as error:
        msg = f"a package for {scheme}:// URLs is not installed"
        raise ConfigError(msg, path=shown_url(url), found=str(error)) from None


def shown_url(url: str) -> str:
    """Return a URL without user, password and query, for messages and metadata."""
    scheme, _, rest = url.partition("://")
    rest = rest.partition("?")[0]
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}".rstrip("/")


def without_secrets(text: str, *, url: str, options: Mapping[str, Any]) -> str:
    """Return a text in which no value of `storage_options` or of the URL is left.

    Args:
        text: Text of an error of another library.
        url: URL as the user gave it.
        options: Options as the user gave them.
    """
    secrets = {*_texts(options), *_secrets_in(url)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets_in(url: str) -> Iterator[str]:
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    for value in (user, *user.split(":"), parts.query, *(v for _, v in parse_qsl(parts.query))):
        for one in (value, unquote(value)):
            if len(one) >= _LEAST_SECRET:
                yield one


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple, set)):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode(errors="replace")
        if len(text) >= _LEAST_SECRET:
            yield text
