"""What cannot be streamed is refused on all ranks alike, before anything is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from dcp_hf_writer import LoadSpec, ShardSpec, iter_hf_buckets
from dcp_hf_writer.errors import (
    CheckpointError,
    ConfigError,
    CoverageError,
    LayoutError,
    ModelKeyError,
    PlanningError,
    SpecError,
)
from support.compare import tensor_difference
from support.rank_tensors import tensor
from support.ranks import run_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHAPE = (8, 6)

Request = tuple[dict[str, Any], list[LoadSpec] | None, dict[str, Any]]


def requests(rank: int, mesh: DeviceMesh, grid: DeviceMesh) -> dict[str, Request]:
    """Return state dict, specs and options of what cannot be done; wrong on one rank, or on all."""
    full = tensor("w", *SHAPE)
    w = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
    columns = distribute_tensor(full, grid, [Shard(0), Shard(1)], src_data_rank=None)
    partial = DTensor.from_local(full, mesh, [Partial()], run_check=False)
    short = DTensor.from_local(
        full[: 1 if rank == 1 else 2],
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size(SHAPE),
        stride=(6, 1),
    )
    # Rank 3 shares no group with rank 0: what it finds must come by way of another rank.
    far = DTensor.from_local(
        full[:4, : 2 if rank == 3 else 3],
        grid,
        [Shard(0), Shard(1)],
        run_check=False,
        shape=torch.Size(SHAPE),
        stride=(6, 1),
    )
    by_hand = LoadSpec("w", "w", SHAPE, shards=[ShardSpec(0, rank, 4)])
    part = full.chunk(4)[rank]
    both = [LoadSpec("a", "c", SHAPE), LoadSpec("b", "c", SHAPE)]
    return {
        "bucket_bytes": ({"w": w}, None, {"bucket_bytes": 0 if rank == 1 else 100}),
        "preserve": ({"w": w}, None, {"preserve": "ep"}),
        "cut": ({"w": columns}, None, {"preserve": "ep"}),
        "shape": ({"w": w}, [LoadSpec("w", "w", (8, 5))], {}),
        "unused": ({"w": w}, [LoadSpec("v", "v", SHAPE)], {}),
        "partial": ({"w": partial}, None, {}),
        "local": ({"w": short}, None, {}),
        "far": ({"w": far}, None, {}),
        "meta": ({"w": w, "v": torch.empty(3, device="meta")}, None, {}),
        "by hand": ({"w": part[:1] if rank == 2 else part}, [by_hand], {}),
        "group": ({"w": part}, [by_hand], {"group": grid.get_group("ep")}),
        "specs": ({"w": w}, [LoadSpec("w", "v" if rank == 3 else "w", SHAPE)], {}),
        "names": ({"w" if rank else "v": w}, None, {}),
        "tied": ({"a": w, "b": w if rank == 1 else w.clone()}, None, {}),
        "drifted": ({"a": w, "b": w + (rank == 2)}, [LoadSpec("b", "b", SHAPE, alias_of="a")], {}),
        "two": ({"a": w, "b": w.clone()}, both, {}),
        "empty": ({"w": w}, [LoadSpec("w", global_shape=SHAPE, pieces=())], {}),
        "ambiguous": ({"actor": {"w": w}, "critic": {"w": w}}, None, {}),
    }


def refuse(rank: int, world_size: int) -> tuple[dict[str, CheckpointError | None], str | None]:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    raised: dict[str, CheckpointError | None] = {}
    for name, (state, specs, options) in requests(rank, mesh, grid).items():
        raised[name] = None
        try:
            iter_hf_buckets(state, specs, **{"bucket_bytes": 100, **options})
        except CheckpointError as error:
            raised[name] = error
    # Nothing is left half done.
    full = tensor("w", *SHAPE)
    w = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
    (bucket,) = iter_hf_buckets({"w": w}, bucket_bytes=1000)
    return raised, tensor_difference(dict(bucket), {"w": full})


EXPECTED: dict[str, tuple[type[CheckpointError], str]] = {
    "bucket_bytes": (ConfigError, r"rank 1: bucket_bytes must be a positive size"),
    "preserve": (ConfigError, r"preserve must name .* one of \['fsdp'\]; found 'ep'"),
    "cut": (SpecError, r"cuts through .*'w'.* found elements at index 0, index 1"),
    "shape": (
        SpecError,
        r"the shape in a spec is not .*'w'.* shape \[8, 6\]; found global_shape \[8, 5\]",
    ),
    "unused": (SpecError, r"specs name tensors that the model does not have.*found 'v'"),
    "partial": (PlanningError, r"'w'.*redistribute"),
    "local": (
        SpecError,
        r"rank 1.*its placements .*'w'.* shape \[2, 6\]; found shape \[1, 6\]",
    ),
    "far": (
        SpecError,
        r"rank 3.*its placements .*'w'.* shape \[4, 3\]; found shape \[4, 2\]",
    ),
    "meta": (PlanningError, r"cannot be streamed .*'v'.* on meta"),
    "by hand": (
        SpecError,
        r"rank 2.*its ShardSpecs .*'w'.* shape \[2, 6\]; found shape \[1, 6\]",
    ),
    "group": (CoverageError, r"not make up the whole .*'w'.* hold 24 elements, the tensor has 48"),
    "specs": (PlanningError, r"one set on ranks \[0, 1, 2\] and one set on ranks \[3\]"),
    "names": (PlanningError, r"one set on ranks \[0\] and one set on ranks \[1, 2, 3\]"),
    "tied": (LayoutError, r"rank 0.*share their memory on some ranks only .*'b'"),
    "drifted": (LayoutError, r"rank 2.*declared to be tied are not equal .*'b'.*values of 'a'"),
    "two": (LayoutError, r"two runtime tensors have the same HuggingFace key .*'c'"),
    "empty": (LayoutError, r"no tensors to export"),
    "ambiguous": (ModelKeyError, r"more than one entry"),
}


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[dict[str, CheckpointError | None], str | None]]:
    return run_ranks(refuse, 4)


@pytest.mark.parametrize("name", EXPECTED)
def test_refusal_is_the_same_on_all_ranks(
    outcomes: list[tuple[dict[str, CheckpointError | None], str | None]], name: str
) -> None:
    kind, text = EXPECTED[name]
    errors = [raised[name] for raised, _ in outcomes]
    for error in errors:
        assert error is not None
        with pytest.raises(kind, match=text):
            raise error
    if name != "group":
        assert len({str(error) for error in errors}) == 1


def test_stream_works_after_refusals(
    outcomes: list[tuple[dict[str, CheckpointError | None], str | None]],
) -> None:
    assert [after for _, after in outcomes] == [None] * 4


def test_every_refusal_is_tried(
    outcomes: list[tuple[dict[str, CheckpointError | None], str | None]],
) -> None:
    assert outcomes[0][0].keys() == EXPECTED.keys()


def test_shards_without_their_group_are_refused_when_a_process_is_alone() -> None:
    spec = LoadSpec("w", "w", SHAPE, shards=[ShardSpec(0, 0, 2)])
    with pytest.raises(CoverageError, match="pass group="):
        iter_hf_buckets({"w": torch.zeros(4, 6)}, [spec], bucket_bytes=100)
