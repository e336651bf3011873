"""The messages of the package's errors, as they stand in its source."""

from __future__ import annotations

import ast
from collections import defaultdict
from typing import TYPE_CHECKING

from dcp_hf_writer import errors
from support.folders import SOURCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def messages() -> Mapping[str, set[str]]:
    """Return the messages of each error class; `...` stands for a value that is filled in.

    Messages that a function gets as an argument are under the name of no class: `""`.
    """
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for kind, text in _of_function(function):
                    found[kind].add(text)
        found[""] |= {text for node in ast.walk(tree) if (text := _text(node)) is not None}
    return found


def _of_function(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    values: dict[str, ast.expr] = {}
    for node in sorted(
        (n for n in ast.walk(function) if isinstance(n, (ast.Assign, ast.Call))),
        key=lambda n: (n.lineno, isinstance(n, ast.Call)),
    ):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Name):
                values[target.id] = node.value
        elif node.args and isinstance(node.func, ast.Name) and hasattr(errors, node.func.id):
            first: ast.expr | None = node.args[0]
            if isinstance(first, ast.Name):
                first = values.get(first.id)
            text = None if first is None else _text(first)
            if text is not None:
                yield node.func.id, text


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
        return "".join(map(str, parts))
    return None
