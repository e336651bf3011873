"""Streams of tensors on a GPU: ranks share one by gloo, which NCCL does not let them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import LoadSpec, ShardSpec, iter_hf_buckets
from dcp_hf_writer.stream.fill_buckets import _gather
from dcp_hf_writer.stream.gather_steps import Gather
from support.compare import tensor_difference
from support.rank_tensors import tensor
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"
)

SHAPES = {"a": (9, 64), "b": (16, 8, 32), "c": (64, 33), "d": (7,)}


def full() -> dict[str, torch.Tensor]:
    return {name: tensor(name, *shape) for name, shape in SHAPES.items()}


def stream_on_gpu(rank: int, world_size: int) -> dict[str, Any]:
    torch.cuda.set_device(0)
    mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("fsdp", "tp"))
    whole = full()
    placed = {
        "a": [_StridedShard(0, split_factor=2), Shard(0)],
        "b": [Shard(0), _StridedShard(1, split_factor=2)],
        "c": [Shard(0), Shard(1)],
    }
    state: dict[str, Any] = {
        name: distribute_tensor(one.cuda(), mesh, placed[name], src_data_rank=None)
        if name in placed
        else one.cuda()
        for name, one in whole.items()
    }
    # As FSDP offloads parameters: on the host, of a mesh of GPUs.
    offloaded = dict(state)
    c = state["c"]
    offloaded["c"] = DTensor.from_local(
        c.to_local().cpu(),
        mesh,
        c.placements,
        run_check=False,
        shape=c.shape,
        stride=c.stride(),
    )
    by_hand = LoadSpec("b", "b", SHAPES["b"], shards=[ShardSpec(0, rank, world_size)])
    cut = {"b": whole["b"].chunk(world_size)[rank].cuda()}
    return {
        "gpu": look(state, whole, "cuda"),
        "host": look(state, whole, "cpu", device="cpu"),
        "offloaded": look(offloaded, whole, "cuda"),
        "cast": look(state, {n: t.bfloat16() for n, t in whole.items()}, "cuda", dtype="bfloat16"),
        "by hand": look(cut, {"b": whole["b"]}, "cuda", specs=[by_hand]),
    }


def look(
    state: dict[str, Any],
    expected: dict[str, torch.Tensor],
    device: str,
    specs: list[LoadSpec] | None = None,
    **options: Any,
) -> str | None:
    for size in (3000, 100_000):
        found = {}
        for bucket in iter_hf_buckets(state, specs, bucket_bytes=size, **options):
            for name, value in bucket:
                if value.device.type != device:
                    return f"{name} is on {value.device}"
                found[name] = value.cpu().clone()
        wrong = tensor_difference(found, expected)
        if wrong is not None:
            return f"bucket_bytes={size}: {wrong}"
    return None


def test_stream_equals_the_whole_when_ranks_hold_parts_on_a_gpu() -> None:
    for found in run_ranks(stream_on_gpu, 4):
        assert found == dict.fromkeys(("gpu", "host", "offloaded", "cast", "by hand"))


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gather_in_place_keeps_what_is_there_over_nccl(alone: None) -> None:
    group = dist.group.WORLD
    assert group is not None
    buffer = torch.arange(64, dtype=torch.uint8, device="cuda")
    _gather(buffer, Gather(0, ((16, 32),)), group)
    assert torch.equal(buffer.cpu(), torch.arange(64, dtype=torch.uint8))
