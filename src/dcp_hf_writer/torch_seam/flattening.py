"""The names that torch's planners give to the tensors of a nested state dict.

Mechanism: the same walk as torch's `flatten_state_dict` with its present rule: dicts and lists are
looked into, everything else is a value. That function is private, and looks at a variable of its
module which planners of other threads may have changed for a moment.

Looked at: torch 2.9 to 2.13, `_nested_dict.py` and `_traverse.py`. When torch changes: names here
differ from those of the plans, and what is looked for under them is reported as missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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
