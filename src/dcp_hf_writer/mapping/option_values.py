"""Checks of plain option values: seconds, whole numbers, flags, words, text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from dcp_hf_writer.errors import ConfigError

MAX_SECONDS = 10**9
"""Longest time that an option may name, about 31 years; Python's locks refuse 292 years."""


# Characters of a value that a message shows.
_LONGEST = 200


def check_seconds(option: str, value: Any) -> None:
    """Check that a value is a number of seconds above zero.

    Raises:
        ConfigError: If it is not, or is above `MAX_SECONDS`.
    """
    # Compare before any conversion to float, which huge integers do not survive.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_SECONDS:
        msg = f"{option} must be a number of seconds above zero"
        raise ConfigError(
            msg, expected=f"for example 1800, at most {MAX_SECONDS}", found=shown(value)
        )


def check_whole(option: str, value: Any, *, least: int) -> None:
    """Check that a value is a whole number, and not too small.

    Raises:
        ConfigError: If it is not a plain `int`, or is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{option} must be a whole number, and not too small"
        raise ConfigError(msg, expected=f"an int of at least {least}", found=shown(value))


def check_flag(option: str, value: Any) -> None:
    """Check that a value is `True` or `False`.

    Raises:
        ConfigError: If it is not. Text such as `"no"` would count as true.
    """
    if not isinstance(value, bool):
        msg = f"{option} must be True or False"
        raise ConfigError(msg, expected="a bool", found=shown(value))


def check_text(option: str, value: Any) -> None:
    """Check that a value is text, and not empty.

    Raises:
        ConfigError: If it is not.
    """
    if not isinstance(value, str) or not value:
        msg = f"{option} must be text, and not empty"
        raise ConfigError(msg, expected="a str", found=shown(value))


def check_word(
    option: str, value: Any, allowed: tuple[str | None, ...], *, hint: str | None = None
) -> None:
    """Check that a value is one of a few words.

    Args:
        option: Name of the option.
        value: Its value.
        allowed: The words, and `None` if the option may be off.
        hint: What the caller can do.

    Raises:
        ConfigError: If the value is none of them.
    """
    if not (value is None or isinstance(value, str)) or value not in allowed:
        msg = f"{option} has an unknown value"
        expected = " or ".join(map(repr, allowed))
        raise ConfigError(msg, expected=expected, found=shown(value), hint=hint)


def check_names(option: str, value: Any) -> None:
    """Check that a value is a collection of text, such as names or patterns.

    Raises:
        ConfigError: If it is not. Text alone is a collection of its letters, and is refused too.
    """
    is_names = isinstance(value, Collection) and not isinstance(value, (str, bytes))
    if not is_names or not all(isinstance(name, str) for name in value):
        msg = f"{option} must be a collection of text"
        raise ConfigError(msg, expected='such as ("norm",)', found=shown(value))


def check_pairs(option: str, value: Any) -> None:
    """Check that a value maps text to text.

    Raises:
        ConfigError: If it does not.
    """
    is_pairs = isinstance(value, Mapping) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    )
    if not is_pairs:
        msg = f"{option} must map text to text"
        raise ConfigError(msg, expected="{str: str}", found=shown(value))


def shown(value: Any) -> str:
    """Return a value as text for a message; of a long value, only the beginning."""
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        # Python refuses to print integers of more than 4,300 digits.
        return f"an int of about {math.log10(2) * value.bit_length():.0f} digits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({type(value).__name__})"
