"""The tensors of a nested state dict, and the names that DCP gives them.

Pure. torch's own `flatten_state_dict` is private, and reads a variable of its module that planners
of other threads may have changed for a moment.
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
        into_tuples: Whether to look into tuples too. DCP does not: a tuple is one value to it.
    """
    found: list[tuple[Path, torch.Tensor]] = []
    _visit(state_dict, (), (list, tuple) if into_tuples else (list,), found)
    return found


def _visit(
    value: Any, path: Path, lists: tuple[type[Any], ...], found: list[tuple[Path, torch.Tensor]]
) -> None:
    # A list and not a generator: nested generators take twice the time, and training waits.
    if isinstance(value, torch.Tensor):
        found.append((path, value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _visit(inner, (*path, str(key)), lists, found)
    elif isinstance(value, lists):
        for i, inner in enumerate(value):
            _visit(inner, (*path, i), lists, found)


def flat_tensors(state_dict: Mapping[str, Any]) -> dict[str, tuple[Path, torch.Tensor]]:
    """Return the tensors of a nested state dict, with their paths, by the FQN that DCP gives them.

    Raises:
        PlanningError: If two tensors have one FQN, which DCP does not take either.

    Source:
        torch, `flatten_state_dict`: the keys of mappings as text and the indices of lists, joined
        with dots.
    """
    found: dict[str, tuple[Path, torch.Tensor]] = {}
    for path, tensor in walk_tensors(state_dict, into_tuples=False):
        fqn = fqn_of(path)
        if fqn in found:
            raise PlanningError(
                "two tensors of the state dict have one FQN",
                phase="plan",
                fqn=fqn,
                expected="keys that stay apart when they are joined with dots",
                found=f"{list(found[fqn][0])} and {list(path)}",
            )
        found[fqn] = (path, tensor)
    return found
