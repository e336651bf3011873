"""Find what this rank holds of each tensor to stream, and the process groups that hold the rest."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import ConfigError, CoverageError, PlanningError, SpecError
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.stream.buckets import LOCAL, Chain, Cuts, Held
from dcp_hf_writer.stream.mesh_groups import Groups, is_by_hand
from dcp_hf_writer.tensors.boxes import Box, Shape, tiling_fault, whole
from dcp_hf_writer.tensors.shards import blocks_of, local_shape, shards_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.load_spec import LoadSpec, ShardSpec

_KINDS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True, slots=True)
class Stock:
    """What this rank holds of the model."""

    tensors: list[RuntimeTensor] = field(default_factory=list)
    """The tensors of the model, in state-dict order."""
    local: dict[str, torch.Tensor] = field(default_factory=dict)
    """This rank's part of each tensor, by FQN."""
    held: dict[str, Held] = field(default_factory=dict)
    """How the ranks hold each tensor, by FQN.

    For a tensor that is sharded by hand, this is only this rank's part until `complete_by_hand`.
    """
    by_hand: dict[str, tuple[ShardSpec, ...]] = field(default_factory=dict)
    """How this rank's part of each tensor that is sharded by hand was cut, by FQN."""
    devices: dict[Chain, torch.device] = field(default_factory=dict)
    """The device on which the groups of each chain exchange tensors."""
    places: dict[str, int] = field(default_factory=dict)
    """This rank's index along the preserved dimension, for each mesh that has the dimension."""
    described: list[tuple[Any, ...]] = field(default_factory=list)
    """What must be equal on all ranks; one row per tensor."""

    @property
    def place(self) -> int | None:
        """This rank's index along the preserved dimension; `None` without one."""
        return next(iter(self.places.values()), None)


def take_stock(
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    export: HFExport,
    *,
    groups: Groups,
    preserve: str | None,
) -> Stock:
    """Find how the ranks hold each tensor of the model; does not communicate.

    Args:
        tensors: The tensors of the model, by FQN in state-dict order.
        names: The name of each tensor within the model, by FQN.
        export: The options; only the specs are used here.
        groups: All groups that the tensors are sharded over.
        preserve: Mesh dimension that stays sharded.

    Raises:
        PlanningError: If a tensor cannot be streamed.
        ConfigError: If no mesh has the dimension to preserve.
    """
    stock = Stock()
    dim_names: dict[str, None] = {}
    for fqn, name in names.items():
        value, spec = tensors[fqn], export.spec_by_fqn.get(name)
        local = _local_of(fqn, value)
        shape = tuple(value.shape)
        if spec is not None and is_by_hand(value, spec):
            shape = spec.global_shape
            stock.by_hand[fqn] = _cuts_by_hand(fqn, value, local, spec)
            held = Held(fqn, shape, local.dtype, LOCAL, ((stock.by_hand[fqn],),))
        elif isinstance(value, DTensor):
            held = _placed(fqn, value, local, stock, groups=groups, preserve=preserve)
            dim_names.update(dict.fromkeys(value.device_mesh.mesh_dim_names or ()))
        else:
            held = Held(fqn, shape, local.dtype, LOCAL, (((),),))
        stock.tensors.append(RuntimeTensor(fqn, name, shape, local.dtype, (whole(shape),)))
        stock.local[fqn], stock.held[fqn] = local, held
        kind = (str(local.dtype), fqn in stock.by_hand, *_description(value, held))
        stock.described.append((name, shape, *kind))
    if preserve is not None and preserve not in dim_names:
        raise ConfigError(
            "preserve must name a mesh dimension",
            phase="plan",
            expected=f"one of {list(dim_names)}",
            found=repr(preserve),
        )
    return stock


