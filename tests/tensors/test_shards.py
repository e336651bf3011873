"""Blocks of cut tensors: against a dense reference, and against what torch itself holds."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.load_spec import ShardSpec
from dcp_hf_writer.tensors.boxes import tiling_fault
from dcp_hf_writer.tensors.shards import blocks_of, local_shape, shards_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.tensors.boxes import Box, Shape
    from dcp_hf_writer.tensors.shards import ShardBlock


def numbered(shape: Shape) -> torch.Tensor:
    """Return a tensor whose elements are their own places."""
    return torch.arange(math.prod(shape)).reshape(shape)


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    places = zip(box.offsets, box.sizes, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in places)]


def from_blocks(shape: Shape, local: Shape, blocks: Sequence[ShardBlock]) -> torch.Tensor:
    """Put a local tensor together from blocks of the numbered whole one."""
    whole, found = numbered(shape), torch.full(local, -1)
    for block in blocks:
        part(found, block.local_box).copy_(part(whole, block.global_box))
    return found


def chunk(tensor: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    chunks = list(torch.chunk(tensor, count, dim))
    return chunks + [tensor.narrow(dim, 0, 0)] * (count - len(chunks))


def cut_densely(shape: Shape, shards: Sequence[ShardSpec]) -> torch.Tensor:
    found = numbered(shape)
    for shard in shards:
        segments = chunk(found, shard.interleave, shard.dim)
        chunks = [chunk(segment, shard.count, shard.dim)[shard.index] for segment in segments]
        found = torch.cat(chunks, shard.dim)
    return found


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Shape, tuple[ShardSpec, ...]]:
    shape = draw(st.lists(st.integers(0, 13), min_size=1, max_size=3).map(tuple))
    shards = []
    for _ in range(draw(st.integers(0, 4))):
        count = draw(st.integers(1, 5))
        dim, index = draw(st.integers(0, len(shape) - 1)), draw(st.integers(0, count - 1))
        shards.append(ShardSpec(dim, index, count, draw(st.integers(1, 4))))
    return shape, tuple(shards)


@given(cuts())
def test_blocks_are_what_cutting_leaves(cut: tuple[Shape, tuple[ShardSpec, ...]]) -> None:
    shape, shards = cut
    expected = cut_densely(shape, shards)
    blocks = blocks_of(shape, shards)
    assert local_shape(shape, shards) == tuple(expected.shape)
    assert torch.equal(from_blocks(shape, tuple(expected.shape), blocks), expected)
    assert tiling_fault([block.local_box for block in blocks], tuple(expected.shape)) is None


@given(cuts())
def test_no_two_blocks_can_be_one(cut: tuple[Shape, tuple[ShardSpec, ...]]) -> None:
    shape, shards = cut
    blocks = blocks_of(shape, shards)
    for one, other in itertools.permutations(blocks, 2):
        for dim in range(len(shape)):
            sides = [d for d in range(len(shape)) if d != dim]
            same = all(
                a.offsets[d] == b.offsets[d] and a.sizes[d] == b.sizes[d]
                for a, b in (
                    (one.global_box, other.global_box),
                    (one.local_box, other.local_box),
                )
                for d in sides
            )
            follows = all(
                a.offsets[dim] + a.sizes[dim] == b.offsets[dim]
                for a, b in (
                    (one.global_box, other.global_box),
                    (one.local_box, other.local_box),
                )
            )
            assert not (same and follows)
    assert all(block.global_box.numel for block in blocks)


@given(
    st.lists(st.integers(1, 13), min_size=1, max_size=2).map(tuple),
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3
    ),
)
def test_the_blocks_of_all_ranks_tile_the_tensor(
    shape: Shape, plans: list[tuple[int, int, int]]
) -> None:
    found = []
    for indices in itertools.product(*(range(count) for _, count, _ in plans)):
        shards = [
            ShardSpec(dim % len(shape), index, count, interleave)
            for (dim, count, interleave), index in zip(plans, indices, strict=True)
        ]
        found += [block.global_box for block in blocks_of(shape, shards)]
    assert tiling_fault(found, shape) is None


def test_an_uncut_tensor_is_one_block() -> None:
    for shape in ((), (3,), (3, 4)):
        (block,) = blocks_of(shape, ())
        assert block.global_box == block.local_box
        assert block.global_box.sizes == shape
    assert blocks_of((3, 0), ()) == ()


def test_fused_parts_are_two_blocks() -> None:
    gate, up = blocks_of((2, 8, 3), [ShardSpec(1, 1, 2, interleave=2)])
    assert (gate.global_box.offsets, gate.local_box.offsets) == ((0, 2, 0), (0, 0, 0))
    assert (up.global_box.offsets, up.local_box.offsets) == ((0, 6, 0), (0, 2, 0))
    assert gate.global_box.sizes == up.global_box.sizes == (2, 2, 3)


def test_cut_along_a_dimension_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanningError, match="dimension that it does not have"):
        blocks_of((3,), [ShardSpec(1, 0, 2)])
    with pytest.raises(PlanningError, match="dimension that it does not have"):
        local_shape((), [ShardSpec(0, 0, 2)])


def test_partial_is_refused() -> None:
    with pytest.raises(PlanningError, match="redistribute") as error:
        shards_of([Shard(0), Partial()], [2, 2], [0, 0])
    assert "Partial" in str(error.value) or "P(sum)" in str(error.value)


def torch_indices(
    shape: Shape, placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]
) -> torch.Tensor:
    """Cut the numbered tensor by torch's own code, without a process group."""
    found = numbered(shape)
    for placement, size, index in zip(placements, mesh, coordinate, strict=True):
        if not placement.is_replicate():
            found = placement._split_tensor(found, size, with_padding=False)[0][index]
    return found


