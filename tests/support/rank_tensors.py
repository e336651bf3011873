"""Tensors as ranks hold them, declared once: the ranks build the shards, a test the whole.

Everything follows from names and seeds.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

WORLD_SIZE = 4


@dataclass(frozen=True)
class Held:
    """One tensor of the model's entry, and how the ranks hold it."""

    full: torch.Tensor
    """The whole tensor."""
    placements: tuple[Placement, ...] = ()
    """One per dimension of the mesh; none for a plain tensor that every rank has."""
    mesh_shape: tuple[int, ...] = (WORLD_SIZE,)
    """Shape of the mesh of all ranks."""
    is_local_strided: bool = False
    """Whether the local tensor is a view that is not contiguous."""


@dataclass(frozen=True)
class Case:
    """A model's entry, the options of its export, and what the export must hold."""

    held: Mapping[str, Held]
    """Tensors by FQN; one object under two names is one tensor that is tied."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What else the model's entry holds."""
    export: Mapping[str, Any] = field(default_factory=dict)
    """Options of `HFExport`."""
    exported: Mapping[str, torch.Tensor] | None = None
    """The tensors of the export; `None` means those held, under their own names."""

    def full(self) -> dict[str, torch.Tensor]:
        """Return the whole tensors, by FQN."""
        return {fqn: held.full for fqn, held in self.held.items()}

    def expected(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the export as independent copies."""
        tensors = self.full() if self.exported is None else self.exported
        return {key: independent(one) for key, one in tensors.items()}

    def sharded(self, meshes: Mapping[tuple[int, ...], DeviceMesh]) -> dict[str, Any]:
        """Return the model's entry as this rank holds it."""
        made: dict[int, torch.Tensor] = {}
        entry: dict[str, Any] = {}
        for fqn, held in self.held.items():
            if id(held) not in made:
                made[id(held)] = _distribute(held, meshes)
            # As `Module.state_dict` does: two names of one parameter come as two objects.
            entry[fqn] = made[id(held)].detach()
        return {**entry, **self.values}


def _distribute(held: Held, meshes: Mapping[tuple[int, ...], DeviceMesh]) -> torch.Tensor:
    if not held.placements:
        return held.full
    mesh = meshes[held.mesh_shape]
    # Every rank has the whole tensor, so nothing need be sent, which gloo could not for all dtypes.
    tensor = distribute_tensor(held.full, mesh, held.placements, src_data_rank=None)
    if not held.is_local_strided:
        return tensor
    local = torch.stack([tensor.to_local()] * 2, dim=-1)[..., 0]
    return DTensor.from_local(
        local,
        mesh,
        held.placements,
        run_check=False,
        shape=held.full.shape,
        stride=held.full.stride(),
    )


def independent(one: torch.Tensor) -> torch.Tensor:
    """Copy a tensor into storage of its own, in row-major order."""
    resolved = one.resolve_conj().resolve_neg()
    return resolved.clone(memory_format=torch.contiguous_format)


def tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a random tensor that depends on its name; any bytes but where a cast must be exact."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    if dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def rows(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Held:
    """Hold a tensor as `Shard(0)`."""
    return Held(tensor(name, *shape, dtype=dtype), (Shard(0),))


def columns(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Held:
    """Hold a tensor as `Shard(1)`."""
    return Held(tensor(name, *shape, dtype=dtype), (Shard(1),))


def plain(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Held:
    """Hold a tensor as a plain one, the same on every rank."""
    return Held(tensor(name, *shape, dtype=dtype))