def complete_by_hand(
    stock: Stock,
    cuts_of: Mapping[int, Mapping[str, tuple[ShardSpec, ...]]],
    *,
    groups: Groups,
    number: int,
) -> None:
    """Add what the other ranks hold of tensors that are sharded by hand.

    Args:
        stock: What this rank holds; is changed.
        cuts_of: How each rank's parts were cut, by global rank and FQN.
        groups: All groups.
        number: The group over which these tensors are sharded; negative if this rank is alone.

    Raises:
        CoverageError: If the parts of all ranks do not make up a tensor.
        PlanningError: If the group has no backend for the device of a tensor.
    """
    ranks = [-1] if number < 0 else dist.get_process_group_ranks(groups.all[number])
    chain = LOCAL if number < 0 else Chain((number,), (len(ranks),))
    for fqn, own in stock.by_hand.items():
        old = stock.held[fqn]
        members = [own] if number < 0 else [cuts_of[rank][fqn] for rank in ranks]
        cuts = _distinct(fqn, old.shape, members)
        stock.held[fqn] = Held(fqn, old.shape, old.dtype, chain, (cuts,))
        device = stock.devices.setdefault(chain, stock.local[fqn].device)
        if number >= 0:
            _check_backend(fqn, groups.all[number], device)


def _check_backend(fqn: str, group: ProcessGroup, device: torch.device) -> None:
    backends = dist.get_backend_config(group)
    if f"{device.type}:" not in backends:
        raise PlanningError(
            "the group of a tensor that is sharded by hand has no backend for its device",
            phase="plan",
            fqn=fqn,
            expected=f"one of {backends}",
            found=str(device),
            hint="pass group= with a group that has a backend for this device",
        )


