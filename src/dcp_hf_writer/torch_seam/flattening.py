"""The names that torch's planners give to the tensors of a nested state dict.

Mechanism: `flat_tensors` walks as torch's `flatten_state_dict` does: dicts and lists are looked
into, everything else is a value. That function is private, and looks at a variable of its module
which planners of other threads may have changed for a moment. `flat_state_dict` calls it where no
planner runs. `names_before_2_4` calls `traverse_state_dict_v_2_3`, as torch's load planner does.

Looked at: torch 2.9 to 2.13, `_nested_dict.py` and `_traverse.py`. When torch changes: names here
differ from those of the plans, and what is looked for under them is reported as missing; a function
that is gone fails the import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import traverse_state_dict_v_2_3

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcp_hf_writer.mapping.model_entry import Path


def flat_tensors(state_dict: Mapping[str, Any]) -> dict[str, tuple[Path, torch.Tensor]]:
    """Return the tensors of a nested state dict, with their paths, by the FQNs of DCP."""
    found: dict[str, tuple[Path, torch.Tensor]] = {}
    _visit(state_dict, (), found)
    return found


def _visit(value: Any, path: Path, found: dict[str, tuple[Path, torch.Tensor]]) -> None:
    entries: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, torch.Tensor):
        found[".".join(map(str, path))] = (path, value)
    elif isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for key, inner in entries:
        _visit(inner, (*path, key), found)


def flat_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Path]]:
    """Return all values of a nested state dict, and their paths, by FQN."""
    values, paths = flatten_state_dict(dict(state_dict))
    return values, paths


def names_before_2_4(state_dict: dict[str, Any]) -> set[str]:
    """Return the names that torch before 2.4 gave to the values of a nested state dict."""
    names: set[str] = set()
    traverse_state_dict_v_2_3(state_dict, lambda path, _: names.add(".".join(map(str, path))))
    return names
