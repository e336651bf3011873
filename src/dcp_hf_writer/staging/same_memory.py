"""Find the tensors of this rank that share one memory, as tied tensors do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.torch_seam.tensor_forms import plain_of

if TYPE_CHECKING:
    from collections.abc import Mapping


def memory_of(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Number the memory of each tensor of a flat state dict; the result is by FQN.

    Tensors with equal numbers are the same view of the same memory. Tensors for which
    `memory_identity` returns `None` are left out.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    found: dict[str, int] = {}
    for fqn, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue
        identity = memory_identity(value)
        if identity is not None:
            found[fqn] = numbers.setdefault(identity, len(numbers))
    return found


def memory_identity(value: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what identifies the memory and view of a tensor; equal for tied tensors.

    `None` if the tensor has no elements on this rank, is on the meta device, or has no plain form.
    """
    local = plain_of(value)
    if local is None or local.is_meta or local.layout != torch.strided or not local.numel():
        return None
    where = (local.device, local.data_ptr(), local.dtype)
    return (*where, tuple(local.shape), local.stride(), tuple(value.shape))


def tied_groups(memory: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of two or more FQNs whose tensors are the same memory."""
    groups: dict[int, list[str]] = {}
    for fqn, number in memory.items():
        groups.setdefault(number, []).append(fqn)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
