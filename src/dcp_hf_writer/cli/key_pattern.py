"""The regular expression of `--key`."""

from __future__ import annotations

import re

from dcp_hf_writer.errors import ConfigError


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Return the pattern of `--key`.

    Raises:
        ConfigError: If it is no regular expression.
    """
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        msg = "--key is no regular expression"
        raise ConfigError(msg, expected="a pattern for re.search", found=str(error)) from error
