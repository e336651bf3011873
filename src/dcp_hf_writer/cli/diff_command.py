"""`diff`: compare the tensors of two checkpoints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.byte_progress import ByteProgress
from dcp_hf_writer.cli.key_pattern import compile_pattern
from dcp_hf_writer.cli.plain_text import count, shape
from dcp_hf_writer.cli.run_command import Outcome, line, line_of_rest
from dcp_hf_writer.convert.compare_checkpoints import compare_checkpoints

if TYPE_CHECKING:
    from rich.console import Console

    from dcp_hf_writer.convert.compare_checkpoints import TensorDifference
    from dcp_hf_writer.convert.stored_tensors import StoredKind
    from dcp_hf_writer.load.choose_half import SourceName

_SHOWN = 50


def diff(a: str, b: str, *, half: SourceName, pattern: str | None) -> Outcome:
    """Compare two checkpoints; `PROBLEM` if they differ.

    Raises:
        ConfigError: If an argument cannot be used as given.
        CheckpointError: If a checkpoint cannot be read.
    """
    key = compile_pattern(pattern)
    with ByteProgress("diff") as progress:
        found = compare_checkpoints(
            a,
            b,
            half=half,
            matches=lambda name: key is None or key.search(name) is not None,
            progress=progress,
        )
    value = {
        "a": a,
        "b": b,
        "halves": list(found.halves),
        "equal": found.equal,
        "differences": [_as_json(one) for one in found.differences],
    }
    return Outcome(value, exit_codes.PROBLEM if found.differences else exit_codes.OK)


def _as_json(one: TensorDifference) -> dict[str, Any]:
    return {
        "name": one.name,
        "what": _what(one),
        "a": _kind(one.a),
        "b": _kind(one.b),
        "differing": one.differing,
        "max_abs": _finite(one.max_abs),
        "max_rel": _finite(one.max_rel),
        "is_finite": all(v is None or math.isfinite(v) for v in (one.max_abs, one.max_rel)),
    }


def _what(one: TensorDifference) -> str:
    if one.a is None:
        return "only in b"
    if one.b is None:
        return "only in a"
    if one.a.shape != one.b.shape:
        return "shape"
    if not one.differing:
        return "dtype"
    return "values" if one.a.dtype == one.b.dtype else "dtype and values"


def _kind(kind: StoredKind | None) -> dict[str, Any] | None:
    if kind is None:
        return None
    return {"shape": list(kind.shape), "dtype": str(kind.dtype).removeprefix("torch.")}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def show_diff(value: dict[str, Any], console: Console) -> None:
    """Print the differences, one tensor after another."""
    found = value["differences"]
    names = {"dcp": "DCP half", "hf": "HuggingFace half"}
    for name, half in zip("ab", value["halves"], strict=True):
        line(console, f"{name}: {value[name]} ({names[half]})")
    for one in found[:_SHOWN]:
        line(console, one["name"], "bold")
        line(console, f"  {_text(one)}", "red")
    line_of_rest(console, found, _SHOWN, "tensors")
    differ = f"{count(len(found), 'tensor')} differ{'s' if len(found) == 1 else ''}"
    line(console, f"{count(value['equal'], 'tensor')} equal, {differ}", "bold")


def _text(one: dict[str, Any]) -> str:
    if one["a"] is None or one["b"] is None:
        kind = one["a"] or one["b"]
        return f"{one['what']}: {kind['dtype']} {shape(kind['shape'])}"
    if one["what"] == "shape":
        return f"shape {shape(one['a']['shape'])} in a, {shape(one['b']['shape'])} in b"
    text = "" if one["a"]["dtype"] == one["b"]["dtype"] else f"{one['a']['dtype']} in a, "
    text += f"{one['b']['dtype']} in b; " if text else ""
    if not one["differing"]:
        return f"{text}all values are equal"
    elements = math.prod(one["a"]["shape"])
    text += f"{one['differing']:,} of {count(elements, 'element')} differ"
    if not one["is_finite"]:
        return f"{text}; a NaN or an infinite value differs"
    return f"{text}; max abs {one['max_abs']:.3g}, max rel {one['max_rel']:.3g}"
