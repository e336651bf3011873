"""Parse JSON from untrusted storage, without guessing or dropping anything."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from dcp_hf_writer.errors import CorruptCheckpointError


def parse_json(data: bytes, *, path: str) -> Any:
    """Parse a JSON document of a checkpoint.

    Stricter than `json.loads`: it refuses text that is not UTF-8, a name that occurs twice in an
    object, NaN and Infinity.

    Args:
        data: The whole document; the caller limits its size.
        path: The file, for error messages.

    Raises:
        CorruptCheckpointError: If `data` is not such a document.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant
        )
    except _DocumentError as error:
        found: object = error
    except UnicodeDecodeError as error:
        found = f"bytes at offset {error.start} that are not UTF-8"
    except RecursionError:
        found = "values that are nested too deep"
    except ValueError as error:
        # The decoder raises this, also for a number of thousands of digits.
        found = error
    msg = "a JSON file of the checkpoint cannot be read"
    raise CorruptCheckpointError(msg, phase="read", path=path, found=found)


class _DocumentError(ValueError):
    """Input that `json.loads` accepts and this module refuses."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                msg = f"the name {shortened(name)} twice in one object"
                raise _DocumentError(msg)
            seen.add(name)
    return value


def _refuse_constant(name: str) -> NoReturn:
    msg = f"the number {name}, which is not JSON"
    raise _DocumentError(msg)


# An error may show a value from a hostile file: enough to recognise the value, not more.
_SHOWN_CHARS = 80
_SHOWN_ENTRIES = 8


def shortened(value: object) -> str:
    """Return a value from storage as ASCII text, cut to a length that fits in an error message."""
    if isinstance(value, (list, dict)) and len(value) > _SHOWN_ENTRIES:
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _SHOWN_CHARS:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[: 2 * _SHOWN_CHARS]
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def is_count(value: object, *, below: int = 1 << 63) -> bool:
    """Whether a value from JSON is an integer with `0 <= value < below`; a bool is not."""
    return type(value) is int and 0 <= value < below


def are_counts(values: object) -> bool:
    """Whether a value is a tuple of counts; see `is_count`."""
    return type(values) is tuple and all(map(is_count, values))


def is_text(value: object) -> bool:
    """Whether a value from JSON is text that UTF-8 can encode; a lone surrogate is not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
