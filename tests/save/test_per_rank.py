"""What differs between ranks is saved as `PerRank`, and each rank gets its own back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, HFDualWriter, PerRank, verify
from dcp_hf_writer.torch_seam.future_guard import own_error
from support.rank_tensors import tensor
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

READERS = (FileSystemReader, HFDualReader)


def state_of(rank: int) -> dict[str, Any]:
    """Return the state dict of a trainer, with what only this rank has."""
    torch.manual_seed(rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "model": {"w": distribute_tensor(tensor("w", 8, 3), mesh, [Shard(0)])},
        "rng": PerRank({"torch": torch.get_rng_state(), "python": random.Random(rank).getstate()}),
        "dataloader": {"train": PerRank({"at": rank, f"shard {rank}": [rank] * 3})},
        "step": 7,
    }


def save_and_load(rank: int, _world_size: int, root: Path) -> list[bool]:
    found = []
    for how in ("sync", "async"):
        state = state_of(rank)
        writer = HFDualWriter(root / how)
        if how == "sync":
            dcp.save(state, storage_writer=writer)
        else:
            dcp.async_save(state, storage_writer=writer).result()
        dist.barrier()
        for reader in READERS:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            empty = distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])
            loaded: dict[str, Any] = {
                "model": {"w": empty},
                "rng": PerRank(),
                "dataloader": {"train": PerRank()},
                "step": 0,
            }
            dcp.load(loaded, storage_reader=reader(root / how))
            rng, loader = loaded["rng"].value, loaded["dataloader"]["train"].value
            found += [
                torch.equal(rng["torch"], state["rng"].value["torch"]),
                rng["python"] == state["rng"].value["python"],
                loader == {"at": rank, f"shard {rank}": [rank] * 3},
                torch.equal(empty.full_tensor(), tensor("w", 8, 3)),
                loaded["step"] == 7,
            ]
    return found


def load_elsewhere(_rank: int, _world_size: int, path: Path) -> list[str]:
    found = []
    for reader in READERS:
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - torch's is no Exception
            dcp.load({"rng": PerRank()}, storage_reader=reader(path))
        found.append(str(own_error(caught.value) or caught.value))
        rest = {"model": {"w": torch.zeros(8, 3)}, "step": 0}
        dcp.load(rest, storage_reader=reader(path))
        assert rest["step"] == 7
        assert torch.equal(rest["model"]["w"], tensor("w", 8, 3))
    return found


def test_each_rank_gets_its_own_back_and_another_rank_count_is_told(tmp_path: Path) -> None:
    found = run_ranks(save_and_load, 2, tmp_path)
    assert all(map(all, found))
    for how in ("sync", "async"):
        assert verify(tmp_path / how).ok
        for texts in run_ranks(load_elsewhere, 3, tmp_path / how):
            for text in texts:
                assert "rng.rank-" in text
                assert "-of-3" in text


def test_values_of_all_ranks_are_there_for_tools(tmp_path: Path) -> None:
    run_ranks(save_and_load, 2, tmp_path)
    dcp_to_torch_save(tmp_path / "sync", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    assert found["dataloader"]["train"]["rank-1-of-2"][0]["at"] == 1


def test_a_process_alone_is_one_rank(tmp_path: Path) -> None:
    value = {"numpy": np.random.default_rng(1).bytes(3)}
    dcp.save(
        {"model": {"w": torch.ones(2)}, "x": PerRank(value)},
        storage_writer=HFDualWriter(tmp_path / "c"),
    )
    loaded = {"x": PerRank()}
    dcp.load(loaded, storage_reader=HFDualReader(tmp_path / "c"))
    assert loaded["x"].value == value
    assert list(loaded["x"]) == ["rank-0-of-1"]
