"""Take the tensors of a state dict apart into plain tensors, and put staged copies together again.

Most tensors are plain, or DTensors around a plain tensor, and are one leaf each. A wrapper subclass
and a ShardedTensor have one leaf for each plain tensor inside.
"""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dcp_hf_writer.errors import StagingError
from dcp_hf_writer.mapping.flattening import fqn_of
from dcp_hf_writer.tensors.shards import SHARD_ATTRIBUTES_HINT, has_shard_attributes
from dcp_hf_writer.torch_seam.dtensor import local_of, spec_of, with_spec
from dcp_hf_writer.torch_seam.tensor_forms import PLAIN_KINDS, dense_forms, parts_of, plain_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dcp_hf_writer.mapping.model_entry import Path


class Leaf(NamedTuple):
    """A plain tensor to copy. A tuple, because it is cheap and each tensor needs one."""

    path: Path
    """Path of the tensor in the state dict that it belongs to."""
    tensor: torch.Tensor
    """The tensor, or a DTensor around it."""
    local: torch.Tensor
    """The plain tensor on this rank."""

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the place of its copy depends on."""
        spec = spec_of(self.tensor)
        local = self.local
        placed = None if spec is None else (id(spec.mesh), spec.placements, spec.shape)
        return (self.path, local.shape, local.dtype, placed)


class Compound(NamedTuple):
    """How to put a tensor together from the staged copies of its leaves."""

    leaves: int
    """Number of its leaves."""
    build: Callable[[Iterator[torch.Tensor]], torch.Tensor]
    """Takes `leaves` staged tensors from the iterator."""
    key: object
    """If it equals that of an earlier save with the same leaves, `build` gives the same; `None` if
    it must be called each time."""


def take_apart(
    tensors: Iterable[tuple[Path, torch.Tensor]],
) -> tuple[list[Leaf], list[Compound | None]]:
    """Find the leaves of tensors. Call it under `no_grad`.

    Returns:
        The leaves in order, and for each tensor how to put it together; `None` for a tensor that is
        one leaf.

    Raises:
        StagingError: If a tensor cannot be staged.
    """
    leaves: list[Leaf] = []
    return leaves, [_take_apart(path, value, leaves) for path, value in tensors]


def _take_apart(path: Path, value: torch.Tensor, leaves: list[Leaf]) -> Compound | None:
    fault = storage_fault(path, value)
    if fault is not None:
        raise fault
    plain = plain_of(value)
    if plain is not None:
        leaves.append(Leaf(path, value, plain))
        return None
    parts = parts_of(local_of(value))
    if parts is None:
        raise _refused(path, value)
    before = len(leaves)
    inner = [_take_apart(path, part, leaves) for part in parts.tensors]
    spec = spec_of(value)

    def build(staged: Iterator[torch.Tensor]) -> torch.Tensor:
        found = [next(staged) if one is None else one.build(staged) for one in inner]
        return with_spec(parts.rebuild(found), spec)

    return Compound(len(leaves) - before, build, None if any(inner) else parts.key)


def plain_leaves(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors in memory that a tensor consists of on this rank."""
    local = local_of(value)
    if type(local) in PLAIN_KINDS and not local.is_quantized:
        yield local
        return
    plain = plain_of(local)
    parts = parts_of(local) if plain is None else None
    if plain is not None:
        yield plain
    for part in () if parts is None else parts.tensors:
        yield from plain_leaves(part)


def dense_leaves(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield strided tensors in memory that tell all values of a tensor on this rank.

    As `plain_leaves`, but quantised, sparse and nested tensors are told by tensors of their own.
    """
    local = local_of(value)
    found = dense_forms(local)
    if found is not None:
        for one in found:
            yield from dense_leaves(one)
        return
    plain = plain_of(local)
    if plain is not None:
        if not plain.is_meta:
            yield plain
        return
    parts = parts_of(local)
    for part in () if parts is None else parts.tensors:
        yield from dense_leaves(part)


def storage_fault(path: Path, value: torch.Tensor, *, on_meta: bool = False) -> StagingError | None:
    """Return why a tensor cannot be saved; `None` if it can.

    Args:
        path: Its path in the state dict.
        value: A tensor, or a DTensor.
        on_meta: Whether tensors without data are allowed, as in a dry run.
    """
    if has_shard_attributes(value):
        return StagingError(
            "a tensor has shard attributes, which are not supported",
            phase="stage",
            fqn=fqn_of(path),
            expected="a plain tensor without shard attributes, or a DTensor",
            found=f"a CheckpointableTensor of shape {list(value.shape)}",
            hint=SHARD_ATTRIBUTES_HINT,
        )
    plain = plain_of(value)
    if plain is None:
        return None if parts_of(local_of(value)) is not None else _refused(path, value)
    if plain.layout is not torch.strided or (plain.is_meta and not on_meta):
        return _refused(path, value)
    return None


def _refused(path: Path, value: torch.Tensor) -> StagingError:
    local = local_of(value)
    return StagingError(
        "a tensor of this kind cannot be saved",
        phase="stage",
        fqn=fqn_of(path),
        expected="a strided tensor with data, a subclass of it with __tensor_flatten__, or a "
        "DTensor or ShardedTensor of such tensors",
        found=f"{type(local).__name__} on {local.device}, {local.layout}",
        hint="convert it to a plain tensor in the state dict, or leave it out",
    )


def put_together(
    compounds: Sequence[Compound | None],
    staged: Iterable[torch.Tensor],
    known: dict[int, tuple[object, torch.Tensor]],
) -> Iterator[torch.Tensor]:
    """Yield the staged copy of each tensor.

    Args:
        compounds: From `take_apart`.
        staged: The staged copy of each leaf.
        known: Copies that an earlier save with the same staged leaves built, by place; updated.
    """
    rest = iter(staged)
    for place, compound in enumerate(compounds):
        if compound is None:
            yield next(rest)
            continue
        own = itertools.islice(rest, compound.leaves)
        key, built = known.get(place, (None, None))
        if built is None or key is None or key != compound.key:
            built = compound.build(own)
            if compound.key is not None:
                known[place] = (compound.key, built)
        collections.deque(own, maxlen=0)
        yield built