def _local_of(fqn: str, value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        local = value.to_local() if isinstance(value, DTensor) else value
    if type(local) not in _KINDS or local.layout is not torch.strided or local.is_meta:
        raise PlanningError(
            "this kind of tensor cannot be streamed",
            phase="plan",
            fqn=fqn,
            expected="a dense tensor with data, or a DTensor of one",
            found=f"{type(local).__name__}, {local.layout}, on {local.device}",
        )
    # Conjugated and negated views have no bits of their own: torch computes them on each read.
    return local.detach().resolve_conj().resolve_neg()


def _description(value: torch.Tensor, held: Held) -> tuple[Any, ...]:
    if not isinstance(value, DTensor):
        return (held.chain, len(held.cuts))
    mesh = value.device_mesh
    placed = (str(value.placements), tuple(mesh.shape), mesh.mesh_dim_names)
    return (held.chain, len(held.cuts), *placed)


def _cuts_by_hand(
    fqn: str, value: torch.Tensor, local: torch.Tensor, spec: LoadSpec
) -> tuple[ShardSpec, ...]:
    """Return how this rank's part was cut: by its `ShardSpec`s, then by the mesh of a DTensor."""
    cuts = spec.shards
    if isinstance(value, DTensor):
        cuts = (*cuts, *_placements(fqn, value, _coordinate(fqn, value.device_mesh)))
    _check_local(fqn, local, local_shape(spec.global_shape, cuts), "its ShardSpecs")
    return cuts


def _check_local(fqn: str, local: torch.Tensor, expected: Shape, by: str) -> None:
    if tuple(local.shape) != expected:
        raise SpecError(
            f"a rank's part of a tensor does not match {by}",
            phase="plan",
            fqn=fqn,
            expected=f"a local tensor of shape {list(expected)}",
            found=f"shape {list(local.shape)}",
        )


def _coordinate(fqn: str, mesh: DeviceMesh) -> tuple[int, ...]:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise PlanningError(
            "this rank is not in the mesh of a tensor",
            phase="plan",
            fqn=fqn,
            expected=f"one of ranks {mesh.mesh.reshape(-1).tolist()}",
            found=f"rank {dist.get_rank()}",
            hint="on each rank, stream only the tensors that it holds a part of",
        )
    return tuple(coordinate)


def _placements(fqn: str, value: DTensor, coordinate: Shape) -> tuple[ShardSpec, ...]:
    try:
        return shards_of(value.placements, tuple(value.device_mesh.shape), coordinate)
    except PlanningError as error:
        error.fqn = fqn
        raise


def _placed(
    fqn: str,
    value: DTensor,
    local: torch.Tensor,
    stock: Stock,
    *,
    groups: Groups,
    preserve: str | None,
) -> Held:
    mesh, shape = value.device_mesh, tuple(value.shape)
    coordinate = _coordinate(fqn, mesh)
    own = local_shape(shape, _placements(fqn, value, coordinate))
    _check_local(fqn, local, own, "its placements")
    numbers = groups.add_mesh(mesh)
    kept = _preserved(fqn, value, coordinate, stock, preserve=preserve)
    dims = tuple(
        dim
        for dim, placement in enumerate(value.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1 and dim != kept
    )
    for dim in dims:
        _check_order(fqn, mesh, dim, coordinate)
    chain = Chain(tuple(numbers[dim] for dim in dims), tuple(mesh.size(dim) for dim in dims))
    stock.devices.setdefault(chain, _wire_device(local, mesh))
    cuts = _cuts(value.placements, tuple(mesh.shape), dims, kept)
    return Held(fqn, shape, local.dtype, chain, cuts)


def _preserved(
    fqn: str, value: DTensor, coordinate: Shape, stock: Stock, *, preserve: str | None
) -> int | None:
    """Return the dimension of the mesh that stays sharded, and note this rank's place along it."""
    names = value.device_mesh.mesh_dim_names or ()
    if preserve is None or preserve not in names:
        return None
    dim = names.index(preserve)
    size = value.device_mesh.size(dim)
    stock.places[f"{names} of {tuple(value.device_mesh.shape)}"] = coordinate[dim]
    if len(set(stock.places.values())) > 1:
        raise PlanningError(
            "this rank has different indices along the preserved dimension in different meshes",
            phase="plan",
            fqn=fqn,
            expected=f"one index along {preserve!r}",
            found=stock.places,
        )
    return None if value.placements[dim].is_replicate() or size == 1 else dim


def _check_order(fqn: str, mesh: DeviceMesh, dim: int, coordinate: Shape) -> None:
    # A gather orders parts by rank in the group; placements order them by index in the mesh.
    at = coordinate[:dim] + coordinate[dim + 1 :]
    row = mesh.mesh.movedim(dim, -1)[at].tolist()
    ranks = dist.get_process_group_ranks(mesh.get_group(dim))
    if row != ranks:
        raise PlanningError(
            "a mesh has its ranks in another order than its process groups",
            phase="plan",
            fqn=fqn,
            expected=f"ranks {ranks} along dimension {dim}",
            found=f"ranks {row}",
        )


def _wire_device(local: torch.Tensor, mesh: DeviceMesh) -> torch.device:
    """Return the device to exchange a tensor on: parameters may be offloaded from their mesh."""
    if local.device.type == mesh.device_type:
        return local.device
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(mesh.device_type)
    return torch.device(mesh.device_type, module.current_device())


@functools.lru_cache(maxsize=256)
def _cuts(
    placements: Sequence[Any], sizes: Shape, dims: tuple[int, ...], kept: int | None
) -> tuple[tuple[Cuts, ...], ...]:
    """Return how the part of each member of a chain was cut, for each place along `kept`."""
    places = range(1 if kept is None else sizes[kept])
    return tuple(
        tuple(
            shards_of(placements, sizes, _coordinate_of(len(sizes), dims, member, kept, place))
            for member in itertools.product(*(range(sizes[dim]) for dim in dims))
        )
        for place in places
    )


def _coordinate_of(
    ndim: int, dims: tuple[int, ...], member: Shape, kept: int | None, place: int
) -> Shape:
    # In the other dimensions the tensor is replicated, so any index gives the same part.
    coordinate = [0] * ndim
    for dim, index in zip(dims, member, strict=True):
        coordinate[dim] = index
    if kept is not None:
        coordinate[kept] = place
    return tuple(coordinate)


def _distinct(fqn: str, shape: Shape, members: Sequence[tuple[ShardSpec, ...]]) -> tuple[Cuts, ...]:
    """Keep the first of the members that hold the same part; different parts must not overlap."""
    seen: dict[tuple[Box, ...], None] = {}
    cuts: list[Cuts] = []
    for cut in members:
        boxes = tuple(block.global_box for block in blocks_of(shape, cut))
        cuts.append(None if boxes in seen else cut)
        seen.setdefault(boxes)
    fault = tiling_fault(list(itertools.chain.from_iterable(seen)), shape)
    if fault is not None and 0 not in shape:
        raise CoverageError(
            "the ranks' parts of a tensor that is sharded by hand do not make up the whole tensor",
            phase="plan",
            fqn=fqn,
            expected=f"parts that tile the shape {list(shape)}",
            found=fault,
            hint="pass group= with the process group whose ranks together hold the whole tensor",
        )
    return tuple(cuts)