PLACEMENTS = st.one_of(
    st.just(Replicate()),
    st.builds(Shard, st.integers(0, 1)),
    st.builds(
        lambda dim, factor: _StridedShard(dim, split_factor=factor),
        st.integers(0, 1),
        st.integers(1, 4),
    ),
)


@given(
    st.tuples(st.integers(1, 17), st.integers(1, 9)),
    st.lists(st.tuples(PLACEMENTS, st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4),
)
def test_placements_are_read_as_torch_reads_them(
    shape: Shape, dims: list[tuple[Any, int, int]]
) -> None:
    placements = [placement for placement, _, _ in dims]
    mesh = [size for _, size, _ in dims]
    coordinate = [index % size for _, size, index in dims]
    shards = shards_of(placements, mesh, coordinate)
    expected = torch_indices(shape, placements, mesh, coordinate)
    local = local_shape(shape, shards)
    blocks = blocks_of(shape, shards)
    assert local == tuple(expected.shape)
    assert torch.equal(from_blocks(shape, local, blocks), expected)
    sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, coordinate, placements)
    assert tuple(sizes) == local
    if blocks:
        assert tuple(offsets) == blocks[0].global_box.offsets


MESHES = {
    (4,): [
        (Shard(0),),
        (Shard(1),),
        (Replicate(),),
        (_StridedShard(1, split_factor=2),),
        (_StridedShard(0, split_factor=3),),
    ],
    (2, 2): [
        (Shard(0), Shard(0)),
        (Shard(0), Shard(1)),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
        (_StridedShard(0, split_factor=2), Shard(0)),
        (Shard(0), _StridedShard(1, split_factor=2)),
        (Replicate(), _StridedShard(1, split_factor=2)),
        (_StridedShard(0, split_factor=2), Shard(1)),
    ],
    (2, 2, 2): [
        (Replicate(), _StridedShard(0, split_factor=2), Shard(0)),
        (Shard(0), _StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(0, split_factor=4), _StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(0, split_factor=2), Shard(0), _StridedShard(1, split_factor=2)),
    ],
    (3, 2): [
        (_StridedShard(0, split_factor=2), Shard(0)),
        (Shard(0), _StridedShard(0, split_factor=3)),
    ],
}


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_blocks_are_what_distribute_tensor_holds(mesh_shape: tuple[int, ...]) -> None:
    size = math.prod(mesh_shape)
    for rank in range(size):
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", mesh_shape)
            for placements, shape in itertools.product(
                MESHES[mesh_shape], [(8, 12), (7, 9), (5, 3), (2, 1)]
            ):
                value = distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
                shards = shards_of(value.placements, mesh.shape, mesh.get_coordinate() or [])
                local = value.to_local()
                blocks = blocks_of(shape, shards)
                assert local_shape(shape, shards) == tuple(local.shape), (rank, placements, shape)
                assert torch.equal(from_blocks(shape, tuple(local.shape), blocks), local)
                assert isinstance(value, DTensor)
        finally:
            dist.destroy_process_group()


def test_both_meanings_of_strided_shard() -> None:
    """With the other cut to its right it is one block; alone it is one of each segment."""
    for row, column in itertools.product(range(4), range(2)):
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        (block,) = blocks_of((16, 3), shards_of(placements, [4, 2], [row, column]))
        assert block.global_box.offsets == (column * 8 + row * 2, 0)
        assert block.global_box.sizes == (2, 3)
    for index in range(4):
        shards = shards_of([_StridedShard(1, split_factor=2)], [4], [index])
        assert [block.global_box.offsets for block in blocks_of((2, 16, 3), shards)] == [
            (0, index * 2, 0),
            (0, 8 + index * 2, 0),
        ]
