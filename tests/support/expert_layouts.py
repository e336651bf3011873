"""A small mixture of experts, held by ranks in the ways in which trainers hold one.

What each rank holds is cut with `torch.chunk`, not with the code under test.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer.mapping.load_spec import LoadSpec, Piece, ShardSpec
from support.rank_tensors import tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

EXPERTS, INNER, HIDDEN = 6, 4, 3
W13, W2 = "layers.0.experts.w13", "layers.0.experts.w2"
SHAPES = {
    "embed": (7, 4),
    W13: (EXPERTS, 2 * INNER, HIDDEN),
    W2: (EXPERTS, HIDDEN, INNER),
    "layers.0.router": (EXPERTS, HIDDEN),
    "norm": (5,),
}
Cuts = tuple[ShardSpec, ...]


def whole(rank: int, world_size: int) -> dict[str, Cuts]:
    """Nothing is cut by hand."""
    return {}


@dataclass(frozen=True)
class Layout:
    """How ranks hold the experts."""

    cuts: Callable[[int, int], Mapping[str, Cuts]] = whole
    """How this rank's part is cut by hand, by name; from rank and number of ranks."""
    placements: Mapping[str, Sequence[Placement]] | None = None
    """How DTensors of the hand-cut parts are placed on `mesh_dims`; `None` for plain tensors."""
    mesh_dims: tuple[str, ...] = ("all",)

    def hold(self, name: str, whole: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
        """Return this rank's part of an expert tensor, in memory of its own."""
        part = cut(whole, self.cuts(rank, world_size).get(name, ())).clone()
        if self.placements is None:
            return part
        mesh = meshes(world_size)[self.mesh_dims]
        return distribute_tensor(part, mesh, self.placements[name], src_data_rank=None)


def by_expert(rank: int, world_size: int) -> dict[str, Cuts]:
    """Each rank has some experts; of 4 ranks, one has none."""
    return dict.fromkeys((W13, W2), (ShardSpec(0, rank, world_size),))


def interleaved(rank: int, world_size: int) -> dict[str, Cuts]:
    """Each rank has some of the first and some of the second half of the experts."""
    return dict.fromkeys((W13, W2), (ShardSpec(0, rank, world_size, interleave=2),))


def replicated(rank: int, world_size: int) -> dict[str, Cuts]:
    """Every other rank has the same experts."""
    return dict.fromkeys((W13, W2), (ShardSpec(0, rank % 2, 2),))


def by_expert_and_row(rank: int, world_size: int) -> dict[str, Cuts]:
    """Each rank has rows of the gate, and the same of the up projection, of half of the experts."""
    across = max(world_size // 2, 1)
    experts = ShardSpec(0, rank // across, world_size // across)
    return {
        W13: (experts, ShardSpec(1, rank % across, across, interleave=2)),
        W2: (experts, ShardSpec(2, rank % across, across)),
    }


def by_half(rank: int, world_size: int) -> dict[str, Cuts]:
    """The first half of the ranks shares half of the experts, and so does the second."""
    half = max(world_size // 2, 1)
    return dict.fromkeys((W13, W2), (ShardSpec(0, rank // half, world_size // half),))


LAYOUTS = {
    "by expert": Layout(by_expert),
    "interleaved": Layout(interleaved),
    "replicated": Layout(replicated),
    "by expert and row": Layout(by_expert_and_row),
    "fused DTensors": Layout(
        placements={W13: [_StridedShard(1, split_factor=2)], W2: [Shard(2)]},
    ),
    "DTensors of a half": Layout(by_half, {W13: [Shard(0)], W2: [Shard(1)]}, ("within",)),
}


def cut(whole: torch.Tensor, shards: Sequence[ShardSpec]) -> torch.Tensor:
    """Cut a tensor as a trainer would, with `torch.chunk`."""
    for shard in shards:
        segments = chunks(whole, shard.interleave, shard.dim)
        parts = [chunks(segment, shard.count, shard.dim)[shard.index] for segment in segments]
        whole = torch.cat(parts, shard.dim)
    return whole


def chunks(value: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    """Return as many chunks as asked for; `torch.chunk` leaves out those without elements."""
    found = list(torch.chunk(value, count, dim))
    return found + [value.narrow(dim, 0, 0)] * (count - len(found))


@functools.cache
def meshes(world_size: int) -> dict[tuple[str, ...], DeviceMesh]:
    """Make the meshes of this process: of all ranks, and of each half of them."""
    half = max(world_size // 2, 1)
    both = init_device_mesh("cpu", (world_size // half, half), mesh_dim_names=("across", "within"))
    return {("all",): init_device_mesh("cpu", (world_size,)), ("within",): both["within"]}


def model_of(step: int) -> dict[str, torch.Tensor]:
    """Return the whole tensors of the model at a step."""
    return {name: tensor(f"{name}@{step}", *shape) for name, shape in SHAPES.items()}


def state_of(
    step: int, layout: Layout | None = None, *, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Return the state dict at a step: as a rank holds it, or of whole tensors."""

    def hold(name: str, whole: torch.Tensor) -> torch.Tensor:
        if layout is None or name not in {W13, W2, "embed"}:
            return whole
        if name == "embed":
            mesh = meshes(world_size)["all",]
            return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        return layout.hold(name, whole, rank, world_size)

    moments = {
        name: {
            "exp_avg": hold(name, tensor(f"exp_avg of {name}@{step}", *SHAPES[name])),
            "step": torch.tensor(float(step)),
        }
        for name in (W13, W2, "embed")
    }
    return {
        "model": {name: hold(name, whole) for name, whole in model_of(step).items()},
        "optim": {"state": moments, "param_groups": {"0": {"lr": 0.1, "params": list(moments)}}},
        "ema": {W13: hold(W13, tensor(f"ema of {W13}@{step}", *SHAPES[W13]))},
        "step": step,
    }


def specs_of(layout: Layout, rank: int = 0, world_size: int = 1) -> list[LoadSpec]:
    """Return the specs of the experts: one HuggingFace tensor an expert and projection."""
    cuts = layout.cuts(rank, world_size)
    shape = (INNER, HIDDEN)
    loops = ((INNER, HIDDEN, HIDDEN), (HIDDEN, 1, 1))
    size = INNER * HIDDEN
    halves = [
        Piece(f"experts.{e}.{key}", shape, loops, start=(2 * e + half) * size)
        for e in range(EXPERTS)
        for half, key in enumerate(("gate", "up"))
    ]
    down = [
        Piece(f"experts.{e}.down", shape[::-1], ((size, 1, 1),), start=e * size)
        for e in range(EXPERTS)
    ]
    return [
        LoadSpec(W13, (), SHAPES[W13], shards=cuts.get(W13, ()), pieces=halves),
        LoadSpec(W2, (), SHAPES[W2], shards=cuts.get(W2, ()), pieces=down),
    ]


def exported_of(step: int) -> dict[str, torch.Tensor]:
    """Return the tensors that the export of a step must hold."""
    model = model_of(step)
    w13, w2 = model.pop(W13), model.pop(W2)
    for e in range(EXPERTS):
        model[f"experts.{e}.gate"], model[f"experts.{e}.up"] = w13[e].chunk(2)
        model[f"experts.{e}.down"] = w2[e]
    return {key: value.clone() for key, value in model.items()}
