"""A small state dict whose values tell their step, and the check of a checkpoint of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from support.audit import faults
from support.compare import tensor_difference
from support.rank_tensors import tensor
from support.stock_readers import load_dcp, load_hf

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

# Shape and placement of each tensor of the model: rows, columns, uneven, replicated, plain, scalar.
MODEL: Mapping[str, tuple[tuple[int, ...], Placement | None]] = {
    "embed": ((7, 4), Shard(0)),
    "layers.0.w": ((6, 5), Shard(1)),
    "layers.0.b": ((5,), Replicate()),
    "norm": ((3,), None),
    "scale": ((), None),
    "head": ((7, 4), Shard(0)),
}


def model_of(step: int) -> dict[str, torch.Tensor]:
    """Return the whole tensors of the model at a step."""
    return {name: tensor(f"{name}@{step}", *shape) for name, (shape, _) in MODEL.items()}


def state_of(step: int, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Return the state dict at a step, sharded over a mesh or whole; all of its memory is new."""
    model = {
        name: value if mesh is None else _placed(value, mesh, MODEL[name][1])
        for name, value in model_of(step).items()
    }
    moments = {
        name: {"exp_avg": _like(name, step, mesh), "step": torch.tensor(float(step))}
        for name in ("embed", "norm")
    }
    groups = {"0": {"lr": step / 10, "params": list(moments)}}
    return {"model": model, "optim": {"state": moments, "param_groups": groups}, "step": step}


def _like(name: str, step: int, mesh: DeviceMesh | None) -> torch.Tensor:
    shape, placement = MODEL[name]
    value = tensor(f"exp_avg of {name}@{step}", *shape)
    return value if mesh is None else _placed(value, mesh, placement)


def _placed(value: torch.Tensor, mesh: DeviceMesh, placement: Placement | None) -> torch.Tensor:
    if placement is None:
        return value
    placements = [placement, *[Replicate()] * (mesh.ndim - 1)]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def spoil(state: dict[str, Any]) -> None:
    """Overwrite every tensor of a state dict in place, as training goes on."""
    for value in state.values():
        if isinstance(value, dict):
            spoil(value)
        elif isinstance(value, torch.Tensor):
            value.fill_(-1)


def dcp_difference(directory: Path, expected: Mapping[str, Any]) -> str | None:
    """Say how a checkpoint that stock torch loads differs from a state dict of whole tensors."""
    found, wanted = _flat(load_dcp(directory, expected)), _flat(expected)
    tensors = {name: value for name, value in wanted.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in wanted.items() if name not in tensors}
    loaded = {name: found.get(name) for name in values}
    if loaded != values:
        return f"expected {values}, found {loaded}"
    return tensor_difference({name: found[name] for name in tensors}, tensors)


def difference(
    directory: Path, step: int, *, exported: Mapping[str, torch.Tensor] | None = None
) -> str | None:
    """Say how a checkpoint differs from the state of a step; None if it does not.

    Args:
        directory: The checkpoint.
        step: The step that it should hold.
        exported: Tensors that the export should hold; `None` means those of the model.
    """
    wrong = dcp_difference(directory, state_of(step))
    if wrong is None:
        wanted = model_of(step) if exported is None else exported
        wrong = tensor_difference(load_hf(directory / "hf"), wanted)
    if wrong is None and (bad := faults(directory)):
        wrong = f"not as the manifest says: {bad}"
    return wrong and f"{directory.name}: {wrong}"


def leftovers(root: Path) -> list[str]:
    """Return the names in a directory that only a save in the making, or a failed one, has."""
    return sorted(p.name for p in root.iterdir() if re.match(r"\.(incomplete|replaced)", p.name))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}/{key}").items()}


def take_name(path: Path) -> None:
    """Make a directory that a save takes for a checkpoint, and does not replace."""
    path.mkdir(exist_ok=True)
    (path / ".metadata").touch()
