"""Streams of tensors on a GPU: ranks share one by gloo, which NCCL does not let them.

The stream runs on the CPU too, so that a mistake in the test itself shows where there is no GPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import LoadSpec, ShardSpec, iter_hf_buckets
from dcp_hf_writer.stream.fill_buckets import _gather
from dcp_hf_writer.stream.plan_gathers import Gather
from support.compare import tensor_difference
from support.rank_tensors import tensor
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"
)

SHAPES = {"a": (9, 64), "b": (16, 8, 32), "c": (64, 33), "d": (7,)}


def full() -> dict[str, torch.Tensor]:
    return {name: tensor(name, *shape) for name, shape in SHAPES.items()}


def share_gpu() -> None:
    """Make device 0 the device of this rank; a mesh would take the one of number `LOCAL_RANK`."""
    os.environ["LOCAL_RANK"] = "0"
    torch.cuda.set_device(0)


def stream_on(rank: int, world_size: int, device: str) -> dict[str, Any]:
    if device == "cuda":
        share_gpu()
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("fsdp", "tp"))
    whole = full()
    placed = {
        "a": [_StridedShard(0, split_factor=2), Shard(0)],
        "b": [Shard(0), _StridedShard(1, split_factor=2)],
        "c": [Shard(0), Shard(1)],
    }
    state: dict[str, Any] = {
        name: distribute_tensor(one.to(device), mesh, placed[name], src_data_rank=None)
        if name in placed
        else one.to(device)
        for name, one in whole.items()
    }
    # As FSDP offloads parameters: on the host, of a mesh of GPUs.
    offloaded = dict(state)
    c = state["c"]
    # `DTensor.from_local` would move it back to the device of the mesh.
    offloaded["c"] = DTensor(c.to_local().cpu(), c._spec, requires_grad=False)
    by_hand = LoadSpec("b", "b", SHAPES["b"], shards=[ShardSpec(0, rank, world_size)])
    cut = {"b": whole["b"].chunk(world_size)[rank].to(device)}
    return {
        "as held": look(state, whole, device),
        "host": look(state, whole, "cpu", device="cpu"),
        "offloaded": look(offloaded, whole, device),
        "cast": look(state, {n: t.bfloat16() for n, t in whole.items()}, device, dtype="bfloat16"),
        "by hand": look(cut, {"b": whole["b"]}, device, specs=[by_hand]),
    }


def look(
    state: dict[str, Any],
    expected: dict[str, torch.Tensor],
    lies_on: str,
    specs: list[LoadSpec] | None = None,
    **options: Any,
) -> str | None:
    """Stream with `options`; say how what comes differs from what is expected, or where it lies."""
    for size in (3000, 100_000):
        found = {}
        for bucket in iter_hf_buckets(state, specs, bucket_bytes=size, **options):
            for name, value in bucket:
                if value.device.type != lies_on:
                    return f"{name} is on {value.device}"
                found[name] = value.cpu().clone()
        wrong = tensor_difference(found, expected)
        if wrong is not None:
            return f"bucket_bytes={size}: {wrong}"
    return None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_stream_equals_the_whole_when_ranks_hold_parts_on(device: str) -> None:
    for found in run_ranks(stream_on, 4, device):
        assert found == dict.fromkeys(("as held", "host", "offloaded", "cast", "by hand"))


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gpu
def test_gather_in_place_keeps_what_is_there_over_nccl(alone: None) -> None:
    group = dist.group.WORLD
    assert group is not None
    buffer = torch.arange(64, dtype=torch.uint8, device="cuda")
    _gather(buffer, Gather(0, ((16, 32),)), group)
    assert torch.equal(buffer.cpu(), torch.arange(64, dtype=torch.uint8))
