"""Which plain tensors a tensor consists of: subclasses, quantised tensors, ShardedTensor.

A save stores a tensor in one of two forms:

- *plain*: the bytes of one plain tensor. The export can hold it too. This is the form of every
  tensor whose memory holds its values: plain tensors, subclasses that only add methods, and
  wrappers that change how a weight is sent but not what it holds (float8 all-gather weights).
- *whole*: the archive that `torch.save` makes of the object, as torch's own writer stores it. This
  is the form of wrappers that encode their values (8-bit optimizer state) and of quantised tensors.

Mechanism: `__tensor_flatten__` and `__tensor_unflatten__`, which torch requires of wrapper
subclasses; `torch._C.DisableTorchFunctionSubclass` and `_DisableTorchDispatch`, so that no method
of a subclass runs while its memory is looked at; `AsyncCollectiveTensor`; and the constructor
`ShardedTensor._init_from_local_shards_and_global_metadata`.

Looked at: torch 2.10 to 2.15. When torch changes: the import or the attribute access raises, so the
save fails.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dcp_hf_writer.torch_seam.dtensor import local_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PLAIN_KINDS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""The classes whose objects are plain tensors."""

_SPARSE_PARTS = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors that a tensor consists of, and how to build it from others in their place."""

    tensors: tuple[torch.Tensor, ...]
    """Tensors of other kinds are among them: a shard may be a DTensor."""
    rebuild: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """Build the tensor from CPU tensors of the same shapes and dtypes, in the same order. If there
    are no parts, copy the tensor to host memory instead."""
    key: object = None
    """If two tensors have equal keys, `rebuild` gives the same for the same parts; `None` if only
    the tensor itself can tell."""


def plain_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the plain tensor that a save stores for a tensor; `None` if there is none.

    Args:
        tensor: Any tensor; of a DTensor, the local tensor counts.

    Returns:
        A tensor that shares its memory with `tensor`; `tensor` itself or its local tensor if that
        is plain. Tensors without data (on the meta device) and of every layout count as plain.
    """
    local = local_of(tensor)
    if type(local) in PLAIN_KINDS:
        return None if local.is_quantized else local
    if isinstance(local, AsyncCollectiveTensor):
        return plain_of(local.wait())
    if isinstance(local, ShardedTensor):
        return None
    if _is_wrapper(local):
        return _transparent(local)
    if local.is_quantized or not _has_memory(local):
        return None
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        return local.detach().as_subclass(torch.Tensor)


def is_sharded_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a `ShardedTensor`, which says itself what each rank holds."""
    return isinstance(tensor, ShardedTensor)


def local_shards(
    tensor: torch.Tensor,
) -> tuple[tuple[tuple[int, ...], torch.Tensor], ...] | None:
    """Return the offsets and data of this rank's shards; `None` if it is no `ShardedTensor`."""
    if not isinstance(tensor, ShardedTensor):
        return None
    shards = tensor.local_shards()
    return tuple((tuple(one.metadata.shard_offsets), one.tensor) for one in shards)


