"""What a DTensor is made of, without the redistribution and waiting of its public methods.

Mechanism: the attributes `_local_tensor` and `_spec`, the constructor `DTensor(local, spec)`, and
the placement class `_StridedShard`. `to_local()` waits for collectives and is seen by autograd;
`from_local()` moves the local tensor to the device of the mesh.

Looked at: torch 2.9 to 2.13. When torch changes: the import or the attribute fails, and with it the
save or load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

if TYPE_CHECKING:
    import torch


def local_of(value: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor, as it is; any other tensor itself."""
    return value._local_tensor if isinstance(value, DTensor) else value  # noqa: SLF001


def spec_of(value: torch.Tensor) -> Any:
    """Return mesh, placements and global shape of a DTensor in one object; `None` of any other."""
    return value._spec if isinstance(value, DTensor) else None  # noqa: SLF001


def with_spec(local: torch.Tensor, spec: Any) -> torch.Tensor:
    """Return a DTensor around a local tensor, on any device; `local` itself if `spec` is `None`."""
    return local if spec is None else DTensor(local, spec, requires_grad=False)


def is_strided(value: DTensor) -> bool:
    """Whether a DTensor may hold several blocks along one dimension."""
    return any(isinstance(placement, _StridedShard) for placement in value.placements)
