"""The bytes of the tensors that a save writes, and their digests; each is computed once."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
import xxhash

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.torch_seam.tensor_forms import parts_on_host, plain_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

_EMPTY = memoryview(b"")

# Rows shorter than this are copied together, so that one buffer of a system call holds many rows.
_ROW_NBYTES = 64 << 10

_LARGE_NBYTES = 64 << 10
"""Of more bytes, xxhash computes the digest without Python's lock, if it is asked to `update`."""


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy if it is in host memory."""
    if not tensor.numel():
        return _EMPTY
    return tensor.reshape(-1).view(torch.uint8).cpu().numpy().data


def whole_archive(tensor: torch.Tensor, fqn: str) -> bytes:
    """Return the archive that `torch.save` makes of a tensor of the whole form.

    Raises:
        PlanningError: If the tensor cannot be copied to host memory.
    """
    on_host = parts_on_host(tensor)
    if on_host is None:
        msg = "a tensor cannot be taken apart"
        raise PlanningError(msg, phase="write", fqn=fqn, found=type(tensor).__name__)
    buffer = io.BytesIO()
    torch.save(on_host, buffer)
    return buffer.getvalue()


def row_major_bytes(tensor: torch.Tensor, *, copied_nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order; long contiguous rows are not copied.

    Args:
        tensor: A plain tensor.
        copied_nbytes: Most bytes that one copy may have.
    """
    if tensor.is_contiguous():
        yield host_bytes(tensor)
        return
    row_nbytes = tensor.nbytes // tensor.shape[0]
    if row_nbytes > copied_nbytes or (row_nbytes >= _ROW_NBYTES and tensor[0].is_contiguous()):
        for row in tensor.unbind():
            yield from row_major_bytes(row, copied_nbytes=copied_nbytes)
        return
    for rows in tensor.split(max(1, copied_nbytes // row_nbytes)):
        yield host_bytes(rows.contiguous())


class TensorSource:
    """Resolves write items to tensors; there is one per save and rank.

    Staged tensors lie in the slab and are used in place. A synchronous save has the trainer's own
    tensors, on any device; each part is copied to host memory when it is written.
    """

    def __init__(self, planner: SavePlanner) -> None:
        """Resolve items with a planner that torch has set up."""
        self._planner = planner
        self._digests: dict[MetadataIndex, str] = {}

    def tensor(self, item: WriteItem) -> torch.Tensor:
        """Return the item's tensor; if the item is one block of a tensor, a view of that block.

        Returns:
            A plain tensor. Or, for a tensor of the whole form (`tensor_forms`), the tensor itself:
            only the DCP half can store it, as the archive that `torch.save` makes of it.

        Raises:
            PlanningError: If the tensor does not fit the plan, which may happen with a reused plan.
        """
        found = self._planner.resolve_data(item)
        if not isinstance(found, torch.Tensor) or item.tensor_data is None:
            msg = "the planner must resolve a tensor item to a tensor"
            raise PlanningError(msg, phase="write", fqn=item.index.fqn, found=type(found).__name__)
        plain = plain_of(found)
        tensor = found if plain is None else plain.detach().resolve_conj().resolve_neg()
        planned = (item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes))
        if planned != (tensor.dtype, tuple(tensor.shape)):
            msg = "a tensor does not have the dtype and shape of the plan"
            raise PlanningError(
                msg,
                phase="write",
                fqn=item.index.fqn,
                expected=f"{planned[0]} of shape {list(planned[1])}",
                found=f"{tensor.dtype} of shape {list(tensor.shape)}",
                hint=_hint(planned[0] != tensor.dtype),
            )
        return tensor

    def digest(self, item: WriteItem, data: memoryview) -> str:
        """Return the digest of the item's whole data; both halves share one computation."""
        known = self._digests.get(item.index)
        if known is None:
            known = self._digests[item.index] = digest_of(data)
        return known


def _hint(is_new_dtype: bool) -> str:  # noqa: FBT001 - one fact
    if is_new_dtype:
        return "torch's plan caching does not notice a new dtype; the next save makes a new plan"
    return "do not resize tensors while a save runs; a planner must resolve what it has planned"


def digest_of(data: memoryview | bytes) -> str:
    """Return the xxh3_64 of some bytes, in hex."""
    if len(data) <= _LARGE_NBYTES:
        return str(xxhash.xxh3_64_hexdigest(data))
    # Only `update` lets other threads run meanwhile, in every release of xxhash.
    digest = xxhash.xxh3_64()
    digest.update(data)
    return str(digest.hexdigest())


def chunk_of(item: WriteItem) -> Box:
    """Return the box of the global tensor that a tensor item writes."""
    if item.tensor_data is None or item.tensor_data.chunk is None:
        msg = "a tensor item of the plan has no chunk"
        raise PlanningError(msg, phase="plan", fqn=item.index.fqn)
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))
