"""Column shards of a host's ranks are written as whole rows, with the same bytes as apart."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec, Piece, failpoints, verify
from dcp_hf_writer.save import whole_rows
from dcp_hf_writer.staging.neighbour_slabs import NeighbourSlabs
from dcp_hf_writer.storage import posix_outputs
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

pytestmark = pytest.mark.timeout(240)

EXPORT = HFExport(max_shard_size="60KB", assets={"config.json": b"{}"})


@dataclass(frozen=True)
class Held:
    """A tensor, and how a mesh of two dimensions or one holds it."""

    shape: tuple[int, ...]
    placements: tuple[Any, ...]
    dtype: torch.dtype = torch.float32


COLUMNS, ROWS, WHOLE = Shard(1), Shard(0), Replicate()

ONE_DIM = {
    "plain": Held((64, 96), (COLUMNS,)),
    "uneven": Held((33, 7), (COLUMNS,)),
    "fewer than ranks": Held((12, 3), (COLUMNS,)),
    "half": Held((40, 64), (COLUMNS,), torch.bfloat16),
    "experts": Held((3, 16, 40), (Shard(2),)),
    "middle": Held((5, 8, 6), (COLUMNS,)),
    "one row": Held((1, 512), (COLUMNS,)),
    "last of four": Held((2, 3, 4, 10), (Shard(3),)),
    "rows": Held((64, 32), (ROWS,)),
    "replica": Held((16, 8), (WHOLE,)),
}
TWO_DIMS = {
    "rows and columns": Held((64, 96), (ROWS, COLUMNS)),
    "columns of copies": Held((32, 48), (WHOLE, COLUMNS)),
    "both": Held((48, 64), (COLUMNS, COLUMNS)),
    "copies of rows": Held((32, 16), (WHOLE, ROWS)),
    "strided": Held((32, 48), (_StridedShard(1, split_factor=2), COLUMNS)),
    "strided rows": Held((48, 16), (_StridedShard(0, split_factor=2), ROWS)),
}


def values(held: Held, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(held.shape, generator=made).to(held.dtype)


def whole_state(tensors: dict[str, Held]) -> dict[str, torch.Tensor]:
    return {name: values(held, i) for i, (name, held) in enumerate(tensors.items())}


def sharded_state(world_size: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    is_flat = world_size == 2
    mesh = init_device_mesh("cpu", (2,) if is_flat else (2, 2))
    tensors = ONE_DIM if is_flat else TWO_DIMS
    whole = whole_state(tensors)
    shards = {
        name: distribute_tensor(one, mesh, list(tensors[name].placements))
        for name, one in whole.items()
    }
    return {"model": shards}, whole


class Counts:
    """Counts the runs that this rank writes one by one."""

    def __init__(self) -> None:
        self.runs = 0
        self._write_runs = posix_outputs.OutputFile.write_runs

    def __enter__(self) -> Self:
        counts, write_runs = self, self._write_runs

        def counted(file: Any, data: Any, nbytes: int, starts: Any) -> None:
            several = list(starts)
            counts.runs += len(several)
            write_runs(file, data, nbytes, iter(several))

        posix_outputs.OutputFile.write_runs = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        posix_outputs.OutputFile.write_runs = self._write_runs  # type: ignore[method-assign]


def save(root: Path, name: str, state: dict[str, Any], **options: Any) -> int:
    writer = HFDualWriter(root / name, **{"export": EXPORT, **options})
    with Counts() as counts:
        dcp.async_save(state, storage_writer=writer).result()
    return counts.runs


def save_in_ways(rank: int, world_size: int, root: Path) -> dict[str, int]:
    state, _ = sharded_state(world_size)
    runs = {"together": save(root, "together", state)}
    held = memory_held()
    runs["again"] = save(root, "again", state)
    assert memory_held() == held, "a save leaves memory of other ranks mapped"
    runs["small buffer"] = save(root, "small buffer", state, host_budget_bytes=1 << 20)
    cast = HFExport(max_shard_size="60KB", assets={"config.json": b"{}"}, dtype=torch.bfloat16)
    runs["cast"] = save(root, "cast", state, export=cast)
    runs["once"] = save(root, "once", state, weights="once")
    runs["apart"] = save(root, "apart", state, strategy="direct")
    runs["cast apart"] = save(root, "cast apart", state, export=cast, strategy="direct")
    with pytest.MonkeyPatch.context() as patch:
        if rank == world_size - 1:
            patch.setattr(whole_rows, "read_table", refuse)
        runs["unreadable"] = save(root, "unreadable", state)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(NeighbourSlabs, "open", refuse)
        runs["unmapped"] = save(root, "unmapped", state)
    with Counts() as counts:
        dcp.save(state, storage_writer=HFDualWriter(root / "sync", export=EXPORT))
    return runs | {"sync": counts.runs}


def memory_held() -> tuple[int, int]:
    """Count the memory files that this process maps, and those that it has open."""
    gc.collect()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:" in line for line in maps)
    return mapped, sum("memfd:" in os.readlink(link) for link in links if os.path.lexists(link))


def refuse(*_: Any) -> Any:
    """Refuse to read memory, as the kernel does for processes of another user."""
    raise PermissionError(13, "refused")


@pytest.fixture(scope="module", params=[2, 4])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, list[dict[str, int]]]:
    root = tmp_path_factory.mktemp("rows")
    return request.param, root, run_ranks(save_in_ways, request.param, root, timeout_s=200)


WAYS = ("together", "again", "small buffer", "once", "cast")
APART = ("apart", "cast apart", "unreadable", "unmapped", "sync")


def test_no_run_is_written_apart(saved: tuple[int, Path, list[dict[str, int]]]) -> None:
    world_size, _, ranks = saved
    for way in WAYS:
        # Three columns for two ranks are whole rows too; on four ranks nothing is left either.
        assert [found[way] for found in ranks] == [0] * world_size, way
    for way in APART:
        # The control: without whole rows, each row of a column shard is a run.
        assert sum(found[way] for found in ranks) > 100, way


def export_of(step: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (step / "hf").iterdir()}


def test_files_are_those_of_ranks_that_write_apart(
    saved: tuple[int, Path, list[dict[str, int]]],
) -> None:
    _, root, _ = saved
    for way in ("together", "again", "small buffer", "once", "unreadable", "unmapped", "sync"):
        assert export_of(root / way) == export_of(root / "apart"), way
    assert export_of(root / "cast") == export_of(root / "cast apart")
    for way in (*WAYS, *APART):
        assert verify(root / way).ok, way


def test_values_are_those_of_the_state(saved: tuple[int, Path, list[dict[str, int]]]) -> None:
    world_size, root, _ = saved
    whole = whole_state(ONE_DIM if world_size == 2 else TWO_DIMS)
    found: dict[str, torch.Tensor] = {}
    for file in (root / "together" / "hf").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name
    loaded = {"model": {name: torch.zeros_like(one) for name, one in whole.items()}}
    dcp.load(loaded, checkpoint_id=root / "together")
    for name, tensor in whole.items():
        assert torch.equal(loaded["model"][name], tensor), name


def save_turned(rank: int, world_size: int, root: Path) -> int:
    """The rows of the file are columns of the runtime tensor, whose rows the ranks hold."""
    mesh = init_device_mesh("cpu", (world_size,))
    whole = values(Held((24, 40), ()), 1)
    state = {"model": {"w": distribute_tensor(whole, mesh, [ROWS])}}
    turned = LoadSpec(
        "w", ["t"], (24, 40), pieces=[Piece("t", (40, 24), ((24, 1, 40), (40, 24, 1)))]
    )
    return save(
        root, "turned", state, export=HFExport(specs=[turned], assets={"config.json": b"{}"})
    )


def test_shards_of_a_transposed_tensor_are_whole_rows_too(tmp_path: Path) -> None:
    assert run_ranks(save_turned, 2, tmp_path, timeout_s=100) == [0, 0]
    found = load_file(tmp_path / "turned" / "hf" / "model.safetensors")
    assert torch.equal(found["t"], values(Held((24, 40), ()), 1).T)
    assert verify(tmp_path / "turned").ok


def save_in_process(rank: int, world_size: int, root: Path) -> None:
    state, _ = sharded_state(world_size)
    dcp.async_save(
        state,
        storage_writer=HFDualWriter(root / "step-1", export=EXPORT),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    ).result()


def test_checkpointer_processes_read_the_memory_of_each_other(tmp_path: Path) -> None:
    run_ranks(save_in_process, 2, tmp_path, timeout_s=200)
    step = tmp_path / "step-1"
    assert verify(step).ok
    found: dict[str, torch.Tensor] = {}
    for file in (step / "hf").glob("*.safetensors"):
        found |= load_file(file)
    for name, tensor in whole_state(ONE_DIM).items():
        assert torch.equal(found[name], tensor), name


def fail_while_writing(rank: int, world_size: int, root: Path) -> str:
    state, _ = sharded_state(world_size)

    def hook(point: str) -> None:
        if point == "mid hf" and rank == 1:
            raise OSError(5, "injected")

    failpoints.set_hook(hook)
    try:
        save(root, "x", state)
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return str(error)
    return "saved"


def test_failure_while_rows_are_written_costs_the_export_only(tmp_path: Path) -> None:
    told = run_ranks(fail_while_writing, 2, tmp_path, timeout_s=100)
    assert all("injected" in text for text in told)
    assert not (tmp_path / "x" / "hf").exists()
    assert verify(tmp_path / "x").ok
