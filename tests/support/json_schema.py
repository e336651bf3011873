"""Check a JSON value against a schema: the few keywords that the schemas of `dcp-hf` use."""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_KEYWORDS = {
    *("$schema", "type", "description", "minimum", "items", "const", "enum"),
    *("additionalProperties", "properties", "required"),
}


def schema_fault(value: Any, schema: dict[str, Any], at: str = "$") -> str | None:
    """Say where a value breaks a schema; `None` if it does not."""
    assert schema.keys() <= _KEYWORDS, f"{at}: the check lacks {schema.keys() - _KEYWORDS}"
    if "const" in schema and value != schema["const"]:
        return f"{at}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at}: {value!r} is not in {schema['enum']}"
    if "type" in schema and not _is_of(value, schema["type"]):
        return f"{at}: {value!r} is no {schema['type']}"
    if isinstance(value, (int, float)) and value < schema.get("minimum", value):
        return f"{at}: {value} is too small"
    if isinstance(value, list):
        found = (schema_fault(v, schema["items"], f"{at}[{i}]") for i, v in enumerate(value))
        return next(filter(None, found), None)
    return _object_fault(value, schema, at) if isinstance(value, dict) else None


def _is_of(value: Any, types: str | list[str]) -> bool:
    names = [types] if isinstance(types, str) else types
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, _TYPES[name]) for name in names)


def _object_fault(value: dict[str, Any], schema: dict[str, Any], at: str) -> str | None:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        return f"{at}: {missing} are missing"
    for name, inner in value.items():
        below = known.get(name, others)
        if below is False:
            return f"{at}: {name!r} is not in the schema"
        fault = None if below is True else schema_fault(inner, below, f"{at}.{name}")
        if fault is not None:
            return fault
    return None
