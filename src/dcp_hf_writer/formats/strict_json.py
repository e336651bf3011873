"""JSON from storage, read so that nothing in it is guessed, dropped or run."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from dcp_hf_writer.errors import CorruptCheckpointError


def parse_json(data: bytes, *, path: str) -> Any:
    """Parse a JSON document of a checkpoint.

    Unlike `json.loads`: UTF-8 only, no name twice in an object, no NaN or Infinity.

    Args:
        data: The whole document; the caller bounds its size.
        path: File that it comes from, for the error.

    Raises:
        CorruptCheckpointError: If it is no such document.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant
        )
    except _DocumentError as error:
        found: object = error
    except UnicodeDecodeError as error:
        found = f"a byte at {error.start} that is not UTF-8"
    except RecursionError:
        found = "values nested too deep"
    except ValueError as error:
        # Of the decoder: also a number of thousands of digits.
        found = error
    msg = "a JSON document of the checkpoint cannot be read"
    raise CorruptCheckpointError(msg, phase="read", path=path, found=found)


class _DocumentError(ValueError):
    """What the JSON decoder itself would accept."""


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


# What is found in a hostile file goes into an error: enough to recognise it, no more.
_SHOWN_CHARS = 80
_SHOWN_ENTRIES = 8


def shortened(value: object) -> str:
    """Return the `repr` of a value from storage, cut to a length that fits in a message."""
    if isinstance(value, (list, dict)) and len(value) > _SHOWN_ENTRIES:
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _SHOWN_CHARS:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[: 2 * _SHOWN_CHARS]
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def is_count(value: object, *, below: int = 1 << 63) -> bool:
    """Whether a value from JSON is an integer from 0 to `below`, exclusive; bools are none."""
    return type(value) is int and 0 <= value < below


def is_text(value: object) -> bool:
    """Whether a value from JSON is text that can be encoded: JSON may spell half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
