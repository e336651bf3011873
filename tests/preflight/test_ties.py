"""Names that are declared to be tied: left out of the export only where that loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import ExportError, WriteError
from support.rank_process import Raised
from support.ranks import run_ranks
from support.stock_readers import load_dcp, load_hf

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed._shard.sharded_tensor import ShardedTensor

SHAPE = (6, 4)


def embed() -> torch.Tensor:
    return torch.arange(24.0).reshape(SHAPE)


def drifted() -> torch.Tensor:
    """Equal to the other but for the last row, which the last rank holds."""
    tensor = embed()
    tensor[-1] += 1
    return tensor


ALIAS = HFExport(
    specs=[
        LoadSpec("embed", "hub.embed", SHAPE),
        LoadSpec("head", "hub.head", SHAPE, alias_of="hub.embed"),
    ]
)
GIVEN = HFExport(tied={"head": "embed"})


@pytest.mark.parametrize("export", [ALIAS, GIVEN], ids=["alias", "given"])
def test_equal_tensors_are_exported_once(tmp_path: Path, export: HFExport) -> None:
    state = {"model": {"embed": embed(), "head": embed()}}
    dcp.save(state, storage_writer=HFDualWriter(tmp_path / "one", export=export), no_dist=True)
    (key,) = load_hf(tmp_path / "one" / "hf")
    assert key.endswith("embed")


@pytest.mark.parametrize("export", [ALIAS, GIVEN], ids=["alias", "given"])
def test_other_values_cost_the_export_and_not_the_checkpoint(
    tmp_path: Path, export: HFExport
) -> None:
    state = {"model": {"embed": embed(), "head": drifted()}}
    future = dcp.async_save(
        state, storage_writer=HFDualWriter(tmp_path / "one", export=export), no_dist=True
    )
    with pytest.raises(ExportError, match=r"model\.head.*'model\.embed'.*fully_shard"):
        future.result()
    assert not (tmp_path / "one" / "hf").exists()
    found = load_dcp(tmp_path / "one", state)
    assert torch.equal(found["model"]["head"], drifted())


def test_tie_that_names_keys_of_the_export_is_compared_as_well(tmp_path: Path) -> None:
    specs = [LoadSpec("embed", "hub.embed", SHAPE), LoadSpec("head", "hub.head", SHAPE)]
    export = HFExport(specs=specs, tied={"hub.head": "hub.embed"})
    state = {"model": {"embed": embed(), "head": drifted()}}
    future = dcp.async_save(
        state, storage_writer=HFDualWriter(tmp_path / "one", export=export), no_dist=True
    )
    with pytest.raises(ExportError, match=r"model\.head.*'model\.embed'"):
        future.result()


def test_nothing_is_published_when_the_export_alone_would_hold_the_weights(tmp_path: Path) -> None:
    state = {"model": {"embed": embed(), "head": drifted()}}
    writer = HFDualWriter(tmp_path / "one", export=ALIAS, weights="once")
    with pytest.raises(WriteError, match="stored nowhere else"):
        dcp.async_save(state, storage_writer=writer, no_dist=True).result()
    assert list(tmp_path.iterdir()) == []


def save_sharded(rank: int, world_size: int, path: Path) -> tuple[Raised | None, bool]:
    mesh = init_device_mesh("cpu", (world_size,))
    tensors = {"embed": embed(), "head": drifted()}
    state: dict[str, Any] = {
        "model": {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}
    }
    raised = None
    try:
        dcp.async_save(state, storage_writer=HFDualWriter(path, export=ALIAS)).result()
    except ExportError as error:
        raised = Raised.of(error)
    return raised, (path / ".metadata").exists()


def test_difference_on_one_rank_is_enough(tmp_path: Path) -> None:
    # torch hands the error of one to all ranks.
    for raised, is_committed in run_ranks(save_sharded, 2, tmp_path / "one"):
        with pytest.raises(ExportError, match="rank 1"):
            raised.reraise()
        assert is_committed
    assert not (tmp_path / "one" / "hf").exists()


def save_placed(rank: int, world_size: int, path: Path, case: str) -> Raised | None:
    """Save two tensors that are declared to be tied, and that no rank can compare."""
    mesh = init_device_mesh("cpu", (world_size,))
    model: dict[str, torch.Tensor] = {}
    if case == "sharded differently":
        model["embed"] = distribute_tensor(embed(), mesh, [Shard(0)])
        model["head"] = distribute_tensor(drifted(), mesh, [Shard(1)])
    elif case == "a DTensor and a whole tensor":
        model["embed"] = distribute_tensor(embed(), mesh, [Shard(0)])
        model["head"] = drifted()
    elif rank == 0:
        model["embed"] = embed()
    else:
        model["head"] = drifted()
    writer = HFDualWriter(path, export=GIVEN)
    try:
        dcp.async_save({"model": model}, storage_writer=writer).result()
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return Raised.of(error)
    return None


@pytest.mark.parametrize(
    "case", ["sharded differently", "a DTensor and a whole tensor", "on different ranks"]
)
def test_tie_that_cannot_be_compared_costs_the_export_and_not_the_checkpoint(
    tmp_path: Path, case: str
) -> None:
    for raised in run_ranks(save_placed, 2, tmp_path / "one", case):
        assert raised is not None
        assert isinstance(raised.error, ExportError)
        assert "cannot be compared" in str(raised.error)
        assert "export both" in str(raised.error)
    assert not (tmp_path / "one" / "hf").exists()
    found = load_dcp(tmp_path / "one", {"model": {"embed": embed() * 0, "head": embed() * 0}})
    assert torch.equal(found["model"]["head"], drifted())
    assert torch.equal(found["model"]["embed"], embed())


def save_sharded_tensors(
    rank: int, world_size: int, root: Path, heads: dict[str, torch.Tensor]
) -> dict[str, Raised]:
    """Save tied tensors as `ShardedTensor`s of equal rows on each rank; return what failed."""
    failures = {}
    for name, head in heads.items():
        tensors = {"embed": rows_of(embed()), "head": rows_of(head)}
        writer = HFDualWriter(root / name, export=GIVEN)
        try:
            dcp.async_save({"model": tensors}, storage_writer=writer).result()
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            failures[name] = Raised.of(error)
    return failures


def rows_of(whole: torch.Tensor) -> ShardedTensor:
    """Return a `ShardedTensor` as FSDP1 makes it: this rank holds its share of the rows."""
    return _create_chunk_sharded_tensor(
        whole, dist.get_rank(), dist.get_world_size(), dist.get_world_size(), dist.group.WORLD
    )


def test_shards_of_a_sharded_tensor_are_compared(tmp_path: Path) -> None:
    heads = {"equal": embed(), "drifted": drifted()}
    first, second = run_ranks(save_sharded_tensors, 2, tmp_path, heads)
    assert first.keys() == second.keys() == {"drifted"}
    (key,) = load_hf(tmp_path / "equal" / "hf")
    assert key.endswith("embed")
    with pytest.raises(ExportError, match="different values"):
        first["drifted"].reraise()
