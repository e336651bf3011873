"""Take a DTensor apart and build one, without the side effects of its public methods.

Mechanism: the attributes `_local_tensor` and `_spec`, the constructor `DTensor(local, spec)`, and
the placement class `_StridedShard`. The public methods do more: `to_local()` waits for collectives
and is recorded by autograd; `from_local()` moves the local tensor to the device of the mesh.

Looked at: torch 2.10 to 2.15. When torch changes: the import or the attribute access raises, so the
save or load fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

if TYPE_CHECKING:
    import torch


def local_of(value: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor, without a copy; return any other tensor unchanged."""
    return value._local_tensor if isinstance(value, DTensor) else value  # noqa: SLF001


def spec_of(value: torch.Tensor) -> Any:
    """Return a DTensor's spec: its mesh, placements and global shape; `None` for other tensors."""
    return value._spec if isinstance(value, DTensor) else None  # noqa: SLF001


def with_spec(local: torch.Tensor, spec: Any) -> torch.Tensor:
    """Return a DTensor that wraps `local`, on any device; return `local` if `spec` is `None`."""
    return local if spec is None else DTensor(local, spec, requires_grad=False)


def is_strided(value: DTensor) -> bool:
    """Whether one rank may hold several blocks of a DTensor along one dimension."""
    return any(isinstance(placement, _StridedShard) for placement in value.placements)
