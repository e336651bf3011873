"""Find the tensors of a nested state dict, and give them the FQNs that DCP gives them.

Pure. This module does not call torch's `flatten_state_dict`. That function is private, and it reads
a module variable that a planner in another thread may change for a moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import PlanningError

if TYPE_CHECKING:
    from dcp_hf_writer.mapping.model_entry import Path


def fqn_of(path: Path) -> str:
    """Return the FQN of the value that a path leads to."""
    return ".".join(map(str, path))


def walk_tensors(
    state_dict: Mapping[str, Any], *, into_tuples: bool
) -> list[tuple[Path, torch.Tensor]]:
    """Return the tensors of nested mappings and lists, with the path to each, in order.

    Args:
        state_dict: A nested state dict.
        into_tuples: Whether to search tuples too. DCP does not: it saves a tuple as one value.
    """
    found: list[tuple[Path, torch.Tensor]] = []
    _visit(state_dict, (), (list, tuple) if into_tuples else (list,), found)
    return found


def _visit(
    value: Any, path: Path, lists: tuple[type[Any], ...], found: list[tuple[Path, torch.Tensor]]
) -> None:
    # Fill a list instead of yielding: nested generators take twice the time, and training waits.
    if isinstance(value, torch.Tensor):
        found.append((path, value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _visit(inner, (*path, str(key)), lists, found)
    elif isinstance(value, lists):
        for i, inner in enumerate(value):
            _visit(inner, (*path, i), lists, found)


def flat_values(state_dict: Mapping[str, Any]) -> dict[str, tuple[Path, Any]]:
    """Return all values of a nested state dict, with their paths, by the FQN that DCP gives them.

    A list without tensors and mappings is one value, and so is a tuple. If two values have the same
    FQN, the first one counts; DCP refuses them.

    Source:
        torch, `traverse_state_dict`.
    """
    found: dict[str, tuple[Path, Any]] = {}
    _collect(state_dict, (), found)
    return found


def _collect(value: Any, path: Path, found: dict[str, tuple[Path, Any]]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _collect(inner, (*path, str(key)), found)
    elif isinstance(value, list) and _holds_entries(value):
        for i, inner in enumerate(value):
            _collect(inner, (*path, i), found)
    else:
        found.setdefault(fqn_of(path), (path, value))


def _holds_entries(values: list[Any]) -> bool:
    return any(
        isinstance(one, (torch.Tensor, Mapping)) or (isinstance(one, list) and _holds_entries(one))
        for one in values
    )


def flat_tensors(state_dict: Mapping[str, Any]) -> dict[str, tuple[Path, torch.Tensor]]:
    """Return the tensors of a nested state dict, with their paths, by the FQN that DCP gives them.

    Raises:
        PlanningError: If two tensors have the same FQN; DCP refuses them too.

    Source:
        torch, `flatten_state_dict`: the keys of mappings as text and the indices of lists, joined
        with dots.
    """
    found: dict[str, tuple[Path, torch.Tensor]] = {}
    for path, tensor in walk_tensors(state_dict, into_tuples=False):
        fqn = fqn_of(path)
        if fqn in found:
            raise PlanningError(
                "two tensors of the state dict have the same FQN",
                phase="plan",
                fqn=fqn,
                expected="keys that give distinct FQNs when they are joined with dots",
                found=f"{list(found[fqn][0])} and {list(path)}",
            )
        found[fqn] = (path, tensor)
    return found


def with_states(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the objects of a state dict by their states, as `dcp.save` does it.

    Source:
        torch, `_stateful_to_state_dict`: the entries at the top that have `state_dict` and
        `load_state_dict`, such as modules and optimizers.
    """
    return {
        key: value.state_dict()
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
        else value
        for key, value in state_dict.items()
    }