def shards_of_some_ranks(
    tensor: torch.Tensor, world_size: int
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Yield offsets and data of this rank's shards, if a `ShardedTensor` lacks some ranks."""
    if not isinstance(tensor, ShardedTensor):
        return
    holders = {one.placement.rank() for one in tensor.metadata().shards_metadata if one.placement}
    if len(holders) == world_size:
        return
    for shard in tensor.local_shards():
        yield tuple(shard.metadata.shard_offsets), shard.tensor


def dense_forms(tensor: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors that tell what a quantised, sparse or nested tensor holds.

    Args:
        tensor: A local tensor.

    Returns:
        `None` for every other tensor; an empty tuple if it holds no data.
    """
    if tensor.is_quantized:
        return _codes_and_scales(tensor)
    if tensor.layout is torch.jagged or (tensor.layout is torch.strided and not tensor.is_nested):
        return None
    if tensor.is_meta:
        return ()
    if tensor.is_nested:
        return tuple(tensor.detach().unbind())
    found = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        found = found.coalesce()
    names = _SPARSE_PARTS.get(tensor.layout)
    return (found.to_dense(),) if names is None else tuple(getattr(found, n)() for n in names)


def _codes_and_scales(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if tensor.qscheme() in {torch.per_tensor_affine, torch.per_tensor_symmetric}:
        found = torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        return tensor.int_repr(), found
    scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return tensor.int_repr(), scales, zeros


def is_whole_form(tensor: torch.Tensor) -> bool:
    """Whether a save stores what `torch.save` makes of a tensor: no plain tensor has its values."""
    return plain_of(tensor) is None and not isinstance(local_of(tensor), ShardedTensor)


def parts_of(tensor: torch.Tensor) -> Parts | None:
    """Return the parts of a tensor that has no plain form; `None` if it cannot be taken apart.

    Args:
        tensor: A local tensor for which `plain_of` returns `None`.
    """
    if isinstance(tensor, ShardedTensor):
        return _parts_of_shards(tensor)
    if tensor.is_quantized:
        # Only operators of torch build a quantised tensor, and they copy its codes.
        return Parts((), lambda _: tensor.detach().clone().cpu())
    if _is_wrapper(tensor):
        return _parts_of_wrapper(tensor)
    return None


def parts_on_host(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a copy in host memory of a tensor of the whole form; `None` if that is not possible.

    No part of the copy is a view of a larger storage, because `torch.save` would store all of it.
    """
    plain = plain_of(tensor)
    if plain is not None:
        plain = plain.detach()
        if plain.is_cpu and plain.untyped_storage().nbytes() == plain.nbytes:
            return plain
        return plain.to(_CPU, copy=True).contiguous()
    parts = parts_of(local_of(tensor))
    if parts is None:
        return None
    found = [one for one in map(parts_on_host, parts.tensors) if one is not None]
    return parts.rebuild(found) if len(found) == len(parts.tensors) else None


def _is_wrapper(tensor: object) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether a subclass that is no traceable wrapper has memory of its own."""
    try:
        return not tensor.numel() or tensor.is_meta or bool(tensor.data_ptr())
    except RuntimeError:
        return False


def _transparent(wrapper: Any) -> torch.Tensor | None:
    """Return the tensor inside a wrapper that holds exactly its values; `None` if none does."""
    names, _ = wrapper.__tensor_flatten__()
    inner = [getattr(wrapper, name) for name in names]
    alike = [one for one in inner if (one.shape, one.dtype) == (wrapper.shape, wrapper.dtype)]
    if len(alike) != 1:
        return None
    # FSDP2's extension for all-gathers: the wrapper says how to send the weight, and what else it
    # holds are scales that it computes from the weight.
    if hasattr(wrapper, "fsdp_pre_all_gather") or (
        len(inner) == 1 and _are_values(wrapper, alike[0])
    ):
        return plain_of(alike[0])
    return None


def _are_values(wrapper: torch.Tensor, inner: torch.Tensor) -> bool:
    """Whether operators see the same values in a wrapper as in the tensor inside it."""
    try:
        differs = (wrapper != inner) & ((wrapper == wrapper) | (inner == inner))  # noqa: PLR0124
        return not bool(differs.any())
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        # A class that lacks these operators encodes its values.
        return False


def _parts_of_wrapper(wrapper: Any) -> Parts:
    names, context = wrapper.__tensor_flatten__()
    kind, size, stride = type(wrapper), wrapper.size(), wrapper.stride()

    def rebuild(found: Sequence[torch.Tensor]) -> torch.Tensor:
        inner = dict(zip(names, found, strict=True))
        built: torch.Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
        return built

    return Parts(tuple(getattr(wrapper, name) for name in names), rebuild)


def _parts_of_shards(tensor: ShardedTensor) -> Parts:
    shards = tensor.local_shards()

    def rebuild(found: Sequence[torch.Tensor]) -> torch.Tensor:
        if not found:
            return tensor
        metadata = copy.deepcopy(tensor.metadata())
        for one in metadata.shards_metadata:
            _place_on_host(one)
        own = []
        for shard, part in zip(shards, found, strict=True):
            at = copy.deepcopy(shard.metadata)
            _place_on_host(at)
            own.append(LocalShard(part, at))
        return ShardedTensor._init_from_local_shards_and_global_metadata(  # noqa: SLF001
            own,
            sharded_tensor_metadata=metadata,
            process_group=tensor._process_group,  # noqa: SLF001
        )

    return Parts(tuple(shard.tensor for shard in shards), rebuild, key=tensor.metadata())


def _place_on_host(shard: Any) -> None:
    shard.placement._device = _CPU  # noqa: SLF001 - as `ShardedTensor.cpu` does
